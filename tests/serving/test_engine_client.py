"""The client of a leader rank, against a leader in the same process."""

import asyncio
import socket
from contextlib import aclosing

import pytest
from gptoss_launch.launch.engine_client import EngineClient, EngineDiedError, local
from gptoss_launch.parallel.engine.request import Request, Token
from gptoss_launch.parallel.engine.wire import Cancel, Decoder, Done, Generate, Hello, Refused, Tokens, encode
from gptoss_launch.parallel.errors import UserError


class Leader:
    """Answers request "a" with two tokens, refuses "no", leaves others waiting after one token."""

    def __init__(self):
        self.heard = []
        self.writers = []

    async def __call__(self, reader, writer):
        self.writers.append(writer)
        writer.write(encode(Hello("leader", 0, 1, "here")))
        decoder = Decoder()
        while data := await reader.read(1000):
            for message in decoder.feed(data):
                self.heard.append(message)
                if isinstance(message, Generate):
                    name = message.request.id
                    answers = {"a": Tokens((Token("a", 1), Token("a", 2, "length"))), "no": Refused("no", "too long")}
                    writer.write(encode(answers.get(name, Tokens((Token(name, 7), Token("gone", 8))))))
        writer.close()


def test_streams_refusals_cancels_and_death(tmp_path):
    async def story():
        client, leader = EngineClient(local(tmp_path / "s")), Leader()
        connecting = asyncio.create_task(client.connect())
        await asyncio.sleep(0.1)
        assert not client.ready and not client.dead
        with pytest.raises(EngineDiedError, match="not ready"):
            await anext(client.generate(Request("a", (1,), 2)))
        server = await asyncio.start_unix_server(leader, tmp_path / "s")
        await connecting
        assert client.ready

        assert [token.id async for token in client.generate(Request("a", (1,), 2))] == [1, 2]
        with pytest.raises(UserError, match="too long"):
            await anext(client.generate(Request("no", (1,), 2)))
        async with aclosing(client.generate(Request("b", (1,), 9))) as tokens:
            assert (await anext(tokens)).id == 7 and client.running == 1
        await asyncio.sleep(0.05)
        assert client.running == 0
        assert [message for message in leader.heard if isinstance(message, Cancel)] == [Cancel("b")]

        tokens = client.generate(Request("c", (1,), 9))
        await anext(tokens)
        server.close()
        leader.writers[0].close()
        with pytest.raises(EngineDiedError, match="engine died"):
            await anext(tokens)
        assert client.dead and not client.ready and client.running == 0
        with pytest.raises(EngineDiedError):
            await anext(client.generate(Request("d", (1,), 9)))
        client.close()
        await asyncio.sleep(0.05)

    asyncio.run(story())


def test_a_restarted_leader_is_found_again(tmp_path):
    async def story():
        reports, losses = [], []
        client = EngineClient(local(tmp_path / "s"), reports.append, lambda: losses.append(client.running))
        keeping = asyncio.create_task(client.keep_connected())
        for life in range(3):
            leader = Leader()
            server = await asyncio.start_unix_server(leader, tmp_path / "s")
            while not client.ready:
                await asyncio.sleep(0.01)
            assert client.restarts == life and not client.dead
            assert [token.id async for token in client.generate(Request("a", (1,), 2))] == [1, 2]
            leader.writers[0].write(encode(Done("a", 1.0, 2.0, 3.0, 4, 5, 6)))
            # The stream that is lost and the one of the same name that follows it do not meet.
            lost = client.generate(Request("b", (1,), 9))
            assert (await anext(lost)).id == 7
            server.close()
            leader.writers[0].close()
            while not client.dead:
                await asyncio.sleep(0.01)
            (tmp_path / "s").unlink()
            with pytest.raises(EngineDiedError, match="engine died"):
                await anext(lost)
        assert [report.tokens for report in reports] == [6] * 3
        assert losses == [1] * 3
        client.close()
        await asyncio.wait_for(keeping, 1)

    asyncio.run(story())


def test_a_socket_of_a_dead_leader_is_no_leader(tmp_path):
    """A killed process's socket takes connections until the process is gone: nobody ever says a word on them."""

    async def story():
        losses = []
        dead = socket.socket(socket.AF_UNIX)
        dead.bind(str(tmp_path / "s"))
        dead.listen()
        client = EngineClient(local(tmp_path / "s"), on_loss=lambda: losses.append(client.running))
        keeping = asyncio.create_task(client.keep_connected())
        await asyncio.sleep(0.1)  # connected, and waits for a word
        assert not client.ready and not client.found.is_set()
        dead.close()
        (tmp_path / "s").unlink()
        server = await asyncio.start_unix_server(Leader(), tmp_path / "s")
        await asyncio.wait_for(client.found.wait(), 5)
        assert client.ready and client.restarts == 0 and losses == []
        client.close()
        await asyncio.wait_for(keeping, 1)
        server.close()

    asyncio.run(story())


def test_a_closed_client_stays_closed(tmp_path):
    async def story():
        server = await asyncio.start_unix_server(Leader(), tmp_path / "s")
        client = EngineClient(local(tmp_path / "s"))
        keeping = asyncio.create_task(client.keep_connected())
        await client.found.wait()
        tokens = client.generate(Request("b", (1,), 9))
        await anext(tokens)
        client.close("the server is stopping")
        with pytest.raises(EngineDiedError, match="the server is stopping"):
            await anext(tokens)
        await asyncio.wait_for(keeping, 1)
        assert not client.ready
        server.close()
        await asyncio.sleep(0.05)

    asyncio.run(story())

"""The client of a leader rank, against a leader in the same process."""

import asyncio
from contextlib import aclosing

import pytest
from gptoss_launch.launch.engine_client import EngineClient, EngineDiedError
from gptoss_launch.parallel.engine.request import Request, Token
from gptoss_launch.parallel.engine.wire import Cancel, Decoder, Generate, Refused, Tokens, encode
from gptoss_launch.parallel.errors import UserError


class Leader:
    """Answers request "a" with two tokens, refuses "no", leaves others waiting after one token."""

    def __init__(self):
        self.heard = []
        self.writers = []

    async def __call__(self, reader, writer):
        self.writers.append(writer)
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
        client, leader = EngineClient(tmp_path / "s"), Leader()
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
        assert client.dead and not client.ready
        with pytest.raises(EngineDiedError):
            await anext(client.generate(Request("d", (1,), 9)))
        client.close()
        await asyncio.sleep(0.05)

    asyncio.run(story())

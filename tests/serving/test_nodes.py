"""Replicas on several nodes: who may join, what a lost node costs, and that it comes back. Nodes are processes here."""

import asyncio
import json
import os
import signal
import socket
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from gptoss_launch.launch.api.node_door import NodeDoor
from gptoss_launch.launch.cli import run
from gptoss_launch.launch.commands.serve import open_door
from gptoss_launch.launch.engine_client import EngineClient, EngineDiedError
from gptoss_launch.launch.follower import Membership, plan_here
from gptoss_launch.launch.handshake import GREETING, HandshakeError, admit, introduce
from gptoss_launch.launch.node_link import HeadLostError, join_head, keep_linked
from gptoss_launch.launch.nodes import (
    Meeting,
    Nodes,
    interface_to,
    read_head,
    read_nodes,
    refuse_loopback,
    reserve_port,
    work_names,
)
from gptoss_launch.launch.resolve import make_plan
from gptoss_launch.launch.settings import ServeSettings
from gptoss_launch.launch.supervise import meeting_arguments, meeting_environment
from gptoss_launch.launch.version import own_version
from gptoss_launch.parallel.engine.request import Request
from gptoss_launch.parallel.engine.wire import Assigned, Failed
from gptoss_launch.parallel.errors import RankDiedError, UserError

from .conftest import GONE_S
from .test_engine_client import Leader
from .test_replicas import Stream, body, status, wait_for

KEY, OTHER = b"k" * 32, b"o" * 32


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "node.key"
    path.touch(0o600)
    path.write_bytes(KEY + b"\n")
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# --- what is asked for


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("a-1.b", ("a-1.b", 29500)),
        ("10.0.0.1:7", ("10.0.0.1", 7)),
        ("[2001:db8::1]:7", ("2001:db8::1", 7)),
        ("2001:db8::1", ("2001:db8::1", 29500)),
        ("[::2]", ("::2", 29500)),
    ],
)
def test_heads(text, head):
    assert read_head(text) == head
    if ":" in head[0]:
        assert Nodes(2, 0, *head, KEY).head == f"[{head[0]}]:{head[1]}"


@pytest.mark.parametrize("text", ["", ":7", "a:", "a:0", "a:99999", "a b", "http://a:7", "[::1", "a:b"])
def test_what_is_no_head(text):
    with pytest.raises(UserError, match="is no HOST or HOST:PORT"):
        read_head(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nnodes": 2, "node_rank": 2}, "--node-rank 2 of --nnodes 2: there is none"),
        ({"nnodes": 1, "node_rank": 1}, "--node-rank 1 of --nnodes 1"),
        ({"head": None}, "--nnodes 2 needs --head"),
        ({"node_key_file": None}, "--nnodes 2 needs --node-key-file"),
        ({"node_key_file": Path("/nowhere/key")}, "No such file"),
    ],
)
def test_what_is_missing_is_said(key_file, settings, message):
    given = {"nnodes": 2, "head": "a", "node_key_file": key_file} | settings
    with pytest.raises(UserError, match=message) as caught:
        read_nodes(ServeSettings(**given))
    assert caught.value.hint


def test_a_key_is_a_secret(key_file):
    nodes = read_nodes(ServeSettings(nnodes=2, head="a", node_key_file=key_file))
    assert nodes is not None and nodes.key == KEY and "kkk" not in repr(nodes)
    key_file.chmod(0o604)
    with pytest.raises(UserError, match="everybody on this machine may use it"):
        read_nodes(ServeSettings(nnodes=2, head="a", node_key_file=key_file))
    key_file.chmod(0o600)
    key_file.write_text("short\n")
    with pytest.raises(UserError, match="5 bytes, at least 16"):
        read_nodes(ServeSettings(nnodes=2, head="a", node_key_file=key_file))
    assert read_nodes(ServeSettings(head="a", node_key_file=key_file)) is None  # one node, and nobody to be known by


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.1.1"])
def test_a_head_that_only_this_machine_reaches(host):
    with pytest.raises(UserError, match="where no other node reaches it"):
        refuse_loopback(Nodes(2, 1, host, 29500, KEY))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--head", "localhost"], "--head localhost is "),
        (["--engine", "vllm"], "--engine vllm: --nnodes 2"),
        (["--head", "192.0.2.1"], "cannot listen on 192.0.2.1 port 29500"),
        (["--head", "HERE", "--dp", "1"], "--dp 1 gives work to 1 of --nnodes 2"),
    ],
)
def test_what_serve_refuses(key_file, capsys, monkeypatch, flags, message):
    """The command itself, before anything starts."""
    monkeypatch.setattr("asyncio.run", None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("no network, so no address but loopback")
        flags = [f"{probe.getsockname()[0]}:{free_port()}" if flag == "HERE" else flag for flag in flags]
    common = ["serve", "tiny", "--gpu-memory", "0", "--context", "1024", "--port", "0", "--nnodes", "2"]
    assert run([*common, "--node-key-file", str(key_file), *flags]) == 2
    assert message in capsys.readouterr().err


def test_other_heads_may_be_named():
    refuse_loopback(Nodes(2, 1, "192.0.2.1", 29500, KEY))
    refuse_loopback(Nodes(2, 1, "not-yet.invalid", 29500, KEY))


def test_a_head_that_is_another_machine(key_file):
    settings = ServeSettings(nnodes=2, port=0, node_key_file=key_file)
    with pytest.raises(UserError, match="cannot listen on 192.0.2.1 port 29500") as caught:
        open_door("tiny", settings, Nodes(2, 0, "192.0.2.1", 29500, KEY))
    assert "an address of this node, node 0" in caught.value.hint


def test_the_plan_is_the_heads(tiny_plan, key_file):
    nodes = Nodes(2, 1, "a", 29500, KEY)
    plan = make_plan("tiny", ServeSettings(machine="cpu", context_tokens=1024, dp=3, nnodes=2), need_weights=True)
    assert (plan.nodes, plan.dp, plan.replicas_of(0), plan.replicas_of(1)) == (2, 3, range(2), range(2, 3))
    elsewhere = replace(plan, checkpoint="/on/the/head")
    assert plan_here(assigned(elsewhere), nodes, "tiny") == plan
    with pytest.raises(UserError, match="head a:29500 runs gptoss-launch 0.0.1, this node"):
        plan_here(replace(assigned(plan), version="0.0.1"), nodes, "tiny")
    with pytest.raises(UserError, match="--nnodes 3, and the head's plan is for 2"):
        plan_here(assigned(plan), replace(nodes, count=3), "tiny")
    with pytest.raises(UserError, match="is another model than tiny of the head"):
        plan_here(assigned(replace(plan, spec=replace(plan.spec, experts=9))), nodes, "tiny")


def assigned(plan) -> Assigned:
    return Assigned(own_version(), json.dumps(plan.to_json()))


# --- a replica on several nodes


def part_plan():
    """Of two ranks, one on each of two nodes."""
    settings = ServeSettings(machine="cpu", context_tokens=1024, dp=1, ranks=2, nnodes=2)
    return make_plan("tiny", settings, need_weights=True)


def test_where_ranks_of_several_nodes_meet():
    plan, meeting = part_plan(), Meeting("192.0.2.1", 7)
    assert (plan.span, work_names(plan, 0), work_names(plan, 1)) == (2, "rank 0 of replica 0", "rank 1 of replica 0")
    where = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "192.0.2.1", "--master-port", "7")
    assert meeting_arguments(plan, 1, meeting) == where
    assert meeting_environment(Meeting("127.0.0.1", 7)) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    assert interface_to("2001:db8::1") is None and interface_to("not-yet.invalid") is None


def test_a_reserved_port_is_for_who_asks_for_it():
    with reserve_port("127.0.0.1") as held, socket.socket() as asks:
        with socket.socket() as without:
            with pytest.raises(OSError, match="in use"):
                without.bind(held.getsockname())
        asks.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        asks.bind(held.getsockname())
        asks.listen()
        socket.create_connection(held.getsockname()).close()


def test_a_part_of_a_replica_ends_with_the_others(monkeypatch):
    """The head hears why, from the node itself and when it is lost; and a node does not look for a lost head."""
    plan, failures = part_plan(), []

    async def story():
        async with head(plan, [], failures.append) as (door, _, nodes):
            connection, told = await join_head(nodes, 1, failures.append)
            assert told.meeting_port == 7
            membership = Membership(nodes, connection, told, failures.append, part=True)
            keeping = asyncio.create_task(membership.keep())
            membership.tell(RankDiedError("rank 1 on b died", "its log", follows=True))
            await until(lambda: failures)
            assert failures == [Failed(-1, "rank 1 on b died", "its log", 7, follows=True)]
            connection[1].close()
            await until(lambda: len(failures) == 2)
            assert failures[1].message == f"node 1 ({socket.gethostname()}) is lost, and with it rank 1 of replica 0"
            with pytest.raises(RankDiedError, match="rank 1 on b died"):
                await keeping
            again = Membership(nodes, *await join_head(nodes, 1, failures.append), failures.append, part=True)
            keeping = asyncio.create_task(again.keep())
            for writer in door._open:
                writer.close()
            with pytest.raises(RankDiedError, match="is lost, and with it the other ranks"):
                await asyncio.wait_for(keeping, 5)

    async def the_head_ends(failed):
        async with head(plan, []) as (door, _, nodes):
            membership = Membership(nodes, *await join_head(nodes, 1, failures.append), failures.append, part=True)
            keeping = asyncio.create_task(membership.keep())
            await door.close(failed)
            await asyncio.wait_for(keeping, 5)

    asyncio.run(story())
    asyncio.run(the_head_ends(False))
    with pytest.raises(RankDiedError, match="ranks of the replica have ended on another node"):
        asyncio.run(the_head_ends(True))


# --- the handshake


async def shake(listening, dialling) -> list:
    """What both ends of one connection return or raise."""
    ends = asyncio.Queue()

    async def serve(reader, writer):
        ends.put_nowait(await asyncio.gather(listening(reader, writer), return_exceptions=True))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        (dialled,) = await asyncio.gather(dialling(reader, writer), return_exceptions=True)
        writer.close()
        return [*await ends.get(), dialled]


def test_both_ends_know_the_key():
    sent = []

    async def dialling(reader, writer):
        write = writer.write
        writer.write = lambda data: (sent.append(data), write(data))
        await introduce(reader, writer, KEY, b"it is me")

    assert asyncio.run(shake(lambda *ends: admit(*ends, KEY), dialling)) == [b"it is me", None]
    assert KEY not in b"".join(sent)


@pytest.mark.parametrize(("head", "node"), [(KEY, OTHER), (OTHER, KEY)])
def test_another_key_is_refused_at_both_ends(head, node):
    ends = asyncio.run(shake(lambda *ends: admit(*ends, head), lambda *ends: introduce(*ends, node, b"me")))
    assert [type(end) for end in ends] == [HandshakeError] * 2
    assert {str(end) for end in ends} == {"its node key is another one"}


def test_a_recorded_handshake_is_worth_nothing():
    """Of either end: what it sent to one, sent to another."""
    heard: dict[str, bytes] = {}

    async def honest(reader, writer):
        read = reader.readexactly

        async def record(count):
            data = await read(count)
            heard["node"] = heard.get("node", b"") + data
            return data

        reader.readexactly = record
        return await admit(reader, writer, KEY)

    async def replay(reader, writer):
        await reader.readexactly(len(GREETING) + 32)
        writer.write(heard["node"])
        assert await reader.readexactly(32) == bytes(32)

    assert asyncio.run(shake(honest, lambda *ends: introduce(*ends, KEY, b"me"))) == [b"me", None]
    ends = asyncio.run(shake(lambda *ends: admit(*ends, KEY), replay))
    assert isinstance(ends[0], HandshakeError) and ends[1] is None


def test_a_node_says_nothing_to_a_head_that_only_repeats():
    async def mirror(reader, writer):
        """Sends the node's own proof back, for want of the key."""
        writer.write(GREETING + bytes(32))
        data = await reader.readexactly(32 + 2 + 2 + 32)
        writer.write(data[-32:])

    ends = asyncio.run(shake(mirror, lambda *ends: introduce(*ends, KEY, b"me")))
    assert isinstance(ends[1], HandshakeError)


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + b"x" * 99, b"", bytes(32) + b"\xff\xff"])
def test_strangers_at_the_door(junk):
    async def knock(reader, writer):
        writer.write(junk)
        writer.write_eof()
        await reader.read()

    ends = asyncio.run(shake(lambda *ends: admit(*ends, KEY), knock))
    assert isinstance(ends[0], HandshakeError | EOFError)


def test_something_else_listens_there():
    async def http(reader, writer):
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    ends = asyncio.run(shake(http, lambda *ends: introduce(*ends, KEY, b"me")))
    assert isinstance(ends[1], HandshakeError) and "no head of this version" in str(ends[1])


# --- a door, and nodes that come through it


@asynccontextmanager
async def head(plan, said, fail=lambda failed: None):
    """A door with clients of all its replicas -> (door, clients, the other node's view of it)."""
    door = NodeDoor(plan, KEY, said.append, fail, meeting_port=7 if plan.span > 1 else 0)
    clients = [EngineClient(door.dial(replica)) for replica in range(plan.dp)]
    listener = socket.create_server(("127.0.0.1", 0))
    await door.open(listener, clients)
    keeping = [asyncio.create_task(client.keep_connected()) for client in clients]
    try:
        yield door, clients, Nodes(plan.nodes, 1, *listener.getsockname(), KEY)
    finally:
        for client in clients:
            client.close()
        await door.close()
        await asyncio.gather(*keeping)


async def until(found, limit_s=5.0):
    async with asyncio.timeout(limit_s):
        while not found():
            await asyncio.sleep(0.01)


def test_a_node_is_put_through_lost_and_back(tiny_plan, tmp_path, monkeypatch):
    """Its tokens come, its loss ends its streams alone, and it is found again. Replica 0 is left out."""
    monkeypatch.setattr("gptoss_launch.launch.node_link.AGAIN_S", 0.05)
    plan, said = replace(tiny_plan, dp=2, nodes=2), []

    async def story():
        async with head(plan, said) as (_, clients, nodes):
            client, leader = clients[1], Leader()
            server = await asyncio.start_unix_server(leader, tmp_path / "s")
            for life in range(2):
                connection, told = await join_head(nodes, 1, said.append)
                assert told == assigned(plan)
                link = asyncio.create_task(keep_linked(nodes, 1, tmp_path / "s"))
                await until(lambda: client.ready)
                assert client.restarts == life and not clients[0].ready
                assert [token.id async for token in client.generate(Request("a", (1,), 2))] == [1, 2]
                stream = client.generate(Request("b", (1,), 9))
                await anext(stream)
                link.cancel()
                connection[1].close()
                with pytest.raises(EngineDiedError, match="engine died"):
                    await anext(stream)
                await until(lambda: client.dead)
                await asyncio.gather(link, return_exceptions=True)
                await until(lambda: "is lost" in said[-1])
            # Its leader dies alone: the node stays, and so does the way to it.
            connection, _ = await join_head(nodes, 1, said.append)
            link = asyncio.create_task(keep_linked(nodes, 1, tmp_path / "s"))
            await until(lambda: client.ready)
            leader.writers[-1].close()
            await until(lambda: client.restarts == 3 and client.ready)
            link.cancel()
            connection[1].close()
            await asyncio.gather(link, return_exceptions=True)
            server.close()

    asyncio.run(story())
    assert said[:2] == [
        f"node 1 ({socket.gethostname()}) has joined: replica 1",
        f"node 1 ({socket.gethostname()}) is lost: the other nodes answer, until it joins again",
    ]


def test_a_node_that_leaves_ends_what_it_has_begun(tiny_plan, tmp_path):
    plan, said = replace(tiny_plan, dp=2, nodes=2), []

    async def story():
        async with head(plan, said) as (_, clients, nodes):
            leader = Leader()
            server = await asyncio.start_unix_server(leader, tmp_path / "s")
            membership = Membership(nodes, *await join_head(nodes, 1, said.append), said.append)
            keeping = asyncio.create_task(membership.keep())
            link = asyncio.create_task(keep_linked(nodes, 1, tmp_path / "s"))
            await until(lambda: clients[1].ready)
            async with aclosing(clients[1].generate(Request("b", (1,), 9))) as stream:
                await anext(stream)
                assert membership.leave()
                await until(lambda: not clients[1].ready)
                await asyncio.sleep(0.3)
                assert not keeping.done() and not clients[1].dead
            await asyncio.wait_for(keeping, 2)
            link.cancel()
            await asyncio.gather(link, return_exceptions=True)
            server.close()

    asyncio.run(story())
    assert said[1].endswith("leaves: it gets no further requests")


def test_who_may_not_join(tiny_plan, monkeypatch):
    monkeypatch.setattr("gptoss_launch.launch.node_link.AGAIN_S", 0.02)
    plan, said, waited = replace(tiny_plan, dp=2, nodes=2), [], []

    async def story():
        async with head(plan, said) as (_, _, nodes):
            with pytest.raises(UserError, match="its node key is another one") as caught:
                await join_head(replace(nodes, key=OTHER), 1, waited.append)
            assert "the same --node-key-file" in caught.value.hint
            first, _ = await join_head(nodes, 1, waited.append)
            with pytest.raises(HeadLostError, match="node 1 is here already") as caught:
                await join_head(nodes, 0.5, waited.append)
            assert caught.value.exit_code == RankDiedError.exit_code and "--node-rank of its own" in caught.value.hint
            joining = asyncio.create_task(join_head(nodes, 5, waited.append))
            await until(lambda: len(waited) == 2)
            first[1].close()
            again, _ = await joining
            again[1].close()

    asyncio.run(story())
    assert sum("may not join: its node key is another one" in line for line in said) == 1
    assert sum("here already" in line for line in waited) == 2  # once for each that waits, not for each attempt


def test_a_head_that_is_not_there(monkeypatch):
    monkeypatch.setattr("gptoss_launch.launch.node_link.AGAIN_S", 0.02)
    said = []
    with pytest.raises(HeadLostError, match=r"head 127.0.0.1:\d+ did not take this node in 0.1 s: ") as caught:
        asyncio.run(join_head(Nodes(2, 1, "127.0.0.1", free_port(), KEY), 0.1, said.append))
    assert "is node 0 up, and port" in caught.value.hint and len(said) == 1


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_was_started_anew(tiny_plan, monkeypatch, same):
    """It finds its nodes still loaded, if they run what it wants."""
    monkeypatch.setattr("gptoss_launch.launch.node_link.AGAIN_S", 0.02)
    plan, said = replace(tiny_plan, dp=2, nodes=2), []

    async def story():
        async with head(plan if same else replace(plan, sequences=1), []) as (door, _, anew):
            async with head(plan, said) as (_, _, nodes):
                membership = Membership(anew, *await join_head(nodes, 1, said.append), said.append)
                membership._connection[1].close()
            keeping = asyncio.create_task(membership.keep())
            if same:
                await until(lambda: said[-1].endswith("is there again"))
                await door.close()
                await asyncio.wait_for(keeping, 2)
            else:
                with pytest.raises(RankDiedError, match="runs another plan now"):
                    await asyncio.wait_for(keeping, 2)

    asyncio.run(story())


# --- as processes


@pytest.mark.slow
def test_a_node_is_killed_under_load_and_comes_back(start, key_file):
    port = free_port()
    node = ("node", 1, 2, port, key_file, 2, 10)
    script = {"delay_s": 0.015}
    head = start("node", 0, 2, port, key_file, 2, 10, script=script, url=False)
    lost = start(*node, script=script, url=False)
    head.url = head.process.stdout.readline().strip()
    assert head.pids().keys() == {"command", "http", "rank", "torchrun"}
    assert lost.pids().keys() == {"command", "rank 1", "torchrun 1"}
    assert status(head, "/ready") == (200, {"ready_replicas": 2, "replicas": 2})
    wait_for(lambda: "replica 1 rank 0: " in lost.stderr())

    streams = [Stream(head, f"Hello {i}") for i in range(4)]
    wait_for(lambda: sum(stream.chunks > 5 for stream in streams) == 2)
    os.kill(lost.pids()["command"], signal.SIGKILL)
    wait_for(lambda: status(head, "/health") == (503, {"ok": False, "dead_replicas": 1, "replicas": 2}))
    lost.gone_within()
    assert ask(head).status_code == 200
    for stream in streams:
        stream.thread.join(30)
    broken = [stream for stream in streams if stream.error is not None]
    assert [stream.error["code"] for stream in broken] == ["replica_died"] and broken[0].error["retryable"] is True
    whole = [stream for stream in streams if stream.error is None]
    assert len(whole) == 3 and all(stream.done and stream.finish_reason == "length" for stream in whole)

    back = start(*node, script=script, url=False)
    wait_for(lambda: status(head, "/health")[0] == 200)
    wait_for(lambda: "replica 1 rank 0: " in back.stderr())  # the node knows it, too
    os.kill(back.pids()["rank 1"], signal.SIGKILL)  # a replica's own death, which its node puts right
    wait_for(lambda: status(head, "/health")[0] == 503)
    wait_for(lambda: status(head, "/health")[0] == 200)
    assert "replica 1 died, restart 1 of 1" in back.stderr()

    # The head's own replica is lost for good: the other node answers.
    fail = {"message": "tensor x is short", "hint": "fetch it again", "exit_code": 2}
    (head.tmp / "script").write_text(json.dumps(script | {"fail": fail}))
    os.kill(head.pids()["rank"], signal.SIGKILL)
    wait_for(lambda: "0 of 1 replicas are left here: " in head.stderr(), 60)
    assert ask(head).status_code == 200

    stream = Stream(head, "the last")
    wait_for(lambda: stream.chunks > 2)
    head.process.send_signal(signal.SIGTERM)
    stream.thread.join(30)
    assert stream.done
    head.gone_within()
    back.gone_within()
    assert (head.process.wait(), back.process.wait()) == (0, 0)
    assert "k" * 9 not in head.stderr() + back.stderr()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 0", "rank 1"])
def test_a_replica_lies_on_two_nodes(start, key_file, victim):
    """True ranks: together they answer as one does. When one is killed, all ends, and the head says which it was."""
    port = free_port()
    head = start("part", 0, 2, port, key_file, 2, 10, url=False)
    other = start("part", 1, 2, port, key_file, 2, 10, url=False)
    alone = start("part", 0, 1, 0, key_file, 1, 10, url=False) if victim == "rank 0" else None
    for running in (head, other, alone):
        if running is not None and running is not other:
            running.url = running.process.stdout.readline().strip()
    assert head.pids().keys() == {"command", "http", "rank", "torchrun"}
    assert other.pids().keys() == {"command", "rank", "torchrun"}
    wait_for(lambda: "rank 1: read " in other.stderr())  # it reports to its own node
    assert "rank 0 of replica 0" not in other.stderr()
    if alone is not None:
        answers = [
            [
                httpx.post(f"{one.url}/chat/completions", json=body(text, logprobs=True), timeout=60).json()["choices"]
                for text in ("What is 17 + 25?", "Hello", "What is 98 - 79?")
            ]
            for one in (head, alone)
        ]
        assert said(answers[0]) == said(answers[1]) and "42" in said(answers[0])[0]
        alone.process.terminate()
    stream = Stream(head, "one two three")
    wait_for(lambda: stream.chunks > 2)
    os.kill((head if victim == "rank 0" else other).pids()["rank"], signal.SIGKILL)
    assert max(head.gone_within(), other.gone_within()) < GONE_S
    stream.thread.join(10)
    assert (head.process.wait(), other.process.wait()) == (7, 7)
    assert f"{victim} on {socket.gethostname()} died " in head.stderr()
    assert stream.error is None or stream.error["code"] == "replica_died"


def said(answers):
    messages = [choice["message"] for choices in answers for choice in choices]
    return [message["reasoning_content"] + message["content"] for message in messages]


def ask(running):
    return httpx.post(f"{running.url}/chat/completions", json=body("x", max_tokens=2), timeout=30)

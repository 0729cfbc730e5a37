"""Where the other nodes come in, on the first one: each with a connection of its own, and one for each of its replicas.

A node is told the plan and, at the end, to stop; what its replicas say is `engine_client`'s business. A node that is
lost may come back at any time, unless it had some ranks of a replica that lies on others too: then that is over. Knows
nothing of HTTP.
"""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Sequence

from ...parallel.engine.wire import Assigned, Decoder, Failed, Hello, Leave, Stop, encode
from ...parallel.errors import RankDiedError
from ...parallel.planning.plan import Plan
from ..engine_client import READ_BYTES, Connection, Dial, EngineClient
from ..handshake import HandshakeError, admit
from ..node_link import notice_loss
from ..nodes import work_names
from ..version import own_version

TELL_EVERY_S = 60.0  # of strangers
LOOK_EVERY_S = 0.1
CLOSE_S = 1.0


class NodeDoor:
    """Use it from one event loop. say: takes what a person should read. Of a replica that lies on several nodes: fail
    takes why it is over, and meeting_port is where its ranks meet."""

    def __init__(
        self,
        plan: Plan,
        key: bytes,
        say: Callable[[str], None],
        fail: Callable[[Failed], None] = lambda failed: None,
        meeting_port: int = 0,
    ) -> None:
        self._plan = plan
        self._fail = fail
        self._meeting_port = meeting_port
        self._key = key
        self._say = say
        self._engines: Sequence[EngineClient] = ()
        self._awaited: dict[int, asyncio.Future[Connection]] = {}
        self._nodes: dict[int, asyncio.StreamWriter] = {}
        self._open: set[asyncio.StreamWriter] = set()  # of those that are not an engine's client yet
        self._server: asyncio.Server | None = None
        self._closing = self._failed = False
        self._told_s = float("-inf")
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop alone would forget them

    def dial(self, replica: int) -> Dial:
        """To a replica of another node: returns once that one has dialled us."""

        async def dial() -> Connection:
            self._awaited[replica] = asyncio.get_running_loop().create_future()
            try:
                return await self._awaited[replica]
            finally:
                del self._awaited[replica]

        return dial

    async def open(self, listener: socket.socket, engines: Sequence[EngineClient]) -> None:
        """engines: of all replicas, in order."""
        self._engines = engines
        self._server = await asyncio.start_server(self._serve, sock=listener)

    async def close(self, died: bool = False) -> None:
        """Tells every node to stop. died: a leader has, so that a replica on several nodes is over."""
        self._closing = True
        word = Stop()
        if self._plan.span > 1 and (died or self._failed):
            message = "ranks of the replica have ended on another node"
            word = Failed(-1, message, "the head says which, and why", RankDiedError.exit_code)
        if self._server is not None:
            self._server.close()
        for writer in self._nodes.values():
            writer.write(encode(word))
        for writer in self._open:
            writer.close()
        deadline_s = time.monotonic() + CLOSE_S
        while self._open and time.monotonic() < deadline_s:  # each connection's task comes to its end
            await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            await self._let_in(reader, writer)
        finally:
            self._open.remove(writer)

    async def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            notice_loss(writer)
            (hello,) = Decoder().feed(await admit(reader, writer, self._key))
        except (HandshakeError, OSError, EOFError, ValueError) as error:
            self._tell_of_stranger(writer, error)
            writer.close()
            return
        assert isinstance(hello, Hello), "whoever has the key is one of us"
        if hello.role == "node":
            await self._keep_node(hello, reader, writer)
        elif (awaited := self._awaited.get(hello.rank)) is not None and not awaited.done():
            awaited.set_result((reader, writer))
        else:
            writer.close()  # it is connected already, or its last connection not known to be lost yet: it tries again

    async def _keep_node(self, hello: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank, name = hello.rank, f"node {hello.rank} ({hello.host})"
        if rank in self._nodes or self._closing:
            reason = "the server is stopping" if self._closing else f"node {rank} is here already"
            writer.write(encode(Failed(-1, reason, "each node needs a --node-rank of its own", 2)))
            writer.close()
            return
        writer.write(encode(Assigned(own_version(), json.dumps(self._plan.to_json()), self._meeting_port)))
        if not 0 < rank < self._plan.nodes:  # it sees that in the plan
            writer.close()
            return
        self._nodes[rank] = writer
        self._say(f"{name} has joined: {work_names(self._plan, rank)}")
        decoder, left = Decoder(), False
        try:
            while data := await reader.read(READ_BYTES):
                for message in decoder.feed(data):
                    if isinstance(message, Failed):
                        self._give_up(message)
                    elif isinstance(message, Leave) and not left:
                        left = True
                        self._say(f"{name} leaves: it gets no further requests")
                        task = asyncio.create_task(self._let_go(rank, writer))
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)
        except (OSError, ValueError):
            pass  # a broken connection is an ended one
        finally:
            del self._nodes[rank]
            writer.close()
        if self._closing:
            return
        what = "has left" if left else "is lost"
        if self._plan.span > 1:
            message = f"{name} {what}, and with it {work_names(self._plan, rank)}"
            self._give_up(Failed(-1, message, "start all nodes again", RankDiedError.exit_code))
        else:
            self._say(f"{name} {what}: the other nodes answer, until it joins again")

    def _give_up(self, failed: Failed) -> None:
        self._failed = True
        self._fail(failed)

    async def _let_go(self, rank: int, writer: asyncio.StreamWriter) -> None:
        """Stop, once what its replicas are at has ended."""
        engines = [self._engines[replica] for replica in self._plan.replicas_of(rank)]
        for engine in engines:
            engine.leave()
        while any(engine.running for engine in engines):
            await asyncio.sleep(LOOK_EVERY_S)
        if not writer.is_closing():
            writer.write(encode(Stop()))

    def _tell_of_stranger(self, writer: asyncio.StreamWriter, error: Exception) -> None:
        """Whoever knocks again and again is named once a minute."""
        if time.monotonic() - self._told_s >= TELL_EVERY_S:
            self._told_s = time.monotonic()
            who = writer.get_extra_info("peername")
            self._say(f"{who[0] if who else 'somebody'} may not join: {error or 'it hung up, or said nothing'}")

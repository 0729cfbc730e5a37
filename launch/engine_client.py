"""The way to a replica's leader rank: Request in, stream of Token out, over a stream socket.

One connection carries all streams. Closing a stream early cancels its request. When the leader dies, its streams end
with an error, and `keep_connected` finds the leader of the restarted replica. Where that is, here or on another node, a
Dial knows. Knows nothing of text, HTTP or of what the leader does with a request.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..parallel.engine.request import Request, Token
from ..parallel.engine.wire import Cancel, Decoder, Done, Generate, Message, Refused, Stats, Tokens, encode
from ..parallel.errors import UserError

READ_BYTES = 64 << 10
TOKENS_PER_TURN = 64  # given to their streams in one turn of the event loop; each costs it up to 0.1 ms
POLL_S = 0.05  # between attempts to reach a leader that is still loading


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Dial = Callable[[], Coroutine[Any, Any, Connection]]  # returns once there may be a leader that can work


def local(path: Path) -> Dial:
    """To the leader that listens at this Unix socket, which it does only when it can work."""

    async def dial() -> Connection:
        while True:
            try:
                return await asyncio.open_unix_connection(path)
            except (FileNotFoundError, ConnectionError, BlockingIOError):
                await asyncio.sleep(POLL_S)

    return dial


class EngineDiedError(Exception):
    """The leader is gone, and what it was asked for with it."""


class _Inbox:
    """What has come for one stream and is not read yet. As asyncio.Queue, which takes three times as long, for each
    token."""

    def __init__(self) -> None:
        self._items: deque[Token | Exception] = deque()
        self._come: asyncio.Future[None] | None = None

    def put(self, item: Token | Exception) -> None:
        self._items.append(item)
        if self._come is not None and not self._come.done():
            self._come.set_result(None)

    async def get(self) -> Token | Exception:
        """By one reader alone."""
        while not self._items:
            self._come = asyncio.get_running_loop().create_future()
            await self._come
        return self._items.popleft()


class EngineClient:
    """The connection to one leader. Use it from one event loop.

    on_report: called with what the leader tells beside tokens. on_loss: called when the leader is gone, before any
    stream ends.
    """

    def __init__(
        self,
        dial: Dial,
        on_report: Callable[[Done | Stats], None] = lambda report: None,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._dial = dial
        self._on_report = on_report
        self._on_loss = on_loss
        self._streams: dict[str, _Inbox] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._dialing: asyncio.Task[tuple[Connection, bytes]] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._leaving = False
        self._loss = ""  # why there is no connection, after there was one
        self._closed = False
        self._connections = 0
        self.found = asyncio.Event()  # set once there was a leader

    @property
    def ready(self) -> bool:
        """Whether it takes further requests."""
        return self._writer is not None and not self._leaving

    @property
    def dead(self) -> bool:
        """It was ready and is no longer."""
        return self._writer is None and self._loss != ""

    @property
    def restarts(self) -> int:
        """How often a leader was found again after a loss."""
        return max(self._connections - 1, 0)

    @property
    def running(self) -> int:
        """Requests begun and not ended."""
        return len(self._streams)

    async def connect(self) -> None:
        """Returns once there is a leader, or the client is closed."""
        if self._writer is not None or self._closed:
            return
        self._dialing = asyncio.create_task(self._greeted())
        try:
            (reader, self._writer), greeting = await self._dialing
        except asyncio.CancelledError:
            if self._closed:
                return
            raise
        self._leaving = False
        self._connections += 1
        self.found.set()
        self._reading = asyncio.create_task(self._read(reader, greeting))

    async def keep_connected(self) -> None:
        """Connects, and again each time that the leader is gone; until `close`."""
        while not self._closed:
            await self.connect()
            if self._reading is not None:
                await asyncio.wait({self._reading})

    async def generate(self, request: Request) -> AsyncGenerator[Token]:
        """The tokens of one request, as they come. Close it (aclose, or contextlib.aclosing) to cancel the request.

        Raises EngineDiedError when the leader goes, UserError when it refuses the request.
        """
        if self._writer is None:
            raise EngineDiedError(self._loss or "the engine is not ready yet")
        inbox = _Inbox()
        self._streams[request.id] = inbox
        self._send(Generate(request))
        ended = False
        try:
            while not ended:
                item = await inbox.get()
                ended = isinstance(item, Exception) or item.finish_reason is not None
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            # After a loss the table is a new one, which may hold the same request again.
            if self._streams.get(request.id) is inbox:
                del self._streams[request.id]
                if not ended:
                    self._send(Cancel(request.id))

    def leave(self) -> None:
        """Takes no further requests until the leader is found anew; those that run go on."""
        self._leaving = True

    def close(self, reason: str = "the connection was closed") -> None:
        """Ends the connection for good; the leader drops what still runs on it, and open streams raise
        EngineDiedError."""
        self._closed = True
        self._end(reason)
        for task in (self._dialing, self._reading):
            if task is not None:
                task.cancel()

    def _send(self, message: Message) -> None:
        if self._writer is not None:
            self._writer.write(encode(message))

    async def _greeted(self) -> tuple[Connection, bytes]:
        """A connection to a leader, and its first words, without which there is none: the socket of a process that was
        killed takes connections until all of the process is gone."""
        while True:
            reader, writer = await self._dial()
            words = b""
            try:
                with suppress(OSError):
                    words = await reader.read(READ_BYTES)
            finally:
                if not words:
                    writer.close()
            if words:
                return (reader, writer), words
            await asyncio.sleep(POLL_S)

    async def _read(self, reader: asyncio.StreamReader, data: bytes) -> None:
        """data: what has been read already."""
        decoder = Decoder()
        reason = "the engine died"
        try:
            while data:
                tokens: dict[str, list[Token]] = {}
                for message in decoder.feed(data):
                    if not isinstance(message, Tokens):
                        self._deliver(message)
                        continue
                    for token in message.tokens:
                        tokens.setdefault(token.request_id, []).append(token)
                await self._hand_out(tokens)
                data = await reader.read(READ_BYTES)
        except (OSError, ValueError) as error:
            reason = f"the connection to the engine failed: {error}"
        finally:
            self._end(reason)

    async def _hand_out(self, tokens: dict[str, list[Token]]) -> None:
        """Gives each stream all that has come for it at once, which costs least when much has come; and lets the
        streams have their turn now and then, since a step of a large batch would hold up everything else."""
        given = 0
        for request_id, own in tokens.items():
            # A stream that is no longer there was cancelled; what was under way for it is dropped.
            if (inbox := self._streams.get(request_id)) is None:
                continue
            for token in own:
                inbox.put(token)
            given += len(own)
            if given >= TOKENS_PER_TURN:
                given = 0
                await asyncio.sleep(0)
        await asyncio.sleep(0)  # what has come meanwhile is read without waiting

    def _deliver(self, message: Message) -> None:
        if isinstance(message, Refused) and (inbox := self._streams.get(message.request_id)) is not None:
            inbox.put(UserError(message.message))
        elif isinstance(message, Done | Stats):
            self._on_report(message)

    def _end(self, reason: str) -> None:
        if self._writer is None:
            return
        self._loss = reason
        self._writer.close()
        self._writer = None
        self._on_loss()
        streams, self._streams = self._streams, {}
        for inbox in streams.values():
            inbox.put(EngineDiedError(reason))

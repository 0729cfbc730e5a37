"""The way to a replica's leader rank: Request in, stream of Token out, over a Unix socket.

One connection carries all streams. Closing a stream early cancels its request. Knows nothing of text, HTTP or of what
the leader does with a request.
"""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

from ..parallel.engine.request import Request, Token
from ..parallel.engine.wire import Cancel, Decoder, Generate, Message, Refused, Tokens, encode
from ..parallel.errors import UserError

POLL_S = 0.05  # between attempts to reach a leader that is still loading


class EngineDiedError(Exception):
    """The leader is gone; running and later requests cannot be answered."""


class EngineClient:
    """The connection to one leader. Use it from one event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._streams: dict[str, asyncio.Queue[Token | Exception]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ended: EngineDiedError | None = None

    @property
    def ready(self) -> bool:
        return self._writer is not None and self._ended is None

    @property
    def dead(self) -> bool:
        """It was ready and never will be again."""
        return self._ended is not None

    @property
    def running(self) -> int:
        """Requests begun and not ended."""
        return len(self._streams)

    async def connect(self) -> None:
        """Returns once the leader listens, which it does only when it can work."""
        while self._writer is None:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._path)
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(POLL_S)
            else:
                self._reading = asyncio.create_task(self._read(reader))

    async def generate(self, request: Request) -> AsyncGenerator[Token]:
        """The tokens of one request, as they come. Close it (aclose, or contextlib.aclosing) to cancel the request.

        Raises EngineDiedError when the leader goes, UserError when it refuses the request.
        """
        if self._ended is not None or self._writer is None:
            raise self._ended or EngineDiedError("the engine is not ready yet")
        inbox: asyncio.Queue[Token | Exception] = asyncio.Queue()
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
            del self._streams[request.id]
            if not ended:
                self._send(Cancel(request.id))

    def close(self, reason: str = "the connection was closed") -> None:
        """Ends the connection; the leader drops what still runs on it, and open streams raise EngineDiedError."""
        self._end(reason)
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()

    def _send(self, message: Message) -> None:
        if self._writer is not None and self._ended is None:
            self._writer.write(encode(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = Decoder()
        try:
            while data := await reader.read(1 << 16):
                for message in decoder.feed(data):
                    self._deliver(message)
        except (OSError, ValueError) as error:
            self._end(f"the connection to the engine failed: {error}")
        else:
            self._end("the engine died")

    def _deliver(self, message: Message) -> None:
        # A stream that is no longer there was cancelled; what was under way for it is dropped.
        if isinstance(message, Tokens):
            for token in message.tokens:
                if (inbox := self._streams.get(token.request_id)) is not None:
                    inbox.put_nowait(token)
        elif isinstance(message, Refused) and (inbox := self._streams.get(message.request_id)) is not None:
            inbox.put_nowait(UserError(message.message))

    def _end(self, reason: str) -> None:
        if self._ended is None:
            self._ended = EngineDiedError(reason)
            for inbox in self._streams.values():
                inbox.put_nowait(self._ended)

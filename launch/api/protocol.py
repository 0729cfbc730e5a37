"""One TCP connection: uvicorn's httptools protocol, with limits on what it takes in, and fewer system calls.

uvicorn bounds neither the size of the headers nor the time that a request may take to arrive. Knows nothing of what is
in a request.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_LIMIT_BYTES = 64 << 10  # request line, headers and trailers
HEAD_S = 30.0  # a connection, new or idle, has so long from its first byte to the end of the headers
MESSAGE_S = 600.0  # and so long to the end of the body


class _Gathering:
    """A transport that sends what is written in one turn of the event loop at once: where a client's tokens have piled
    up, and for the headers with the first event. A system call costs more than making an event."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._parts:
            parts, self._parts = self._parts, []
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))


def connection(head_s: float = HEAD_S, message_s: float = MESSAGE_S) -> type[HttpToolsProtocol]:
    """The class of connections with these limits, as uvicorn takes it."""

    class Connection(HttpToolsProtocol):
        _head_bytes = 0  # of the request that is being read: its line, headers and trailers
        _silent_bytes = 0  # since the parser told of anything
        _limit: asyncio.TimerHandle | None = None
        _answering: RequestResponseCycle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(_Gathering(transport, self.loop))  # type: ignore[arg-type]
            self._end_after(head_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_after(None)
            super().connection_lost(exc)
            # uvicorn tells the request that came last. The one that is answered may be another, if several were sent
            # without waiting; it would be answered to its end, for nobody.
            if self._answering is not None and not self._answering.response_complete:
                self._answering.disconnected = True
                self._answering.message_event.set()

        def data_received(self, data: bytes) -> None:
            self._silent_bytes += len(data)
            super().data_received(data)
            # A header or a chunk's extension that never ends stays in the parser, which tells of whole ones only.
            if self._silent_bytes > HEAD_LIMIT_BYTES and not self.transport.is_closing():
                self.send_400_response("Request headers are too large.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._silent_bytes = self._head_bytes = 0
            self._end_after(head_s)

        def on_url(self, url: bytes) -> None:
            self._count(len(url))
            super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            self._count(len(name) + len(value))
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._silent_bytes = 0
            self._end_after(message_s)
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._silent_bytes = 0
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._silent_bytes = 0
            self._end_after(None)
            super().on_message_complete()

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
            self._answering = cycle
            super()._start_asgi_task(cycle, app)

        def _count(self, size_bytes: int) -> None:
            self._silent_bytes = 0
            self._head_bytes += size_bytes
            if self._head_bytes > HEAD_LIMIT_BYTES:
                raise ValueError("the headers are too large")  # for the parser, and uvicorn answers 400

        def _end_after(self, limit_s: float | None) -> None:
            if self._limit is not None:
                self._limit.cancel()
            self._limit = None if limit_s is None else self.loop.call_later(limit_s, self._end)

        def _end(self) -> None:
            if not self.transport.is_closing():
                self.transport.abort()

    return Connection

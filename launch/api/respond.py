"""Between the engine's tokens and the client: an answer that has begun, its events on the wire, the body that came.

Watches the client: when it goes away, the work for it is cancelled. Does not know what an answer looks like.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from json.encoder import encode_basestring
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...parallel.engine.request import Token
from .depth import check_depth
from .errors import ApiError

T = TypeVar("T")
INLINE_BYTES = 16 << 10  # what takes longer to look through is looked through in a thread
_LOG = logging.getLogger(__name__)
# Made once: json.dumps makes an encoder for each event, which takes longer than encoding it.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_MARK = secrets.token_hex(16)  # a text that nobody says


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


class Begun:
    """A stream of tokens that is under way before anybody reads it. on_close: called once it is closed.

    Closing it closes the stream below in any case; a generator that never began would not. first: its first token, or
    what it raises in its place.
    """

    def __init__(self, tokens: AsyncGenerator[Token], on_close: Callable[[], None]) -> None:
        self._tokens = tokens
        self._on_close = on_close
        self.first = asyncio.ensure_future(_next(tokens))

    async def wait(self, limit_s: float | None) -> None:
        """For the first token, at most limit_s. Raises what the stream raises in its place."""
        await first_of([self], limit_s)

    async def tokens(self) -> AsyncGenerator[Token]:
        yield await self.first
        async for token in self._tokens:
            yield token

    async def aclose(self) -> None:
        self.first.cancel()
        await asyncio.gather(self.first, return_exceptions=True)
        await self._tokens.aclose()
        self._on_close()


async def first_of(several: Sequence[Begun], limit_s: float | None) -> None:
    """Waits for the first token of any of them, at most limit_s. Raises what one raises in its place."""
    done, _ = await asyncio.wait({one.first for one in several}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    for first in done:
        first.result()


class EventStream(Response):
    """Server-sent events. What goes wrong while they come is the last one; no `done` follows.

    events: made by `event` or a TextEvent. done: what follows the last one, None for nothing. explain: an error as the
    client may see it. close: called at the end, whatever it is. quiet_s: after so long without an event comes a
    comment, which clients skip.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        explain: Callable[[Exception], ApiError],
        close: Callable[[], Awaitable[None]],
        quiet_s: float,
        done: str | None = "[DONE]",
    ) -> None:
        # X-Accel-Buffering: nginx would otherwise collect events before it passes them on.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._explain = explain
        self._close = close
        self._quiet_s = quiet_s
        self._done = done
        self._last_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except ClientGoneError:
            pass
        finally:
            await self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._last_s = time.monotonic()
        commenting = asyncio.create_task(self._comment(send))
        try:
            async with aclosing(self._events):
                async for one in self._events:
                    await send({"type": "http.response.body", "body": one, "more_body": True})
                    self._last_s = time.monotonic()
            last = b"" if self._done is None else _event(self._done)
        except Exception as error:
            if self._explain(error).status == 500:
                _LOG.exception("an answer was cut short")
            last = event(self._explain(error).body())
        finally:
            commenting.cancel()
            await asyncio.gather(commenting, return_exceptions=True)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _comment(self, send: Send) -> None:
        while True:
            left_s = self._last_s + self._quiet_s - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
                continue
            self._last_s = time.monotonic()
            await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event. The object's "type", if it has one, is the event's name, too."""
    return _event(_encode(data), data.get("type"))


class TextEvent:
    """Makes events that are alike but for one text, as most of a stream are: what is around it is encoded once.

    make: the object of an event with this text.
    """

    def __init__(self, make: Callable[[str], Mapping[str, Any]]) -> None:
        self._around = event(make(_MARK)).split(encode_basestring(_MARK).encode())

    def __call__(self, text: str) -> bytes:
        return encode_basestring(text).encode().join(self._around)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; cancels it and raises ClientGoneError as soon as the client disconnects.

    receive: of a request whose body has been read, so that only the disconnect is still to come.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The body, counted while it comes in. Raises ApiError 413 beyond the limit, ClientGoneError."""
    body = bytearray()
    size_bytes = 0
    try:
        async for part in request.stream():
            size_bytes += len(part)
            if size_bytes <= limit_bytes:
                body += part
            elif size_bytes > 2 * limit_bytes:
                break  # until here it was read and dropped: most clients send everything before they read an answer
    except ClientDisconnect:
        raise ClientGoneError from None
    if size_bytes > limit_bytes:
        raise ApiError(413, f"the body is larger than {limit_bytes:,} bytes", code="body_too_large")
    whole = bytes(body)
    if size_bytes > INLINE_BYTES:
        await asyncio.to_thread(check_depth, whole)
    else:
        check_depth(whole)
    return whole


async def _next(tokens: AsyncGenerator[Token]) -> Token:
    return await anext(tokens)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(data: str, name: str | None = None) -> bytes:
    named = "" if name is None else f"event: {name}\n"
    return f"{named}data: {data}\n\n".encode()

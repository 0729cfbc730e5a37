"""Pieces of an answer -> the JSON of a chat completion, whole or as server-sent events.

Also watches the client: when it goes away, the work for it is cancelled. Does not know how pieces come about.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...parallel.engine.request import Token
from .answer import Arguments, Call, Content, End, Piece, Reasoning
from .depth import check_depth
from .errors import ApiError

T = TypeVar("T")
INLINE_BYTES = 16 << 10  # what takes longer to look through is looked through in a thread
_LOG = logging.getLogger(__name__)
# Made once: json.dumps makes an encoder for each event, which takes longer than encoding it.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


@dataclass(frozen=True)
class Completion:
    """What all parts of one answer share."""

    id: str
    model: str
    created: int  # Unix time, s
    prompt_tokens: int

    def usage(self, end: End) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": end.completion_tokens,
            "total_tokens": self.prompt_tokens + end.completion_tokens,
            "completion_tokens_details": {"reasoning_tokens": end.reasoning_tokens},
        }

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def new_completion(request_id: str, model: str, prompt_tokens: int) -> Completion:
    return Completion(f"chatcmpl-{request_id}", model, int(time.time()), prompt_tokens)


async def whole(completion: Completion, pieces: AsyncGenerator[Piece]) -> dict[str, Any]:
    """The answer as one object."""
    said: dict[type, str] = {Reasoning: "", Content: ""}
    calls: list[dict[str, Any]] = []
    async with aclosing(pieces):
        async for piece in pieces:
            match piece:
                case Call():
                    calls.append(_call(piece) | {"function": {"name": piece.name, "arguments": ""}})
                case Arguments():
                    calls[piece.index]["function"]["arguments"] += piece.text
                case End():
                    message: dict[str, Any] = {"role": "assistant", "content": said[Content] or (None if calls else "")}
                    message |= _reasoning(said[Reasoning] or None) | ({"tool_calls": calls} if calls else {})
                    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": piece.finish_reason}
                    return completion.head("chat.completion") | {"choices": [choice], "usage": completion.usage(piece)}
                case _:
                    said[type(piece)] += piece.text
    raise AssertionError("an answer ends with an End")


async def chunks(
    completion: Completion, pieces: AsyncGenerator[Piece], include_usage: bool
) -> AsyncGenerator[dict[str, Any]]:
    """The answer as chunk objects, each as soon as its piece is there."""

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        body = completion.head("chat.completion.chunk") | {"choices": [choice]}
        return body | ({"usage": None} if include_usage else {})

    async with aclosing(pieces):
        yield chunk({"role": "assistant", "content": ""})
        async for piece in pieces:
            if not isinstance(piece, End):
                yield chunk(_delta(piece))
                continue
            yield chunk({}, piece.finish_reason)
            if include_usage:
                usage = {"choices": [], "usage": completion.usage(piece)}
                yield completion.head("chat.completion.chunk") | usage


class Begun:
    """A stream of tokens that is under way before anybody reads it. on_close: called once it is closed.

    Closing it closes the stream below in any case; a generator that never began would not.
    """

    def __init__(self, tokens: AsyncGenerator[Token], on_close: Callable[[], None]) -> None:
        self._tokens = tokens
        self._on_close = on_close
        self._first = asyncio.ensure_future(_next(tokens))

    async def wait(self, limit_s: float | None) -> None:
        """For the first token, at most limit_s. Raises what the stream raises in its place."""
        await asyncio.wait({self._first}, timeout=limit_s)
        if self._first.done():
            self._first.result()

    async def tokens(self) -> AsyncGenerator[Token]:
        yield await self._first
        async for token in self._tokens:
            yield token

    async def aclose(self) -> None:
        self._first.cancel()
        await asyncio.gather(self._first, return_exceptions=True)
        await self._tokens.aclose()
        self._on_close()


class EventStream(Response):
    """Server-sent events from chunk objects. What goes wrong while they come is the last event; no [DONE] follows.

    explain: an error as the client may see it. close: called at the end, whatever it is. quiet_s: after so long without
    an event comes a comment, which clients skip.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[dict[str, Any]],
        explain: Callable[[Exception], ApiError],
        close: Callable[[], Awaitable[None]],
        quiet_s: float,
    ) -> None:
        # X-Accel-Buffering: nginx would otherwise collect events before it passes them on.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._explain = explain
        self._close = close
        self._quiet_s = quiet_s
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
                async for event in self._events:
                    await send(_event(_encode(event)))
                    self._last_s = time.monotonic()
            last = "[DONE]"
        except Exception as error:
            if self._explain(error).status == 500:
                _LOG.exception("an answer was cut short")
            last = json.dumps(self._explain(error).body())
        finally:
            commenting.cancel()
            await asyncio.gather(commenting, return_exceptions=True)
        await send(_event(last) | {"more_body": False})

    async def _comment(self, send: Send) -> None:
        while True:
            left_s = self._last_s + self._quiet_s - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
                continue
            self._last_s = time.monotonic()
            await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})


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


def _event(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}


def _delta(piece: Reasoning | Content | Call | Arguments) -> dict[str, Any]:
    match piece:
        case Reasoning():
            return _reasoning(piece.text)
        case Content():
            return {"content": piece.text}
        case Call():
            function = {"name": piece.name, "arguments": ""}
            return {"tool_calls": [{"index": piece.index} | _call(piece) | {"function": function}]}
        case Arguments():
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}


def _reasoning(text: str | None) -> dict[str, Any]:
    """Clients know it under one name or the other (vLLM: reasoning; SGLang, llama.cpp: reasoning_content)."""
    return {"reasoning_content": text, "reasoning": text}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function"}

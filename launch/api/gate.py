"""Who comes in, and how many at once: keys, their limits, and the limit for everyone, before a route sees a request.

Plain ASGI, so that streams and disconnects pass through untouched. What is refused is answered here, in OpenAI's error
shape. Paths are closed unless they are OPEN, so that a new route needs a key without being told. Knows no route.
"""

import asyncio
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..keys import Key, find_key
from .errors import ApiError

OPEN = frozenset({"/", "/health", "/ready", "/metrics", "/version", "/openapi.json"})
KEY_NAME = "gptoss_launch.key"  # in the scope: the name of the key that let it in
MOST_BODY_BYTES = 1 << 30  # of all requests under way: a thousand contexts of 128k tokens as text, and not 32 GiB
ENTER_PER_TURN = 8  # requests that begin in one turn of the event loop; one takes about 0.3 ms of it


class Gate:
    """keys: none lets everyone in. most, most_body_bytes: requests under way and what they have sent, over all keys; on
    closed paths only."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[Key],
        most: int,
        clock_s: Callable[[], float] = time.monotonic,
        most_body_bytes: int = MOST_BODY_BYTES,
    ) -> None:
        self._app = app
        self._keys = tuple(keys)
        self._most = most
        self._rates = {key.name: _Rate(key.per_minute, clock_s) for key in keys if key.per_minute is not None}
        self._running: Counter[str] = Counter()  # by key; "" without one
        self._most_body_bytes = most_body_bytes
        self._body_bytes = 0
        self._turnstile = _Turnstile(ENTER_PER_TURN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        try:
            name = self._enter(scope)
        except ApiError as error:
            await answer_error(error, send)
            return
        sent_bytes = 0

        async def counted() -> Message:
            nonlocal sent_bytes
            message = await receive()
            part_bytes = len(message.get("body", b""))
            if self._body_bytes + part_bytes > self._most_body_bytes:
                raise _too_many("the bodies of the requests under way are as large as they may be: try again later", 1)
            self._body_bytes += part_bytes
            sent_bytes += part_bytes
            return message

        self._running[name] += 1
        try:
            await self._turnstile.enter()
            await self._app(scope, counted, send)
        finally:
            self._running[name] -= 1
            self._body_bytes -= sent_bytes

    def _enter(self, scope: Scope) -> str:
        """The name of the key. Raises ApiError 401 or 429."""
        name = ""
        if self._keys:
            key = find_key(self._keys, _given(scope))
            if key is None:
                message = "wrong or missing API key: send it as Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key")
            name = scope[KEY_NAME] = key.name
            if key.at_once is not None and self._running[name] >= key.at_once:
                raise _too_many(f"{key.at_once} requests of this key are under way, as many as it may have", 1)
        if self._running.total() >= self._most:
            raise _too_many(f"{self._most} requests are under way: try again later", 1)
        # Last: a request that is refused for another reason does not count.
        if name in self._rates and (wait_s := self._rates[name].take()) > 0:
            raise _too_many("more requests a minute than this key may send", math.ceil(wait_s))
        return name


async def answer_error(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = error.headers() | {"content-type": "application/json", "content-length": str(len(body))}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _given(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, given = value.partition(b" ")
            return given.strip() if scheme.lower() == b"bearer" else b""
    return b""


def _too_many(message: str, retry_after_s: int) -> ApiError:
    return ApiError(429, message, code="too_many_requests", retry_after_s=retry_after_s)


class _Rate:
    """A bucket that holds a minute's requests, or one if that is more, and fills evenly."""

    def __init__(self, per_minute: float, clock_s: Callable[[], float]) -> None:
        self._per_s = per_minute / 60
        self._most = max(per_minute, 1.0)
        self._left = self._most
        self._clock_s = clock_s
        self._seen_s = clock_s()

    def take(self) -> float:
        """0 and one less, or the seconds until there is one."""
        now_s = self._clock_s()
        self._left = min(self._left + (now_s - self._seen_s) * self._per_s, self._most)
        self._seen_s = now_s
        if self._left < 1:
            return (1 - self._left) / self._per_s
        self._left -= 1
        return 0.0


class _Turnstile:
    """Lets in `most` a turn of the event loop, in the order they came: five hundred that arrive together must not hold
    up the streams that run."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._left = most
        self._turning = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        if not self._turning:
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)
        if self._left > 0 and not self._waiting:
            self._left -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _turn(self) -> None:
        self._left = self._most
        while self._left and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # its client has not left
                turn.set_result(None)
                self._left -= 1
        self._turning = bool(self._waiting) or self._left < self._most
        if self._turning:
            asyncio.get_running_loop().call_soon(self._turn)

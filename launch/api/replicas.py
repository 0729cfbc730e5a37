"""All replicas as one: a request goes to one of them, and to another if that one dies before it has answered.

Sees a replica only as `generate(Request) -> stream of Token`. Knows nothing of HTTP but the errors it gives back.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from ...parallel.engine.request import Request, Token
from ..dispatch import Dispatch
from ..engine_client import EngineDiedError
from .errors import ApiError, replica_died
from .metrics import Metrics, Replica, Watch

REQUEST_LIMIT = 1024  # of one replica, running and waiting; more are told to come back
MOST_MOVES = 2  # a request that has seen so many replicas die may be the reason


class Engine(Protocol):
    """One replica (`engine_client.EngineClient`)."""

    @property
    def ready(self) -> bool: ...
    @property
    def dead(self) -> bool: ...
    @property
    def restarts(self) -> int: ...
    @property
    def running(self) -> int: ...
    def generate(self, request: Request) -> AsyncGenerator[Token]: ...


class Replicas:
    """The replicas of one server. Use it from one event loop."""

    def __init__(self, engines: Sequence[Engine], dispatch: Dispatch, metrics: Metrics) -> None:
        self._engines = engines
        self._dispatch = dispatch
        self._metrics = metrics

    @property
    def count(self) -> int:
        return len(self._engines)

    @property
    def ready(self) -> int:
        """How many can answer."""
        return sum(engine.ready for engine in self._engines)

    @property
    def dead(self) -> int:
        """How many could and cannot now: they are restarted, or left out."""
        return sum(engine.dead for engine in self._engines)

    def metrics_text(self) -> bytes:
        return self._metrics.text([Replica(engine.ready, engine.restarts) for engine in self._engines])

    def watch(self, request: Request) -> Watch:
        return self._metrics.watch(len(request.prompt_tokens))

    async def generate(self, request: Request, blocks: Sequence[int], watch: Watch) -> AsyncGenerator[Token]:
        """The tokens of one request. Close it to cancel the request. blocks: `dispatch.prompt_blocks` of its prompt.

        A request whose replica dies before its first token moves to another, MOST_MOVES times at most: nobody has
        seen any of it, and its seed is its own, so nothing shows. Raises ApiError when no replica can take it,
        EngineDiedError when it is lost, UserError when it is refused.
        """
        begun_s = time.monotonic()
        try:
            for moves in range(MOST_MOVES + 1):
                replica = self.choose(blocks)
                self._dispatch.remember(replica, blocks)
                watch.sent(replica)
                seen = False
                try:
                    async with aclosing(self._engines[replica].generate(_left(request, begun_s))) as tokens:
                        async for token in tokens:
                            seen = True
                            watch.token(token)
                            yield token
                    return
                except EngineDiedError:
                    if seen or moves == MOST_MOVES or not self.ready:
                        raise
        except Exception:
            watch.end("error")
            raise

    def choose(self, blocks: Sequence[int]) -> int:
        """Raises ApiError 503 if none is ready, 429 if all have as many requests as they may."""
        running = {replica: engine.running for replica, engine in enumerate(self._engines) if engine.ready}
        if not running and self.dead:
            raise replica_died("no replica is left that could answer now")
        if not running:
            message = "the model is still loading; /ready says when it can answer"
            raise ApiError(503, message, code="not_ready", retry_after_s=5)
        able = {replica: count for replica, count in running.items() if count < REQUEST_LIMIT}
        if not able:
            message = f"{sum(running.values())} requests run or wait already: try again later"
            raise ApiError(429, message, code="too_many_requests", retry_after_s=1)
        return self._dispatch.choose(blocks, able)


def _left(request: Request, begun_s: float) -> Request:
    """The request as another replica must see it: with what is left of its time."""
    if request.deadline_s is None:
        return request
    return replace(request, deadline_s=max(request.deadline_s - (time.monotonic() - begun_s), 0.0))

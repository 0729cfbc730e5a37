"""The whole of what listens: routes, behind the gate, behind what is written down.

    Record            request id, access log, spans
      CORS            only for the origins that were named
        Gate          keys, limits, a turnstile
          routes      app.py and page.py

Knows no route and no engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from ..keys import Key
from .gate import MOST_BODY_BYTES, Gate
from .record import Record


@dataclass(frozen=True)
class Front:
    """keys: none lets everyone in. cors_origins: of pages elsewhere whose scripts may call; ("*",) is all of them.
    most, most_body_bytes: of requests under way. log, count, tracer: of `record.Record`."""

    keys: Sequence[Key] = ()
    cors_origins: Sequence[str] = ()
    most: int = 1024
    most_body_bytes: int = MOST_BODY_BYTES
    log: Callable[[str], None] | None = None
    count: Callable[[str, str, int], None] = lambda route, method, status: None
    tracer: Any = None


def open_front(routes: ASGIApp, front: Front) -> ASGIApp:
    app: ASGIApp = Gate(routes, front.keys, front.most, most_body_bytes=front.most_body_bytes)
    if front.cors_origins:
        # No credentials: a key is sent by the script itself, and cookies mean nothing here.
        app = CORSMiddleware(
            app,
            allow_origins=front.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    return Record(app, front.log, front.count, front.tracer)

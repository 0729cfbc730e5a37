"""What is written down of every HTTP request: a line in the access log, a count, and a span for OpenTelemetry.

Never what was said: no body, no query, no header but the request's id, no key but its name. Gives each request its
X-Request-Id, the client's own if that is harmless to write down. Plain ASGI. Knows no route.
"""

import json
import logging
import logging.handlers
import re
import secrets
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .gate import KEY_NAME

REQUEST_ID = "gptoss_launch.request_id"  # in the scope
_HARMLESS = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_MOST_PATH = 200  # characters of a path that are written down


class Record:
    """log: called with the line; None writes none. count: called with route, method and status; the route is the app's
    ("/v1/models/{name:path}"), "" for paths that are none. tracer: OpenTelemetry's; None makes no spans."""

    def __init__(
        self,
        app: ASGIApp,
        log: Callable[[str], None] | None,
        count: Callable[[str, str, int], None],
        tracer: Any = None,
    ) -> None:
        self._app = app
        self._log = log
        self._count = count
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun_s, request_id = time.monotonic(), _request_id(scope)
        scope[REQUEST_ID] = request_id
        raw_id = request_id.encode()
        status, first_s, sent_bytes, whole = 0, 0.0, 0, False
        span = None if self._tracer is None else _begin_span(self._tracer, scope, request_id)

        async def noted(message: Message) -> None:
            nonlocal status, first_s, sent_bytes, whole
            if message["type"] == "http.response.start":
                status, first_s = message["status"], time.monotonic()
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", raw_id)]}
            else:
                sent_bytes += len(message.get("body", b""))
                whole = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = status or 500
            raise
        finally:
            # An answer that nobody waited for has no status, or lacks its end.
            status = status or 499
            self._count(_route(scope), scope["method"], status)
            ended_s = time.monotonic()
            if span is not None:
                span.set_attribute("http.response.status_code", status)
                span.set_attribute("http.route", _route(scope))
                span.set_attribute("gptoss.answer_whole", whole)
                span.end()
            if self._log is not None:
                client = scope.get("client")
                line = {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "request_id": request_id,
                    "client": client[0] if client else None,
                    "key": scope.get(KEY_NAME),
                    "method": scope["method"],
                    "path": scope["path"][:_MOST_PATH],
                    "status": status,
                    "whole": whole,
                    "first_byte_s": round(first_s - begun_s, 6) if first_s else None,
                    "duration_s": round(ended_s - begun_s, 6),
                    "sent_bytes": sent_bytes,
                }
                self._log(json.dumps(line))


class AccessLog:
    """Takes lines for a file, or for stderr if it is "-". The file may be moved away at any time; a new one is begun.

    Raises OSError if it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._handler = logging.StreamHandler(sys.stderr) if path == "-" else logging.handlers.WatchedFileHandler(path)
        self._handler.setFormatter(logging.Formatter("%(message)s"))

    def __call__(self, line: str) -> None:
        self._handler.handle(logging.LogRecord("access", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        self._handler.close()


def make_tracer(endpoint: str) -> Any:
    """A tracer whose spans go to `endpoint` by OTLP over HTTP. Raises ImportError where that is not installed."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # type: ignore[import-not-found]
    from opentelemetry.sdk.resources import Resource  # type: ignore[import-not-found]
    from opentelemetry.sdk.trace import TracerProvider  # type: ignore[import-not-found]
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # type: ignore[import-not-found]

    # A provider of its own, not the process's: other libraries make spans nobody asked for.
    provider = TracerProvider(resource=Resource.create({"service.name": "gptoss-launch"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider.get_tracer("gptoss_launch")


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _HARMLESS.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", ""))


def _begin_span(tracer: Any, scope: Scope, request_id: str) -> Any:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return tracer.start_span(
        f"{scope['method']}",
        context=TraceContextTextMapPropagator().extract(headers),  # the caller's trace goes on
        kind=SpanKind.SERVER,
        attributes={
            "http.request.method": scope["method"],
            "url.path": scope["path"][:_MOST_PATH],
            "gptoss.request_id": request_id,
        },
    )

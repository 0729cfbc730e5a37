"""The routes.

    /health                    200 while every replica that came up is alive, 503 while one is dead
    /ready                     503 until every replica answers
    /metrics                   figures for Prometheus
    /version                   ours
    /tokenize, /detokenize     text and conversations to token ids, and back
    /v1/models                 the one model
    /v1/chat/completions       chat, whole or streamed
    /v1/completions            text or token ids that go on, whole or streamed
    /v1/responses/...          chat in the words of the Responses API (`responses`)

Sees the engine only as `generate(Request) -> stream of Token`.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..version import own_version
from .chat_completions import chat_job
from .completions import completion_job, parse_completion_request
from .errors import ApiError, explain
from .generation import answer
from .respond import ClientGoneError, read_body
from .responses import responses_routes
from .schema import parse_chat_request
from .served import Served
from .tokens import detokenize, tokenize


def create_app(served: Served) -> FastAPI:
    # The pages about the API fetch scripts from the network: not offered.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _answer_errors(app)

    @app.get("/health")
    async def health() -> Response:
        dead, everyone = served.replicas.dead, served.replicas.count
        return JSONResponse({"ok": not dead, "dead_replicas": dead, "replicas": everyone}, 503 if dead else 200)

    @app.get("/ready")
    async def ready() -> Response:
        count, everyone = served.replicas.ready, served.replicas.count
        return JSONResponse({"ready_replicas": count, "replicas": everyone}, 200 if count == everyone else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.replicas.metrics_text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version_route() -> dict[str, Any]:
        return {"version": own_version()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        served.check_model(name)
        return _model(served)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: HttpRequest) -> Response:
        return await answer(http, served, parse_chat_request, chat_job)

    @app.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        return await answer(http, served, parse_completion_request, completion_job)

    @app.post("/tokenize")
    async def tokenize_route(http: HttpRequest) -> Response:
        return await _told(http, served, tokenize)

    @app.post("/detokenize")
    async def detokenize_route(http: HttpRequest) -> Response:
        return await _told(http, served, detokenize)

    app.include_router(responses_routes(served))
    return app


async def _told(http: HttpRequest, served: Served, tell: Callable[[bytes, Served], dict[str, Any]]) -> Response:
    """What is known without an engine; in a thread, as a body may be long."""
    try:
        body = await read_body(http, served.body_limit_bytes)
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it
    return await asyncio.to_thread(lambda: JSONResponse(tell(body, served)))


def _answer_errors(app: FastAPI) -> None:
    """Every error takes the one shape, unknown routes and our own mistakes included."""

    @app.exception_handler(ApiError)
    async def ours(request: HttpRequest, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def mistake(request: HttpRequest, error: Exception) -> Response:
        return JSONResponse(explain(error).body(), 500)


def _model(served: Served) -> dict[str, Any]:
    about = {"id": served.name, "object": "model", "created": served.started, "owned_by": "gptoss-launch"}
    return about | {"max_model_len": served.context_tokens}

"""The routes. A request becomes tokens, goes to a replica, and comes back as an OpenAI chat completion.

    /health                 200 while every replica that came up is alive, 503 while one is dead
    /ready                  503 until every replica answers
    /metrics                figures for Prometheus
    /v1/models              the one model
    /v1/chat/completions    chat, whole or streamed

Sees the engine only as `generate(Request) -> stream of Token`.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ...parallel.engine.request import Request, Sampling, Token
from ...parallel.errors import UserError
from ..dispatch import prompt_blocks
from ..engine_client import EngineDiedError
from ..harmony import StreamParser, render, stop_tokens
from ..tokenizer import Tokenizer
from .answer import Piece, read_answer
from .chat import conversation
from .errors import ApiError, replica_died
from .metrics import Watch
from .replicas import Replicas
from .respond import Begun, ClientGoneError, EventStream, chunks, new_completion, read_body, unless_gone, whole
from .schema import ChatRequest, parse_chat_request

BODY_LIMIT_BYTES = 32 << 20
QUIET_S = 10.0  # a stream with nothing to say for so long says that it waits: proxies cut what is silent


@dataclass(frozen=True)
class Served:
    """What is served, and how. Who may come in is `gate`'s business."""

    name: str
    context_tokens: int
    tokenizer: Tokenizer
    replicas: Replicas
    body_limit_bytes: int = BODY_LIMIT_BYTES
    quiet_s: float = QUIET_S
    started: int = field(default_factory=lambda: int(time.time()))  # Unix time, s


def create_app(served: Served) -> FastAPI:
    # The pages about the API fetch scripts from the network: not offered.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _answer_errors(app)

    v1 = APIRouter(prefix="/v1")

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

    @v1.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served)]}

    @v1.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(served, name)
        return _model(served)

    @v1.post("/chat/completions")
    async def chat_completions(http: HttpRequest) -> Response:
        try:
            body = await read_body(http, served.body_limit_bytes)
            # In a thread, like the tokens below: a long prompt would hold up the streams of everyone else.
            chat = await asyncio.to_thread(parse_chat_request, body)
            _check_model(served, chat.model)
            served.replicas.choose(())  # what nobody could take is refused before anything is made of it
            request, blocks = await asyncio.to_thread(_rendered, chat, served)
            completion = new_completion(request.id, served.name, len(request.prompt_tokens))
            watch = served.replicas.watch(request)
            begun = Begun(served.replicas.generate(request, blocks, watch), lambda: watch.end("abort"))
            async with AsyncExitStack() as stack:
                stack.push_async_callback(begun.aclose)
                # The status line waits for the first token, so that a request which the engine refuses is no 200; that
                # of a stream no longer than a proxy would wait.
                await unless_gone(http.receive, begun.wait(served.quiet_s if chat.stream else None))
                pieces = _pieces(begun.tokens(), chat, served.tokenizer, watch)
                if not chat.stream:
                    return JSONResponse(await unless_gone(http.receive, whole(completion, pieces)))
                stack.pop_all()  # the stream closes it
                include_usage = chat.stream_options is not None and chat.stream_options.include_usage
                return EventStream(chunks(completion, pieces, include_usage), explain, begun.aclose, served.quiet_s)
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads it
        except (EngineDiedError, UserError) as error:
            raise explain(error) from None

    app.include_router(v1)
    return app


def engine_request(chat: ChatRequest, served: Served) -> Request:
    """Raises ApiError 400 if prompt and answer cannot fit into the context."""
    tools = [] if chat.tool_choice == "none" else chat.tools or []
    talk = conversation(chat.messages, tools, chat.reasoning_effort, date.today())
    prompt = tuple(render(talk, served.tokenizer))
    left = served.context_tokens - len(prompt)
    asked = chat.max_completion_tokens or chat.max_tokens
    if left < 1:
        message = f"the prompt is {len(prompt)} tokens; the context of {served.context_tokens} leaves no room to answer"
        raise ApiError(400, message, "messages", "context_length_exceeded")
    if asked is not None and asked > left:
        param = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        numbers = f"{len(prompt)} prompt tokens + {asked} is more than the context of {served.context_tokens}"
        raise ApiError(400, f"{param}: {numbers}", param, "context_length_exceeded")
    sampling = Sampling(
        temperature=1.0 if chat.temperature is None else chat.temperature,
        top_p=1.0 if chat.top_p is None else chat.top_p,
        seed=secrets.randbits(63) if chat.seed is None else chat.seed,
    )
    stops = stop_tokens(served.tokenizer)
    return Request(secrets.token_hex(12), prompt, asked or left, sampling, stops, deadline_s=chat.deadline_s)


def explain(error: Exception) -> ApiError:
    """What a client is told of an error in the engine or on the way to it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDiedError):
        return replica_died(f"{error}; this request is lost")
    if isinstance(error, UserError):
        return ApiError(400, error.message, code="refused_by_engine")
    return ApiError(500, "internal error; the server's log has more")


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


def _rendered(chat: ChatRequest, served: Served) -> tuple[Request, tuple[int, ...]]:
    request = engine_request(chat, served)
    return request, prompt_blocks(request.prompt_tokens)


def _pieces(
    tokens: AsyncGenerator[Token], chat: ChatRequest, tokenizer: Tokenizer, watch: Watch
) -> AsyncGenerator[Piece]:
    functions = [] if chat.tool_choice == "none" else [tool.function.name for tool in chat.tools or []]
    parser = StreamParser(tokenizer, on_repair=watch.repaired)
    return read_answer(tokens, parser, chat.stops, functions, lambda: watch.end("stop"))


def _check_model(served: Served, name: str) -> None:
    if name != served.name:
        raise ApiError(404, f"no model {name!r} here, only {served.name!r}", "model", "model_not_found")


def _model(served: Served) -> dict[str, Any]:
    about = {"id": served.name, "object": "model", "created": served.started, "owned_by": "gptoss-launch"}
    return about | {"max_model_len": served.context_tokens}

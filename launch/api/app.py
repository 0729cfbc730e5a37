"""The routes. A request becomes tokens, goes to a replica, and comes back as an OpenAI chat completion.

    /health                 200 while every replica that came up is alive, 503 after one died
    /ready                  503 until every replica answers
    /v1/models              the one model
    /v1/chat/completions    chat, whole or streamed

Sees the engine only as `generate(Request) -> stream of Token`.
"""

import asyncio
import hmac
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Protocol

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ...parallel.engine.request import Request, Sampling, Token
from ...parallel.errors import UserError
from ..engine_client import EngineDiedError
from ..harmony import StreamParser, render, stop_tokens
from ..tokenizer import Tokenizer
from .answer import Piece, read_answer
from .chat import conversation
from .errors import ApiError, engine_died
from .respond import ClientGoneError, EventStream, chunks, new_completion, read_body, unless_gone, whole
from .schema import ChatRequest, parse_chat_request

BODY_LIMIT_BYTES = 32 << 20
REQUEST_LIMIT = 1024  # of one replica, running and waiting; more are told to come back


class Engine(Protocol):
    """What the routes need of a replica (`engine_client.EngineClient`)."""

    @property
    def ready(self) -> bool: ...
    @property
    def dead(self) -> bool: ...
    @property
    def running(self) -> int: ...
    def generate(self, request: Request) -> AsyncGenerator[Token]: ...


@dataclass(frozen=True)
class Served:
    """What is served, and how. api_key: None lets everyone in."""

    name: str
    context_tokens: int
    tokenizer: Tokenizer
    engines: Sequence[Engine]
    api_key: bytes | None = None
    body_limit_bytes: int = BODY_LIMIT_BYTES
    started: int = field(default_factory=lambda: int(time.time()))  # Unix time, s


def create_app(served: Served) -> FastAPI:
    # The pages about the API fetch scripts from the network: not offered.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _answer_errors(app)

    async def check_key(request: HttpRequest) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        wanted = served.api_key
        if wanted is not None and not (scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), wanted)):
            message = "wrong or missing API key: send it as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")

    v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])

    @app.get("/health")
    async def health() -> Response:
        dead = sum(engine.dead for engine in served.engines)
        return JSONResponse({"ok": not dead, "dead_replicas": dead}, 503 if dead else 200)

    @app.get("/ready")
    async def ready() -> Response:
        count = sum(engine.ready for engine in served.engines)
        everyone = len(served.engines)
        return JSONResponse({"ready_replicas": count, "replicas": everyone}, 200 if count == everyone else 503)

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
            engine = _choose(served.engines)
            request = await asyncio.to_thread(engine_request, chat, served)
            completion = new_completion(request.id, served.name, len(request.prompt_tokens))
            tokens = engine.generate(request)
            # The status line waits for the first token, so that a request which the engine refuses is no 200.
            first = await unless_gone(http.receive, _next(tokens))
            pieces = _pieces(_after(first, tokens), chat, served.tokenizer)
            if chat.stream:
                include_usage = chat.stream_options is not None and chat.stream_options.include_usage
                return EventStream(chunks(completion, pieces, include_usage), explain, tokens)
            async with aclosing(tokens):
                return JSONResponse(await unless_gone(http.receive, whole(completion, pieces)))
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
    return Request(secrets.token_hex(12), prompt, asked or left, sampling, stop_tokens(served.tokenizer))


def explain(error: Exception) -> ApiError:
    """What a client is told of an error in the engine or on the way to it."""
    if isinstance(error, EngineDiedError):
        return engine_died(str(error))
    if isinstance(error, UserError):
        return ApiError(400, error.message, code="refused_by_engine")
    return ApiError(500, "internal error; the server's log has more")


def _answer_errors(app: FastAPI) -> None:
    """Every error takes the one shape, unknown routes and our own mistakes included."""

    @app.exception_handler(ApiError)
    async def ours(request: HttpRequest, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def mistake(request: HttpRequest, error: Exception) -> Response:
        return JSONResponse(explain(error).body(), 500)


def _pieces(tokens: AsyncGenerator[Token], chat: ChatRequest, tokenizer: Tokenizer) -> AsyncGenerator[Piece]:
    functions = [] if chat.tool_choice == "none" else [tool.function.name for tool in chat.tools or []]
    return read_answer(tokens, StreamParser(tokenizer), chat.stops, functions)


async def _next(tokens: AsyncGenerator[Token]) -> Token:
    return await anext(tokens)


async def _after(first: Token, rest: AsyncGenerator[Token]) -> AsyncGenerator[Token]:
    yield first
    async for token in rest:
        yield token


def _choose(engines: Sequence[Engine]) -> Engine:
    """The least busy replica."""
    able = [engine for engine in engines if engine.ready]
    if able:
        engine = min(able, key=lambda engine: engine.running)
        if engine.running >= REQUEST_LIMIT:
            raise ApiError(
                429, f"{engine.running} requests run or wait already: try again later", code="too_many_requests"
            )
        return engine
    if any(engine.dead for engine in engines):
        raise engine_died("the engine died")
    raise ApiError(503, "the model is still loading; /ready says when it can answer", code="not_ready")


def _check_model(served: Served, name: str) -> None:
    if name != served.name:
        raise ApiError(404, f"no model {name!r} here, only {served.name!r}", "model", "model_not_found")


def _model(served: Served) -> dict[str, Any]:
    about = {"id": served.name, "object": "model", "created": served.started, "owned_by": "gptoss-launch"}
    return about | {"max_model_len": served.context_tokens}

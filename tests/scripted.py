"""The HTTP application in this process, with an engine that says what it is told to."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import httpx
import uvicorn
from gptoss_launch.launch.api.app import Served, create_app
from gptoss_launch.launch.api.front import Front, open_front
from gptoss_launch.launch.api.metrics import Metrics
from gptoss_launch.launch.api.openapi import add_openapi
from gptoss_launch.launch.api.page import page_routes
from gptoss_launch.launch.api.protocol import connection
from gptoss_launch.launch.api.replicas import Replicas
from gptoss_launch.launch.dispatch import Dispatch
from gptoss_launch.launch.listen import bind
from gptoss_launch.launch.tokenizer import Tokenizer
from gptoss_launch.parallel.engine.request import Request, Token
from gptoss_launch.parallel.planning.plan import Plan
from in_process import TellingEngine
from prometheus_client import CollectorRegistry


class Scripted(TellingEngine):
    """One replica. script: the tokens of every answer; it ends with the first stop token, or for its length."""

    async def generate(self, request: Request) -> AsyncGenerator[Token]:
        self.asked.append(request)
        self.running += 1
        try:
            said = self.script[: request.max_tokens]
            for place, token in enumerate(said):
                stops = "stop" if token in request.stop_tokens else None
                ended = stops or ("length" if place + 1 == len(said) else None)
                yield self.tell(request, place, token, ended)
                if ended:
                    return
            yield Token(request.id, -1, "deadline")
        finally:
            self.running -= 1


class Application:
    """engine: what answers. asgi: the whole application."""

    def __init__(self, engine: Any, tokenizer: Tokenizer, plan: Plan | None = None, **front: Any) -> None:
        self.engine = engine
        self.metrics = Metrics(CollectorRegistry(), "tiny", 1)
        routes = create_app(Served("tiny", 2048, tokenizer, Replicas([engine], Dispatch(1), self.metrics)))
        if plan is not None:
            routes.include_router(page_routes(plan))
        add_openapi(routes)
        self.routes = routes
        self.asgi = open_front(routes, Front(**{"count": self.metrics.http} | front))

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.asgi, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")


class Paced(Scripted):
    """Takes its time for each token."""

    def __init__(self, script: Sequence[int], token_s: float) -> None:
        super().__init__(script)
        self.token_s = token_s

    async def generate(self, request: Request) -> AsyncGenerator[Token]:
        async with aclosing(super().generate(request)) as tokens:
            async for token in tokens:
                await asyncio.sleep(self.token_s)
                yield token


@contextmanager
def listening(application: Application, **settings: Any) -> Iterator[int]:
    """Its port, with the connections of `serve`; settings: of uvicorn, and head_s and message_s of `protocol`."""
    limits = {name: settings.pop(name) for name in ("head_s", "message_s") if name in settings}
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        application.asgi, http=connection(**limits), ws="none", lifespan="off", log_level="critical", **settings
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()

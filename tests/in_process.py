"""The HTTP front end in the test's own process, without sockets: engines that stand in for replicas, and ways to call.

ScriptedEngine    gives the tokens it was told
DrawingEngine     draws tokens by seed and position, with log probabilities
Call              HTTP requests, and the official client
exchange          one request as the ASGI server sees it, with a client that may leave
"""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
import openai
from gptoss_launch.launch.api.app import create_app
from gptoss_launch.launch.api.metrics import Metrics
from gptoss_launch.launch.api.replicas import Replicas
from gptoss_launch.launch.api.served import Served
from gptoss_launch.launch.dispatch import Dispatch
from gptoss_launch.launch.tokenizer import Tokenizer
from gptoss_launch.parallel.engine.request import Request, Token
from prometheus_client import CollectorRegistry

T = TypeVar("T")
HELLO = [{"role": "user", "content": "Hello"}]


class ScriptedEngine:
    """Gives the script's tokens; an exception in it is raised. Notes what it was asked and what was closed early."""

    def __init__(self, script, ready=True, dead=False):
        self.script, self.ready, self.dead, self.running, self.restarts = script, ready, dead, 0, 0
        self.asked: list[Request] = []
        self.cancelled: list[str] = []

    def tell(self, request, place, id, reason):
        return Token(request.id, id, reason)

    async def generate(self, request):
        self.asked.append(request)
        ended = False
        try:
            for place, token in enumerate(self.script[: request.max_tokens]):
                if isinstance(token, Exception):
                    ended = True
                    raise token
                reason = "stop" if token in request.stop_tokens else None
                reason = reason or ("length" if place + 1 == request.max_tokens else None)
                ended = reason is not None
                yield self.tell(request, place, token, reason)
                if ended:
                    return
        finally:
            if not ended:
                self.cancelled.append(request.id)


class TellingEngine(ScriptedEngine):
    """With log probabilities: the token at place p of the answer has -p / 8, and the tokens from id 100 p on -1, -2,
    ...; as many as the most demanding request of a batch may ask for, which is more than this one did."""

    def tell(self, request, place, id, reason):
        if request.logprobs is None:
            return Token(request.id, id, reason)
        top = tuple((100 * place + rank, -1.0 - rank) for rank in range(request.logprobs + 3))
        return Token(request.id, id, reason, -place / 8, top)


class DrawingEngine:
    """Each token depends on seed and position alone: of `vocab` plain tokens, now and then of `markup`, and at last the
    first stop token. Gives way to other requests between tokens. open: requests that have not ended."""

    def __init__(self, vocab: int, markup: tuple[int, ...] = (), ends: float = 0.1):
        self.vocab, self.markup, self.ends = vocab, markup, ends
        self.ready, self.dead, self.restarts = True, False, 0
        self.asked: list[Request] = []
        self.open: set[str] = set()

    @property
    def running(self):
        return len(self.open)

    async def generate(self, request):
        self.asked.append(request)
        self.open.add(request.id)
        try:
            for place in range(request.max_tokens):
                await asyncio.sleep(0)
                draw = random.Random(f"{request.sampling.seed}/{len(request.prompt_tokens) + place}")
                id = draw.choice(self.markup) if self.markup and draw.random() < 0.2 else draw.randrange(self.vocab)
                id = request.stop_tokens[0] if draw.random() < self.ends else id
                reason = "stop" if id in request.stop_tokens else None
                reason = reason or ("length" if place + 1 == request.max_tokens else None)
                top = tuple((draw.randrange(self.vocab), -float(rank)) for rank in range(request.logprobs or 0))
                yield Token(request.id, id, reason, None if request.logprobs is None else -draw.random(), top)
                if reason:
                    return
        finally:
            self.open.remove(request.id)


def served(tokenizer: Tokenizer, *engines, **fields) -> Served:
    replicas = Replicas(list(engines), Dispatch(len(engines)), Metrics(CollectorRegistry(), "tiny", len(engines)))
    return Served("tiny", 2048, tokenizer, replicas, **fields)


@dataclass(frozen=True)
class Call:
    """call(method, path, ...) sends one HTTP request; call.ask(work) gives work the official client."""

    served: Served

    @asynccontextmanager
    async def http(self):
        # Our own mistakes are answered (500) and raised again for the log.
        transport = httpx.ASGITransport(create_app(self.served), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client

    def __call__(self, method: str, path: str, **arguments) -> httpx.Response:
        async def send():
            async with self.http() as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(send())

    def ask(self, work: Callable[[openai.AsyncOpenAI], Awaitable[T]]) -> T:
        async def run():
            async with self.http() as client:
                return await work(
                    openai.AsyncOpenAI(base_url="http://test/v1", api_key="secret", http_client=client, max_retries=0)
                )

        return asyncio.run(run())

    def chat(self, **arguments):
        """A chat completion, or the chunks of a streamed one."""

        async def work(client):
            answer = await client.chat.completions.create(**{"model": "tiny", "messages": HELLO} | arguments)
            return [chunk async for chunk in answer] if arguments.get("stream") else answer

        return self.ask(work)

    def complete(self, **arguments):
        """A text completion, or the chunks of a streamed one."""

        async def work(client):
            answer = await client.completions.create(**{"model": "tiny", "prompt": "Hello"} | arguments)
            return [chunk async for chunk in answer] if arguments.get("stream") else answer

        return self.ask(work)


@dataclass
class Exchange:
    """What came back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    parts: int = 0

    @property
    def events(self) -> list[str]:
        """Of a stream, without comments."""
        return [event[6:] for event in self.body.decode().split("\n\n") if event.startswith("data: ")]

    @property
    def error(self) -> dict:
        return json.loads(self.body)["error"]


async def exchange(app, method: str, path: str, body: bytes = b"", leave_after: int | None = None) -> Exchange:
    """One request; leave_after: the client is gone after so many parts of the answer."""
    got, gone = Exchange(), asyncio.Event()
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    if leave_after == 0:
        gone.set()

    async def receive():
        if incoming:
            return incoming.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            got.status = message["status"]
            got.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            got.body += message.get("body", b"")
            got.parts += 1
            if leave_after is not None and got.parts >= leave_after:
                gone.set()

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
    scope |= {"method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
    scope |= {"scheme": "http", "headers": [(b"content-type", b"application/json")]}
    scope |= {"client": ("test", 1), "server": ("test", 80), "state": {}}
    await app(scope, receive, send)
    return got

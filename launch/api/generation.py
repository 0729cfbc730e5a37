"""One HTTP request that generates: checked, made into one engine request a choice, and answered whole or streamed.

The one path behind every route: `answer` drives it, and a route brings three things: how its body is read, how that
becomes a `Job`, and how pieces become JSON (`Shape`). What belongs to no route, token limits above all, is here.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ...parallel.engine.constraint import Constraint
from ...parallel.engine.request import Request
from ...parallel.errors import UserError
from ..dispatch import prompt_blocks
from ..engine_client import EngineDiedError
from ..harmony import stop_tokens
from .answer import End, Piece
from .errors import ApiError, explain
from .fields import GenerationFields, check_ids, samplings
from .reading import Reading
from .respond import Begun, ClientGoneError, EventStream, first_of, read_body, unless_gone
from .served import Served
from .tool_loop import in_turns

Fields = TypeVar("Fields", bound=GenerationFields)
Item = TypeVar("Item")
Pieces = AsyncGenerator[tuple[int, Piece]]  # of all choices, each with the index of its choice


class Shape(Protocol):
    """Pieces -> JSON, as a route has it."""

    async def whole(self, pieces: Pieces) -> dict[str, Any]:
        """The answer as one object."""
        ...

    def chunks(self, pieces: Pieces, include_usage: bool) -> AsyncGenerator[bytes]:
        """The answer as server-sent events, each as soon as its piece is there."""
        ...


@dataclass(frozen=True)
class Choice:
    """blocks: `dispatch.prompt_blocks` of the request's prompt."""

    request: Request
    blocks: tuple[int, ...]
    reading: Reading


@dataclass(frozen=True)
class Job:
    choices: tuple[Choice, ...]
    shape: Shape


@dataclass(frozen=True)
class Head:
    """What all parts of an answer share. prompt_tokens: of all prompts, once for all choices that share one."""

    id: str
    model: str
    created: int  # Unix time, s
    prompt_tokens: int

    def of(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self, ends: Sequence[End]) -> dict[str, Any]:
        """ends: of all choices."""
        completion = sum(end.completion_tokens for end in ends)
        read = self.prompt_tokens + sum(end.tool_tokens for end in ends)
        return {
            "prompt_tokens": read,
            "completion_tokens": completion,
            "total_tokens": read + completion,
            "completion_tokens_details": {"reasoning_tokens": sum(end.reasoning_tokens for end in ends)},
        }


def new_head(prefix: str, served: Served, choices: Sequence[Choice], prompt_tokens: int) -> Head:
    """prefix: what the id begins with, as OpenAI's do; the rest is the engine's id of the first choice, so that what a
    client reports can be found in the engine's logs."""
    return Head(f"{prefix}-{choices[0].request.id}", served.name, int(time.time()), prompt_tokens)


def make_choices(
    fields: GenerationFields,
    prompts: Sequence[tuple[int, ...]],
    served: Served,
    reading: Reading,
    *,
    prompt_param: str,
    max_tokens: int | None,
    max_param: str = "max_tokens",
    logprobs: int | None,
    constraint: Constraint | None = None,
    model_ends: bool = True,
) -> tuple[Choice, ...]:
    """All choices of the first prompt, then those of the next one.

    max_tokens: None leaves all the room that there is. model_ends: whether the model may end an answer. Raises ApiError
    400 where prompt and answer cannot fit into the context, and for token ids that are in no vocabulary.
    """
    check_ids(fields, served.tokenizer.vocab_size)
    own = stop_tokens(served.tokenizer) if model_ends else ()
    stops = tuple(dict.fromkeys((*own, *(fields.stop_token_ids or ()))))
    drawn = samplings(fields)
    choices = []
    for prompt in prompts:
        room = _room(prompt, served.context_tokens, max_tokens, prompt_param, max_param)
        blocks = prompt_blocks(prompt)
        for sampling in drawn:
            id = secrets.token_hex(12)
            request = Request(
                id,
                prompt,
                room,
                sampling,
                stops,
                logprobs=logprobs,
                deadline_s=fields.deadline_s,
                constraint=constraint,
            )
            choices.append(Choice(request, blocks, reading))
    return tuple(choices)


def _room(
    prompt: tuple[int, ...], context_tokens: int, max_tokens: int | None, prompt_param: str, max_param: str
) -> int:
    """Tokens that the answer may have."""
    left = context_tokens - len(prompt)
    if left < 1:
        message = f"the prompt is {len(prompt)} tokens; the context of {context_tokens} leaves no room to answer"
        raise ApiError(400, f"{prompt_param}: {message}", prompt_param, "context_length_exceeded")
    if max_tokens is not None and max_tokens > left:
        numbers = f"{len(prompt)} prompt tokens + {max_tokens} is more than the context of {context_tokens}"
        raise ApiError(400, f"{max_param}: {numbers}", max_param, "context_length_exceeded")
    return max_tokens or left


async def answer(
    http: HttpRequest, served: Served, parse: Callable[[bytes], Fields], make_job: Callable[[Fields, Served], Job]
) -> Response:
    """The response to one HTTP request. parse, make_job: run in a thread, and raise ApiError."""
    try:
        body = await read_body(http, served.body_limit_bytes)
        # In a thread, like the tokens below: a long prompt would hold up the streams of everyone else.
        fields = await asyncio.to_thread(parse, body)
        served.check_model(fields.model)
        served.replicas.choose(())  # what nobody could take is refused before anything is made of it
        job = await unless_gone(http.receive, asyncio.to_thread(make_job, fields, served))
        async with AsyncExitStack() as stack:
            begun: list[Begun] = []
            pieces: list[AsyncGenerator[Piece]] = []
            for choice in job.choices:
                one, its_pieces = begin(choice, served)
                stack.push_async_callback(one.aclose)
                begun.append(one)
                pieces.append(its_pieces)
            # The status line waits for a first token, so that a request which the engine refuses is no 200; that of a
            # stream no longer than a proxy would wait.
            await unless_gone(http.receive, first_of(begun, served.quiet_s if fields.stream else None))
            if not fields.stream:
                return JSONResponse(await unless_gone(http.receive, job.shape.whole(together(pieces))))
            close = stack.pop_all().aclose  # the stream closes them
            chunks = job.shape.chunks(together(pieces), fields.include_usage)
            return EventStream(chunks, explain, close, served.quiet_s)
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it
    except (EngineDiedError, UserError) as error:
        raise explain(error) from None


def begin(choice: Choice, served: Served) -> tuple[Begun, AsyncGenerator[Piece]]:
    """A choice on its way to a replica, to be closed by the caller, and what comes of it."""
    reading = choice.reading
    watch = served.replicas.watch(choice.request)
    begun = Begun(served.replicas.generate(choice.request, choice.blocks, watch), partial(watch.end, "abort"))
    if reading.builtins and served.tools is not None:
        return begun, in_turns(choice.request, begun.tokens(), reading, served, served.tools, watch)
    return begun, reading.pieces(begun.tokens(), watch)


async def together(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[tuple[int, Item]]:
    """The items of all streams as they come, each with its stream's place. Closes them when it ends, also early."""
    if len(streams) == 1:  # by far the most; a queue would cost a third of what a token may
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Item] | Exception | None] = asyncio.Queue(len(streams))  # None: one has ended

    async def pass_on(place: int, stream: AsyncGenerator[Item]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((place, item))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pass_on(place, stream)) for place, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            got = await queue.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                left -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

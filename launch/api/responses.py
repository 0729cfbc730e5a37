"""/v1/responses: made like chat's answers, kept if asked for, fetched, cancelled and deleted.

    POST    /v1/responses                    a response, whole, streamed, or in the background
    GET     /v1/responses/{id}               as it is now; ?stream=true&starting_after=N its events from there
    DELETE  /v1/responses/{id}
    POST    /v1/responses/{id}/cancel        ends one in the background
    POST    /v1/responses/input_tokens       how many tokens the same body would send to the model
    POST    /v1/responses/compact            a conversation made short, to go on from
    GET     /v1/responses/{id}/input_items   what it was asked, the conversation before it included

A response ends with its client, unless it is made in the background. What is said of one that fails before its first
token is an HTTP status, later the event response.failed; one that is not streamed, and not in the background, always
has its status.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ...parallel.errors import UserError
from ..engine_client import EngineDiedError
from .answer import Piece
from .content_tokens import ContentToken
from .errors import ApiError, explain
from .gate import KEY_NAME
from .generation import Job, begin
from .logprobs import chat_logprobs
from .respond import Begun, ClientGoneError, EventStream, event, read_body, unless_gone
from .responses_chat import Item, count_tokens, response_job
from .responses_compact import compacted, question, read_compact_request
from .responses_events import Draft, Event, place_of_item, response_id
from .responses_query import Page, page_of, read_page, read_retrieval
from .responses_schema import ResponsesRequest, echo, input_items, parse_responses_request
from .responses_store import Kept, Recording, Store
from .served import Served

_LOG = logging.getLogger(__name__)

Parse = Callable[[bytes], tuple[ResponsesRequest, list[Item]]]


@dataclass(frozen=True)
class _Making:
    """A response under way."""

    draft: Draft
    begun: Begun
    pieces: AsyncGenerator[Piece]

    async def events(self) -> AsyncGenerator[Event]:
        """All of them, each as soon as it is there; what goes wrong is the last one."""
        draft = self.draft
        try:
            for event in draft.created():
                yield event
            if draft.status == "queued":
                await self.begun.wait(None)
            for event in draft.started():
                yield event
            async with aclosing(self.pieces):
                async for piece in self.pieces:
                    for event in draft.feed(piece):
                        yield event
        except Exception as error:
            told = explain(error)
            if told.status == 500:
                _LOG.exception("a response was cut short")
            for event in draft.failed(told):
                yield event

    async def whole(self) -> dict[str, Any]:
        """Raises what goes wrong."""
        try:
            async with aclosing(self.pieces):
                async for piece in self.pieces:
                    self.draft.feed(piece)
        except Exception as error:
            self.draft.failed(explain(error))
            raise
        return self.draft.response

    async def close(self) -> list[Event]:
        """Ends it wherever it is: one that has not ended is cancelled. May be called twice."""
        await self.begun.aclose()
        return [] if self.draft.ended else self.draft.cancelled()


def responses_routes(served: Served) -> APIRouter:
    routes = APIRouter(prefix="/v1/responses")
    store = served.store

    def find(http: HttpRequest, id: str) -> Kept:
        return store.find(id, _owner(http))

    async def read(http: HttpRequest, parse: Parse = _read) -> tuple[ResponsesRequest, list[Item], list[Item]]:
        """A body, the items of the conversation before it, and its own, without references."""
        body = await read_body(http, served.body_limit_bytes)
        # In a thread, like the tokens later: a long prompt would hold up the streams of everyone else.
        request, items = await asyncio.to_thread(parse, body)
        served.check_model(request.model)
        before = [item for kept in store.chain(request.previous_response_id, _owner(http)) for item in _said(kept)]
        return request, before, [_followed(item, place, http, store) for place, item in enumerate(items)]

    @routes.post("")
    async def create(http: HttpRequest) -> Response:
        try:
            request, before, items = await read(http)
            served.replicas.choose(())  # what nobody could take is refused before anything is made of it
            job = await unless_gone(http.receive, asyncio.to_thread(response_job, request, before, items, served))
            return await _answer(http, served, request, items, job)
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads it
        except (EngineDiedError, UserError) as error:
            raise explain(error) from None

    @routes.post("/input_tokens")
    async def count_input(http: HttpRequest) -> Response:
        try:
            count = await asyncio.to_thread(count_tokens, *await read(http), served)
        except ClientGoneError:
            return Response(status_code=499)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": count})

    @routes.post("/compact")
    async def compact(http: HttpRequest) -> Response:
        try:
            request, before, items = await read(http, read_compact_request)
            served.replicas.choose(())
            job = await asyncio.to_thread(response_job, request, before, [*items, question()], served)
            return await _compact(http, served, request, [*before, *items], job)
        except ClientGoneError:
            return Response(status_code=499)
        except (EngineDiedError, UserError) as error:
            raise explain(error) from None

    @routes.get("/{id}")
    async def retrieve(http: HttpRequest, id: str) -> Response:
        starting_after = read_retrieval(http.query_params)
        kept = find(http, id)
        if starting_after is None:
            return JSONResponse(kept.draft.response)
        if kept.recording is None:
            message = "stream: only what was created with background=true and stream=true has kept its events"
            raise ApiError(400, message, "stream")
        return _stream(kept.recording.read(starting_after), _nothing, served)

    @routes.delete("/{id}")
    async def delete(http: HttpRequest, id: str) -> Response:
        kept = find(http, id)
        if kept.stop is not None:
            await kept.stop()
        store.remove(id)
        return JSONResponse({"id": id, "object": "response", "deleted": True})

    @routes.post("/{id}/cancel")
    async def cancel(http: HttpRequest, id: str) -> Response:
        kept = find(http, id)
        if kept.stop is None:
            raise ApiError(400, "response_id: it was not created with background=true", "response_id")
        await kept.stop()
        return JSONResponse(kept.draft.response)

    @routes.get("/{id}/input_items")
    async def list_input_items(http: HttpRequest, id: str) -> Response:
        page: Page = read_page(http.query_params)
        kept = find(http, id)
        earlier = store.chain(kept.previous, kept.owner)
        before = [item for one in earlier for item in _said(one)]
        return JSONResponse(page_of([*before, *kept.input], page))

    return routes


async def _answer(
    http: HttpRequest, served: Served, request: ResponsesRequest, items: Sequence[Item], job: Job
) -> Response:
    [choice] = job.choices
    head = {"id": response_id(choice.request.id), "object": "response", "created_at": int(time.time())}
    top_logprobs = request.top_logprobs or 0

    # The draft is kept, and this with it: not the request, which takes up to 13 times what the store counts.
    def logprobs_of(tokens: Sequence[ContentToken]) -> list[dict[str, Any]]:
        return chat_logprobs(tokens, served.tokenizer, top_logprobs)

    prompt_tokens = len(choice.request.prompt_tokens)
    draft = Draft(head | echo(request, served.name), prompt_tokens, logprobs_of, request.shows_outputs)
    begun, pieces = begin(choice, served)
    making = _Making(draft, begun, pieces)
    kept = Kept(draft, _owner(http), _named(items, choice.request.id), request.previous_response_id)
    if request.background:
        return _in_background(kept, making, served, bool(request.stream))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(_close, making, kept, served.store)
        # The status line waits for the first token, so that a request which the engine refuses is no 200; that of a
        # stream no longer than a proxy would wait.
        await unless_gone(http.receive, begun.wait(served.quiet_s if request.stream else None))
        if request.kept:
            served.store.put(kept)
        if not request.stream:
            return JSONResponse(await unless_gone(http.receive, making.whole()))
        close = stack.pop_all().aclose  # the stream closes it
        return _stream(making.events(), close, served)


async def _compact(
    http: HttpRequest, served: Served, request: ResponsesRequest, items: Sequence[Item], job: Job
) -> Response:
    """items: of the conversation, the question for the summary left out."""
    [choice] = job.choices
    id, created_s = choice.request.id, int(time.time())
    head = {"id": response_id(id)} | echo(request, served.name)
    draft = Draft(head, len(choice.request.prompt_tokens), lambda tokens: [])
    making = _Making(draft, *begin(choice, served))
    try:
        response = await unless_gone(http.receive, making.whole())
    finally:
        await making.close()
    output = compacted(_named(items, id), response["output"], id)
    about = {"id": draft.id, "object": "response.compaction", "created_at": created_s}
    return JSONResponse(about | {"output": output, "usage": response["usage"]})


def _in_background(kept: Kept, making: _Making, served: Served, stream: bool) -> Response:
    recording = Recording() if stream else None
    kept.recording = recording

    async def make() -> None:
        try:
            async with aclosing(making.events()) as events:
                async for event in events:
                    if recording is not None:
                        recording.add([event])
        finally:
            await close()

    async def close() -> None:
        last = await making.close()
        if recording is not None:
            recording.add(last)
            recording.end()
        served.store.settle(kept)

    task = asyncio.create_task(make())

    async def stop() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await close()

    kept.stop = stop
    served.store.put(kept)
    if recording is None:
        return JSONResponse(kept.draft.response)
    return _stream(recording.read(-1), _nothing, served)


def _stream(events: AsyncGenerator[Event], close: Callable[[], Awaitable[None]], served: Served) -> Response:
    async def encoded() -> AsyncGenerator[bytes]:
        async with aclosing(events):
            async for one in events:
                yield event(one)

    return EventStream(encoded(), explain, close, served.quiet_s, done=None)


async def _close(making: _Making, kept: Kept, store: Store) -> None:
    await making.close()
    store.settle(kept)


async def _nothing() -> None:
    """What is read here goes on without its reader."""


def _read(body: bytes) -> tuple[ResponsesRequest, list[Item]]:
    request = parse_responses_request(body)
    return request, input_items(request)


def _said(kept: Kept) -> list[Item]:
    """What a kept response adds to its conversation. Raises ApiError 400."""
    if not _usable(kept):
        message = f"previous_response_id: response {kept.draft.id} is {kept.draft.status}"
        raise ApiError(400, message, "previous_response_id", "previous_response_not_usable")
    return [*kept.input, *kept.draft.response["output"]]


def _usable(kept: Kept) -> bool:
    return kept.draft.status in ("completed", "incomplete")


def _owner(http: HttpRequest) -> str:
    """Whose responses it may see. Where there are no keys, everyone's."""
    return http.scope.get(KEY_NAME, "")


def _followed(item: Item, place: int, http: HttpRequest, store: Store) -> Item:
    """The item that a reference stands for. Raises ApiError 400."""
    if item["type"] != "item_reference":
        return item
    response, index = place_of_item(item["id"]) or ("", 0)
    kept = store.get(response, _owner(http))
    output = kept.draft.response["output"] if kept is not None and _usable(kept) else []
    if index < len(output) and output[index]["id"] == item["id"]:
        return output[index]
    param = f"input.{place}.id"
    raise ApiError(400, f"{param}: no item {item['id']!r} in the output of a kept response", param, "item_not_found")


def _named(items: Sequence[Item], request_id: str) -> list[Item]:
    """With an id each, and a status, as lists of them have."""
    prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
    prefix |= {"code_interpreter_call": "ci", "web_search_call": "ws", "compaction": "cmp"}
    return [
        {"id": f"{prefix[item['type']]}_{request_id}_in{place}", "status": "completed"} | item
        for place, item in enumerate(items)
    ]

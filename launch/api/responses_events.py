"""Pieces of an answer -> a Response object of OpenAI's API, and the events that tell how it comes about.

    response.created, (response.queued,) response.in_progress
    for each item of the output     response.output_item.added, ..., response.output_item.done
        reasoning                   content_part.added, reasoning_text.delta ..., reasoning_text.done, content_part.done
        message                     content_part.added, output_text.delta ..., output_text.done, content_part.done
        function_call               function_call_arguments.delta ..., function_call_arguments.done
        code_interpreter_call       .in_progress, ..._code.delta ..., ..._code.done, .interpreting, .completed
        web_search_call             .in_progress, .searching, .completed
    response.completed, or .incomplete (cut short; cancelled, which has no event of its own), or .failed

Order and fields are those of the official client (openai-python, types/responses). Does not know where pieces come from
nor who reads the events.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .answer import Arguments, Call, Content, End, Piece, Reasoning, Run, RunBegun, RunInput, RunOutput
from .content_tokens import ContentToken
from .errors import ApiError
from .responses_runs import RunKind, run_fields, run_kind

Event = dict[str, Any]
Kind = Literal["reasoning", "message", "function_call"]
ItemStatus = Literal["in_progress", "completed", "incomplete", "failed"]

_PREFIX: dict[Kind | RunKind, str] = {
    **{"reasoning": "rs", "message": "msg", "function_call": "fc"},
    **{"code_interpreter_call": "ci", "web_search_call": "ws"},
}
_TEXT_EVENTS: dict[Kind, str] = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}
# What the official client knows of error codes; all others are the server's fault.
_ERROR_CODES = {400: "invalid_prompt", 413: "invalid_prompt", 429: "rate_limit_exceeded"}


def response_id(request_id: str) -> str:
    return f"resp_{request_id}"


def place_of_item(item_id: str) -> tuple[str, int] | None:
    """(response id, index in its output) of an item that a Draft made; None for any other id."""
    words = item_id.split("_")
    if len(words) != 3 or words[0] not in _PREFIX.values() or not (words[2].isascii() and words[2].isdigit()):
        return None
    return response_id(words[1]), int(words[2][:6])


@dataclass
class _Item:
    """The item that grows. about: its own fields. message: the place of its harmony message in the answer."""

    kind: Kind
    id: str
    place: int
    message: int
    about: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def where(self) -> dict[str, Any]:
        """The fields that all events of its text share."""
        content = {} if self.kind == "function_call" else {"content_index": 0}
        return {"item_id": self.id, "output_index": self.place} | content

    def part(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}

    def whole(self, status: ItemStatus) -> dict[str, Any]:
        said = {"arguments": self.text} if self.kind == "function_call" else {"content": [self._part()]}
        return self._head(status) | said

    def empty(self) -> dict[str, Any]:
        said: dict[str, Any] = {"arguments": ""} if self.kind == "function_call" else {"content": []}
        return self._head("in_progress") | said

    def _part(self) -> dict[str, Any]:
        return self.part(self.text, self.logprobs)

    def _head(self, status: ItemStatus) -> dict[str, Any]:
        return {"id": self.id, "type": self.kind, "status": status} | self.about


@dataclass
class _Run:
    """The item of a built-in tool that is called, or runs. output: None until it has said something."""

    name: str
    id: str
    place: int
    container: str
    given: list[str] = field(default_factory=list)
    output: RunOutput | None = None

    @property
    def kind(self) -> RunKind:
        return run_kind(self.name)

    @property
    def where(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.place}

    def whole(self, shown: bool, running: bool = False) -> dict[str, Any]:
        """shown: with what it said. running: it may still say something."""
        status = "in_progress" if running else "incomplete"
        if self.output is not None:
            status = "failed" if self.output.failed else "completed"
        output = self.output.text if shown and self.output is not None else None
        fields = run_fields(self.name, "".join(self.given), output, self.container)
        return {"id": self.id, "type": self.kind, "status": status} | fields


class Draft:
    """One response while it is made. What each method returns are the events that it causes.

    head: the fields that do not change, "id" among them. prompt_tokens: for the usage. logprobs_of: tokens of the
    content as the API shows them; () where they were not asked for. show_outputs: of python, in its items.
    """

    def __init__(
        self,
        head: dict[str, Any],
        prompt_tokens: int,
        logprobs_of: Callable[[Sequence[ContentToken]], list[dict[str, Any]]],
        show_outputs: bool = False,
    ) -> None:
        self._head = head
        self._prompt_tokens = prompt_tokens
        self._logprobs_of = logprobs_of
        self._output: list[dict[str, Any]] = []
        self._show_outputs = show_outputs
        self._open: _Item | None = None
        self._run: _Run | None = None  # open in its place
        self._events = 0
        self._outcome: dict[str, Any] = {
            "status": "queued" if head["background"] else "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "usage": None,
        }
        self.ended = False

    @property
    def id(self) -> str:
        return self._head["id"]

    @property
    def status(self) -> str:
        return self._outcome["status"]

    @property
    def response(self) -> dict[str, Any]:
        """As it is now; it does not change with what comes."""
        unfinished = [] if self._open is None else [self._open.whole("incomplete" if self.ended else "in_progress")]
        unfinished += [] if self._run is None else [self._run.whole(self._show_outputs, running=not self.ended)]
        return self._head | self._outcome | {"output": [*self._output, *unfinished]}

    def created(self) -> list[Event]:
        events = [self._event("response.created", response=self.response)]
        if self.status == "queued":
            events.append(self._event("response.queued", response=self.response))
        return events

    def started(self) -> list[Event]:
        self._outcome["status"] = "in_progress"
        return [self._event("response.in_progress", response=self.response)]

    def feed(self, piece: Piece) -> list[Event]:
        match piece:
            case Reasoning():
                return [*self._enter("reasoning", piece.message, {"summary": []}), self._delta(piece.text)]
            case Content():
                phase = "commentary" if piece.preamble else "final_answer"
                events = self._enter("message", piece.message, {"role": "assistant", "phase": phase})
                logprobs = self._logprobs_of(piece.tokens)
                assert self._open is not None
                self._open.logprobs += logprobs
                return [*events, self._delta(piece.text) | {"logprobs": logprobs}]
            case Call():
                about = {"call_id": piece.id, "name": piece.name}
                return self._enter("function_call", -1 - piece.index, about)
            case Arguments():
                return [self._delta(piece.text)]
            case Run():
                return self._enter_run(piece)
            case RunInput() | RunBegun() | RunOutput():
                return self._grow_run(piece)
            case End():
                return self._finish(piece)

    def failed(self, error: ApiError) -> list[Event]:
        code = _ERROR_CODES.get(error.status, "server_error")
        return self._end("failed", "response.failed", error={"code": code, "message": error.message})

    def cancelled(self) -> list[Event]:
        return self._end("cancelled", "response.incomplete")

    def _finish(self, end: End) -> list[Event]:
        whole = end.finish_reason != "length"
        events = self._leave("completed" if whole else "incomplete")
        read = self._prompt_tokens + end.tool_tokens
        usage = {
            "input_tokens": read,
            # Clients read these two in any case. What the prefix cache held is known to the engine alone.
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": end.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": end.reasoning_tokens},
            "total_tokens": read + end.completion_tokens,
        }
        if whole:
            return events + self._end("completed", "response.completed", usage=usage, completed_at=int(time.time()))
        details = {"reason": "max_output_tokens"}
        return events + self._end("incomplete", "response.incomplete", usage=usage, incomplete_details=details)

    def _end(self, status: str, event: str, **outcome: Any) -> list[Event]:
        self.ended = True
        self._outcome |= {"status": status, **outcome}
        return [self._event(event, response=self.response)]

    def _enter(self, kind: Kind, message: int, about: dict[str, Any]) -> list[Event]:
        """Opens an item, unless the open one is of the same message."""
        if self._open is not None and (self._open.kind, self._open.message) == (kind, message):
            return []
        events = self._leave("completed")
        place = len(self._output)
        item = self._open = _Item(kind, self._item_id(kind, place), place, message, about)
        events.append(self._event("response.output_item.added", output_index=place, item=item.empty()))
        if kind != "function_call":
            events.append(self._event("response.content_part.added", **item.where, part=item.part("")))
        return events

    def _enter_run(self, run: Run) -> list[Event]:
        events = self._leave("completed")
        place, container = len(self._output), f"cntr_{self.id.removeprefix(response_id(''))}"
        item = self._run = _Run(run.name, self._item_id(run_kind(run.name), place), place, container)
        whole = item.whole(self._show_outputs, running=True)
        events.append(self._event("response.output_item.added", output_index=place, item=whole))
        return [*events, self._event(f"response.{item.kind}.in_progress", **item.where)]

    def _grow_run(self, piece: RunInput | RunBegun | RunOutput) -> list[Event]:
        item = self._run
        assert item is not None
        code = item.kind == "code_interpreter_call"
        match piece:
            case RunInput():
                item.given.append(piece.text)
                return [self._event(f"response.{item.kind}_code.delta", **item.where, delta=piece.text)] if code else []
            case RunBegun():
                text, works = "".join(item.given), "interpreting" if code else "searching"
                done = [self._event(f"response.{item.kind}_code.done", **item.where, code=text)] if code else []
                return [*done, self._event(f"response.{item.kind}.{works}", **item.where)]
            case RunOutput():
                item.output = piece
                return [self._event(f"response.{item.kind}.completed", **item.where), *self._leave("completed")]

    def _item_id(self, kind: Kind | RunKind, place: int) -> str:
        return f"{_PREFIX[kind]}_{self.id.removeprefix(response_id(''))}_{place}"

    def _delta(self, text: str) -> Event:
        item = self._open
        assert item is not None
        item.texts.append(text)
        return self._event(f"{_TEXT_EVENTS[item.kind]}.delta", **item.where, delta=text)

    def _leave(self, status: ItemStatus) -> list[Event]:
        """Closes the open item, if there is one."""
        run, self._run = self._run, None
        if run is not None:
            whole = run.whole(self._show_outputs)
            self._output.append(whole)
            return [self._event("response.output_item.done", output_index=run.place, item=whole)]
        item, self._open = self._open, None
        if item is None:
            return []
        done, whole = f"{_TEXT_EVENTS[item.kind]}.done", item.whole(status)
        self._output.append(whole)
        if item.kind == "function_call":
            events = [self._event(done, **item.where, name=item.about["name"], arguments=item.text)]
        else:
            logprobs = {"logprobs": list(item.logprobs)} if item.kind == "message" else {}
            events = [
                self._event(done, **item.where, text=item.text, **logprobs),
                self._event("response.content_part.done", **item.where, part=whole["content"][0]),
            ]
        return [*events, self._event("response.output_item.done", output_index=item.place, item=whole)]

    def _event(self, kind: str, **fields: Any) -> Event:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1} | fields

"""Tokens of one answer -> what a client gets: reasoning, content, tool calls, and why it ended.

    analysis                            reasoning
    final, commentary to nobody         content (a preamble before a tool call is content)
    to functions.NAME, if offered       a tool call; to NAME alone, too
    to python or browser, if offered    a run of that built-in tool
    final, to anyone else               content
    to anyone else                      reasoning: nobody waits for it, and it is no answer

Stop strings are looked for in content alone. Knows neither HTTP nor how the engine draws.
"""

import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, Protocol

from ...parallel.engine.request import Token
from ..harmony import Delta
from .content_tokens import ContentToken, ContentTokens, Telling


@dataclass(frozen=True)
class Reasoning:
    """message: the place of the message that it is said in; a new one begins where it changes."""

    text: str
    message: int = 0


@dataclass(frozen=True)
class Content:
    """tokens: those that begin in `text`, if they were asked for. message: as in Reasoning. preamble: said in the
    commentary channel, before the answer proper."""

    text: str
    tokens: tuple[ContentToken, ...] = ()
    message: int = 0
    preamble: bool = False


@dataclass(frozen=True)
class Call:
    """A tool call begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    index: int
    text: str


@dataclass(frozen=True)
class Run:
    """A built-in tool is called; what it is given follows. name: python, or browser.search and so on. channel: of the
    message."""

    name: str
    channel: str | None


@dataclass(frozen=True)
class RunInput:
    text: str


@dataclass(frozen=True)
class RunBegun:
    """It has been given everything, and works now."""


@dataclass(frozen=True)
class RunOutput:
    """What the tool said (`tool_loop`). failed: it could not do what it was asked."""

    text: str
    failed: bool


@dataclass(frozen=True)
class End:
    """The last piece. reasoning_tokens: those of reasoning messages after their header, their end included.
    tool_tokens: of what tools said that were run for the answer, which the model read like its prompt."""

    finish_reason: Literal["stop", "length", "tool_calls"]
    completion_tokens: int
    reasoning_tokens: int
    tool_tokens: int = 0


Piece = Reasoning | Content | Call | Arguments | Run | RunInput | RunBegun | RunOutput | End


class StopStrings:
    """Text in, text out, up to the first of `stops`. Holds back only what may still become one of them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """What may be shown now; after a hit nothing more."""
        if not self._stops:
            return text
        if self.hit:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.hit = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """The text is over: what was held back became no stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Parser(Telling, Protocol):
    """Token ids -> Deltas (`harmony.StreamParser`, `plain_text.PlainText`). repair: counts a guess, by its kind."""

    def feed(self, token_id: int) -> list[Delta]: ...
    def finish(self) -> list[Delta]: ...
    def repair(self, kind: str) -> None: ...


class Answer:
    """What has been said so far, one token at a time; `read_answer` drives it, and has the meaning of what it takes."""

    def __init__(
        self,
        parser: Parser,
        stops: Sequence[str],
        functions: Collection[str],
        keep_tokens: bool = False,
        builtins: Collection[str] = (),
    ) -> None:
        self._parser = parser
        self._stops = StopStrings(stops)
        self._functions = functions
        self._builtins = builtins
        self._place: Literal["reasoning", "content", "call", "run"] | None = None  # of the open message
        self._message, self._preamble = 0, False  # of the content that came last
        self._calls = 0
        self._tokens = ContentTokens(parser) if keep_tokens else None
        self.stopped = False  # by a stop string, or by a token that stops unseen
        self.completion_tokens = 0
        self.reasoning_tokens = 0

    def feed(self, token_id: int, logprob: float | None = None, top: tuple[tuple[int, float], ...] = ()) -> list[Piece]:
        """logprob, top: as in `request.Token`; needed where tokens are kept."""
        self._count()
        if self._tokens is not None:
            assert logprob is not None, "the request did not ask for log probabilities"
            self._tokens.token(ContentToken(token_id, logprob, top), self._place)
        return self._pieces(self._parser.feed(token_id))

    def stop_unseen(self) -> None:
        """A token ends it that is no part of it."""
        self._count()
        self.stopped = True

    def finish(self, finish_reason: Literal["stop", "length"]) -> list[Piece]:
        pieces = self._pieces(self._parser.finish())
        pieces += self._content(self._stops.flush())
        reason = "stop" if self.stopped else finish_reason
        if self._calls and reason == "stop" and not self.stopped:
            reason = "tool_calls"
        return [*pieces, End(reason, self.completion_tokens, self.reasoning_tokens)]

    def _count(self) -> None:
        self.completion_tokens += 1
        self.reasoning_tokens += self._place == "reasoning"

    def _pieces(self, deltas: Sequence[Delta]) -> list[Piece]:
        pieces: list[Piece] = []
        for delta in deltas:
            if delta.kind == "start":
                pieces += self._begin(delta)
            elif delta.kind == "text" and self._place == "call":
                pieces.append(Arguments(self._calls - 1, delta.text))
            elif delta.kind == "text" and self._place == "run":
                pieces.append(RunInput(delta.text))
            elif delta.kind == "text" and self._place == "reasoning":
                pieces.append(Reasoning(delta.text, delta.index))
            elif delta.kind == "text":
                if self._tokens is not None:
                    self._tokens.say(delta.text)
                self._message, self._preamble = delta.index, delta.channel == "commentary"
                pieces += self._content(self._stops.feed(delta.text))
                self.stopped = self.stopped or self._stops.hit
            elif delta.kind == "end":
                self._place = None
        return pieces

    def _begin(self, start: Delta) -> list[Piece]:
        """A message begins, and it is known what it is."""
        function = self._called(start)
        to_tool = start.recipient is not None and start.channel != "final"
        reasons = start.channel == "analysis" or to_tool
        runs = to_tool and function is None and (start.recipient or "").partition(".")[0] in self._builtins
        self._place = "call" if function is not None else "run" if runs else "reasoning" if reasons else "content"
        if self._tokens is not None:
            self._tokens.begin(self._place)
        if kind := _recipient_repair(start, function):
            self._parser.repair(kind)
        if runs:
            return [Run(start.recipient or "", start.channel)]
        if function is None:
            return []
        self._calls += 1
        return [Call(self._calls - 1, f"call_{secrets.token_hex(12)}", function)]

    def _content(self, shown: str) -> list[Piece]:
        tokens = () if self._tokens is None else self._tokens.show(shown)
        return [Content(shown, tokens, self._message, self._preamble)] if shown else []

    def _called(self, start: Delta) -> str | None:
        name = start.recipient or ""
        while name.startswith("functions."):
            name = name.removeprefix("functions.")
        return name if name in self._functions else None


def _recipient_repair(delta: Delta, function: str | None) -> str | None:
    """What is wrong with a message's recipient, if anything (`harmony.REPAIRS`). function: the one it calls."""
    if delta.recipient is None or delta.recipient == f"functions.{function}" and delta.channel != "final":
        return None
    if function is not None or delta.channel == "final":
        return "recipient"
    return "not_offered" if delta.recipient.startswith("functions.") else None


async def read_answer(
    tokens: AsyncGenerator[Token],
    parser: Parser,
    stops: Sequence[str] = (),
    functions: Collection[str] = (),
    on_stop: Callable[[], None] = lambda: None,
    unseen: Collection[int] = (),
    keep_tokens: bool = False,
    builtins: Collection[str] = (),
) -> AsyncGenerator[Piece]:
    """The pieces of an answer as its tokens come; closes `tokens` when it ends, also early. The last piece is an End.

    functions: the names that the model was offered; builtins: of "python" and "browser", those. on_stop: called when a
    stop string ends it, before `tokens` is closed. unseen: ids of stop tokens that are no part of the answer.
    keep_tokens: Content carries its tokens. A deadline that passed ends it like a length: OpenAI's clients know no
    other word for "cut short".
    """
    answer = Answer(parser, stops, functions, keep_tokens, builtins)
    reason: Literal["stop", "length"] = "stop"
    async with aclosing(tokens):
        async for token in tokens:
            if token.finish_reason == "stop" and token.id in unseen:
                answer.stop_unseen()
                break
            if token.id >= 0:  # an end may come without a token
                for piece in answer.feed(token.id, token.logprob, token.top):
                    yield piece
            if token.finish_reason in ("length", "deadline"):
                reason = "length"
            if answer.stopped:
                reason = "stop"
                on_stop()
                break
    for piece in answer.finish(reason):
        yield piece

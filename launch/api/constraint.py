"""What a client demands of an answer -> the Constraint that the engine keeps to: tools, formats, a bound on reasoning.

In harmony an answer is messages: analysis, a preamble or a call in commentary, the final text. Analysis stays free, a
call's arguments follow the tool's schema, the final text the response format. Every route uses `constraint_for`. Knows
no route's body; what is wrong is named by the field that the caller gives.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from ...parallel.engine.constraint import MOST_GRAMMAR_BYTES, Constraint, Section
from ..harmony_header import CONSTRAIN
from ..json_grammar import flaw_of, json_grammar
from ..tokenizer import Tokenizer
from .errors import ApiError
from .tool_server import FUNCTIONS


@dataclass(frozen=True)
class Offered:
    """A function that the model may call. parameters: schema of its arguments, None or {} if it has none. strict: they
    are held to every keyword of it, else to those that a grammar can express. field: where the schema stands in the
    body, e.g. "tools.0.function.parameters"."""

    name: str
    parameters: Mapping[str, Any] | None
    strict: bool
    field: str


@dataclass(frozen=True)
class Named:
    """tool_choice: this function and no other."""

    name: str


@dataclass(frozen=True)
class Format:
    """The final text is JSON. schema: None for any object. strict, field: as of Offered."""

    schema: Mapping[str, Any] | None
    strict: bool
    field: str


ToolChoice = Literal["auto", "none", "required"] | Named

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def constraint_for(
    tokenizer: Tokenizer,
    tools: Sequence[Offered] = (),
    tool_choice: ToolChoice = "auto",
    response_format: Format | None = None,
    max_reasoning_tokens: int | None = None,
    builtins: Collection[str] = (),
) -> Constraint | None:
    """None if nothing is demanded that harmony and the prompt do not bring about by themselves: the common case, in
    which the engine waits for no grammar.

    builtins: tools that may be run on the way, in any case. required, or a name: analysis, if any, then one call. One
    call a turn is all that gpt-oss makes, which either value of parallel_tool_calls allows. Compiles each grammar once,
    to name the field of one that does not: call it in a thread. Raises ApiError 400.
    """
    called = _callable(tools, tool_choice)
    must_call = tool_choice == "required" or isinstance(tool_choice, Named)
    strict = any(tool.strict for tool in called)
    if not must_call and not strict and response_format is None and max_reasoning_tokens is None:
        return None
    words = _Words(tokenizer)
    sections = [Section((words.header("analysis"),), (words.end,), reasoning=True)]
    left = MOST_GRAMMAR_BYTES
    for tool in called:
        grammar = _grammar(tool.parameters or _NO_ARGUMENTS, tool.strict, tool.field, left)
        left -= len(grammar.encode())
        sections.append(Section(words.calls(tool.name), (words.call,), grammar))
    runs = tuple(header for tool in sorted(builtins) for header in words.runs(tool))
    if runs:
        sections.append(Section(runs, (words.call,)))
    if not must_call:
        if called:  # a preamble, said to the user before a call
            sections.append(Section((words.header("commentary"),), (words.end,)))
        grammar = ""
        if response_format is not None:
            schema = _ANY_OBJECT if response_format.schema is None else response_format.schema
            grammar = _grammar(schema, response_format.strict, response_format.field, left)
        sections.append(Section((words.header("final"),), (words.return_,), grammar))
    return Constraint(tuple(sections), words.opening, max_reasoning_tokens)


def _callable(tools: Sequence[Offered], tool_choice: ToolChoice) -> Sequence[Offered]:
    """The tools that this answer may call."""
    names = [tool.name for tool in tools]
    twice = next((tool for place, tool in enumerate(tools) if tool.name in names[:place]), None)
    if twice is not None:
        raise ApiError(400, f"tools: {twice.name!r} is there twice", "tools", "invalid_value")
    if tool_choice == "none":
        return ()
    if isinstance(tool_choice, Named):
        if tool_choice.name not in names:
            raise ApiError(400, f"tool_choice: no tool is named {tool_choice.name!r}", "tool_choice", "invalid_value")
        return [tool for tool in tools if tool.name == tool_choice.name]
    if tool_choice == "required" and not tools:
        raise ApiError(400, "tool_choice: required, and there are no tools", "tool_choice", "invalid_value")
    return tools


def _grammar(schema: Mapping[str, Any], strict: bool, field: str, most_bytes: int) -> str:
    """Raises ApiError 400 that names `field`."""
    try:
        grammar = json_grammar(schema, strict)
    except ValueError as error:
        raise _bad_schema(field, str(error)) from None
    if len(grammar.encode()) > most_bytes:
        raise _bad_schema(field, f"the schemas of a request are larger than {MOST_GRAMMAR_BYTES} bytes together")
    reason = flaw_of(grammar)
    if reason is not None:
        raise _bad_schema(field, reason)
    return grammar


def _bad_schema(field: str, reason: str) -> ApiError:
    return ApiError(400, f"{field}: this schema cannot be held to: {reason}", field, "invalid_schema")


class _Words:
    """Harmony's markup as token ids, each piece encoded by itself as in `harmony.render_message`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special
        self.end, self.call, self.return_ = (special[f"<|{word}|>"] for word in ("end", "call", "return"))
        self.opening = (special["<|start|>"], *tokenizer.encode("assistant"))

    def header(self, channel: str) -> tuple[int, ...]:
        special = self._tokenizer.special
        return (special["<|channel|>"], *self._tokenizer.encode(channel), special["<|message|>"])

    def calls(self, name: str) -> tuple[tuple[int, ...], ...]:
        """The recipient after the channel or, as harmony also has it, before."""
        to = f" to=functions.{name}"
        after = ["<|channel|>", f"commentary{to} ", CONSTRAIN, "json", "<|message|>"]
        before = [to, "<|channel|>", "commentary ", CONSTRAIN, "json", "<|message|>"]
        return tuple(tuple(self._spell(pieces)) for pieces in (after, before))

    def runs(self, tool: str) -> tuple[tuple[int, ...], ...]:
        """Of a built-in tool, as gpt-oss calls it, with and without the word for what it is given."""
        names = [tool if function == tool else f"{tool}.{function}" for function in FUNCTIONS[tool]]
        spelled = []
        for name, given in product(names, ("", " code")):
            spelled.append(["<|channel|>", f"analysis to={name}{given}", "<|message|>"])
            spelled.append([f" to={name}", "<|channel|>", f"analysis{given}", "<|message|>"])
        return tuple(tuple(self._spell(pieces)) for pieces in spelled)

    def _spell(self, pieces: Sequence[str]) -> Iterator[int]:
        special = self._tokenizer.special
        for piece in pieces:
            yield from (special[piece],) if piece in special else self._tokenizer.encode(piece)

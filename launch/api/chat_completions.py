"""/v1/chat/completions: a checked body -> tokens to answer, and pieces of answers -> its JSON, whole or as chunks."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

from ..harmony import ResponseFormat, StreamParser, render
from ..tokenizer import Tokenizer
from .answer import Arguments, Call, Content, End, Reasoning, Run, RunBegun, RunInput, RunOutput
from .chat import check_builtins, conversation, demands
from .constraint import constraint_for
from .content_tokens import ContentToken
from .generation import Head, Job, Pieces, make_choices, new_head
from .logprobs import chat_logprobs
from .reading import Reading
from .respond import TextEvent, event
from .schema import ChatRequest
from .served import Served


def chat_prompt(chat: ChatRequest, shown: ResponseFormat | None, served: Served) -> tuple[int, ...]:
    """shown: as of `chat.Demands`. Raises ApiError 400."""
    check_builtins(chat.tools or (), served)
    tools = [] if chat.tool_choice == "none" else chat.tools or []
    talk = conversation(chat.messages, tools, chat.reasoning_effort, date.today(), shown)
    return tuple(render(talk, served.tokenizer))


def chat_job(chat: ChatRequest, served: Served) -> Job:
    """Raises ApiError 400."""
    tokenizer = served.tokenizer
    wanted = demands(chat)
    prompt = chat_prompt(chat, wanted.shown, served)
    logprobs = chat.top_logprobs or 0 if chat.logprobs else None
    reading = Reading(
        parser=lambda repaired: StreamParser(tokenizer, on_repair=repaired),
        stops=chat.stops,
        functions=[tool.name for tool in wanted.tools] if chat.tool_choice != "none" else [],
        # Markup that ends an answer is for the parser, which knows what it means.
        unseen=set(chat.stop_token_ids or ()) - set(tokenizer.special.values()),
        keep_tokens=logprobs is not None,
        builtins=wanted.builtins,
        most_runs=chat.max_tool_calls,
    )
    choices = make_choices(
        chat,
        [prompt],
        served,
        reading,
        prompt_param="messages",
        max_tokens=chat.max_completion_tokens or chat.max_tokens,
        max_param="max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens",
        logprobs=logprobs,
        constraint=constraint_for(
            tokenizer,
            wanted.tools,
            wanted.tool_choice,
            wanted.response_format,
            chat.max_reasoning_tokens,
            wanted.builtins,
        ),
    )
    head = new_head("chatcmpl", served, choices, len(prompt))
    return Job(choices, ChatShape(head, len(choices), tokenizer, logprobs))


@dataclass
class _Said:
    """What one choice has said."""

    text: dict[type, str] = field(default_factory=lambda: {Reasoning: "", Content: ""})
    tokens: list[ContentToken] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    end: End | None = None


@dataclass(frozen=True)
class ChatShape:
    """logprobs: how many alternatives each token of content is given; None: content has no tokens."""

    head: Head
    choices: int
    tokenizer: Tokenizer
    logprobs: int | None

    async def whole(self, pieces: Pieces) -> dict[str, Any]:
        everyone = [_Said() for _ in range(self.choices)]
        async with aclosing(pieces):
            async for index, piece in pieces:
                said = everyone[index]
                match piece:
                    case Call():
                        said.calls.append(_call(piece) | {"function": {"name": piece.name, "arguments": ""}})
                    case Arguments():
                        said.calls[piece.index]["function"]["arguments"] += piece.text
                    case End():
                        said.end = piece
                    case RunInput():  # what it thinks, as much as the analysis that it stands in
                        said.text[Reasoning] += piece.text
                    case Run() | RunBegun() | RunOutput():
                        pass
                    case _:
                        said.text[type(piece)] += piece.text
                        said.tokens += piece.tokens if isinstance(piece, Content) else ()
        choices = [self._choice(index, said) for index, said in enumerate(everyone)]
        ends = [said.end for said in everyone if said.end is not None]
        return self.head.of("chat.completion") | {"choices": choices, "usage": self.head.usage(ends)}

    async def chunks(self, pieces: Pieces, include_usage: bool) -> AsyncGenerator[bytes]:
        def chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None) -> Any:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
            body = self.head.of("chat.completion.chunk") | {"choices": [choice]}
            return body | ({"usage": None} if include_usage else {})

        def grown(index: int, piece: Reasoning | Content | Arguments) -> bytes:
            """The event for more text, which is nearly all of a stream."""
            if isinstance(piece, Content) and self.logprobs is not None:
                return event(chunk(index, _delta(piece), logprobs=self._logprobs(piece.tokens)))
            kind = index, type(piece), piece.index if isinstance(piece, Arguments) else 0
            if kind not in texts:
                texts[kind] = TextEvent(lambda text: chunk(index, _delta(replace(piece, text=text))))
            return texts[kind](piece.text)

        texts: dict[tuple[int, type, int], TextEvent] = {}
        ends = []
        async with aclosing(pieces):
            for index in range(self.choices):
                yield event(chunk(index, {"role": "assistant", "content": ""}))
            async for index, piece in pieces:
                match piece:
                    case End():
                        ends.append(piece)
                        yield event(chunk(index, {}, piece.finish_reason))
                    case Call():
                        yield event(chunk(index, _delta(piece)))
                    case RunInput():
                        yield grown(index, Reasoning(piece.text))
                    case Run() | RunBegun() | RunOutput():
                        pass
                    case _:
                        yield grown(index, piece)
            if include_usage:
                usage = {"choices": [], "usage": self.head.usage(ends)}
                yield event(self.head.of("chat.completion.chunk") | usage)

    def _choice(self, index: int, said: _Said) -> dict[str, Any]:
        assert said.end is not None, "an answer ends with an End"
        content = said.text[Content] or (None if said.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        message |= _reasoning(said.text[Reasoning] or None) | ({"tool_calls": said.calls} if said.calls else {})
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(said.tokens),
            "finish_reason": said.end.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[ContentToken]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        return {"content": chat_logprobs(tokens, self.tokenizer, self.logprobs), "refusal": None}


def _delta(piece: Reasoning | Content | Call | Arguments) -> dict[str, Any]:
    match piece:
        case Reasoning():
            return _reasoning(piece.text)
        case Content():
            return {"content": piece.text}
        case Call():
            function = {"name": piece.name, "arguments": ""}
            return {"tool_calls": [{"index": piece.index} | _call(piece) | {"function": function}]}
        case Arguments():
            return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}


def _reasoning(text: str | None) -> dict[str, Any]:
    """Clients know it under one name or the other (vLLM: reasoning; SGLang, llama.cpp: reasoning_content)."""
    return {"reasoning_content": text, "reasoning": text}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function"}

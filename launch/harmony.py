"""Conversations <-> tokens in the harmony format, which gpt-oss speaks; the parser reads what the model streams.

The format: https://github.com/openai/harmony/blob/main/docs/format.md; token for token that of openai-harmony
0.0.8, which the tests hold it to. This module does no I/O and knows nothing of HTTP or of the engine:

    render          Conversation -> token ids, with the header of the answer if one is wanted
    StreamParser    token ids, one at a time -> Deltas; any sequence is accepted, none raises
"""

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..parallel.errors import UserError
from .harmony_header import CONSTRAIN, Header, Role, Segment, is_cut_word, is_hopeless, read_header
from .harmony_tools import BUILTIN_SECTIONS, FunctionTool, tools_section
from .tokenizer import Tokenizer

__all__ = [
    "REPAIRS",
    "Conversation",
    "Delta",
    "Developer",
    "FunctionTool",
    "Message",
    "ResponseFormat",
    "StreamParser",
    "System",
    "render",
    "render_message",
    "stop_tokens",
]


@dataclass(frozen=True)
class System:
    """The system message: who the model is and how hard it thinks. A user's "system prompt" is `Developer`.

    current_date: YYYY-MM-DD; None leaves the line out, so that equal conversations give equal tokens.
    builtin_tools: of "browser" and "python".
    """

    reasoning_effort: Literal["low", "medium", "high"] = "medium"
    current_date: str | None = None
    knowledge_cutoff: str = "2024-06"
    identity: str = "You are ChatGPT, a large language model trained by OpenAI."
    builtin_tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResponseFormat:
    """What the final answer has to look like, for the model to read. schema: JSON schema."""

    name: str
    schema: Mapping[str, Any]
    description: str = ""


@dataclass(frozen=True)
class Developer:
    """The developer message: instructions, the functions that the model may call, and the form of its answer."""

    instructions: str | None = None
    tools: tuple[FunctionTool, ...] = ()
    response_format: ResponseFormat | None = None


@dataclass(frozen=True)
class Message:
    """One message after the system and developer ones.

    name: the author's; a tool's result must carry its own, e.g. "functions.get_weather".
    recipient: who is called, e.g. "functions.get_weather"; for a tool's result "assistant".
    content_type: "<|constrain|>json" where the model constrains what follows, else plain words.
    """

    role: Role
    content: str
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    system: System = System()
    developer: Developer | None = None


def render(conversation: Conversation, tokenizer: Tokenizer, *, for_completion: bool = True) -> list[int]:
    """Token ids of a conversation. No text in it can become a special token.

    for_completion: reasoning that led to an earlier answer is left out, and <|start|>assistant ends the prompt
        (openai-harmony: render_conversation_for_completion with its default configuration). Otherwise every
        message is rendered and nothing is added (render_conversation with auto_drop_analysis=False).

    Raises UserError for a tool message without a name and for an unknown built-in tool.
    """
    ids = render_message(Message("system", _system_text(conversation)), tokenizer)
    if conversation.developer is not None:
        ids += render_message(Message("developer", _developer_text(conversation.developer)), tokenizer)
    messages = conversation.messages
    for message in _without_old_analysis(messages) if for_completion else messages:
        ids += render_message(message, tokenizer)
    if for_completion:
        ids += [tokenizer.special["<|start|>"], *tokenizer.encode("assistant")]
    return ids


def stop_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end the assistant's turn: <|return|>, <|call|> and <|endoftext|>; <|end|> ends a message only."""
    return tuple(tokenizer.special[spelling] for spelling in ("<|return|>", "<|call|>", "<|endoftext|>"))


def _without_old_analysis(messages: Sequence[Message]) -> Sequence[Message]:
    """Drops analysis before the first final message, if the assistant's last message is final.

    Reasoning of a turn that still calls tools stays (format guide, "Handling reasoning output in subsequent
    sampling"); that analysis *between* finals stays too is openai-harmony's rule, which the prompt has to match.
    """
    spoken = [message.channel for message in messages if message.role == "assistant"]
    if not spoken or spoken[-1] != "final":
        return messages
    first_final = next(place for place, message in enumerate(messages) if message.channel == "final")
    return [m for place, m in enumerate(messages) if place > first_final or m.channel != "analysis"]


def render_message(message: Message, tokenizer: Tokenizer) -> list[int]:
    """<|start|>{author} to={recipient}<|channel|>{channel} {type}<|message|>{content}<|end|>.

    Each piece is encoded by itself, as openai-harmony does: the cuts decide which tokens come out.
    """
    special, encode = tokenizer.special, tokenizer.encode
    ids = [special["<|start|>"]]
    if message.role == "tool":
        if not message.name:
            raise UserError(
                "a tool message has no name", 'give the tool that answers, e.g. name="functions.get_weather"'
            )
        ids += encode(message.name)
    else:
        ids += encode(message.role)
        if message.name is not None:
            ids += encode(f":{message.name}")
    if message.recipient is not None and message.recipient != "all":
        ids += encode(f" to={message.recipient}")
    if message.channel is not None:
        ids += [special["<|channel|>"], *encode(message.channel)]
    if message.content_type is not None:
        plain = message.content_type.removeprefix(CONSTRAIN)
        if plain == message.content_type:
            ids += encode(f" {plain}")
        else:
            ids += [*encode(" "), special[CONSTRAIN], *encode(plain)]
    ids += [special["<|message|>"], *encode(message.content)]
    calls = message.role == "assistant" and message.recipient is not None
    ids.append(special["<|call|>" if calls else "<|end|>"])
    return ids


def _system_text(conversation: Conversation) -> str:
    system, developer = conversation.system, conversation.developer
    unknown = sorted(set(system.builtin_tools) - set(BUILTIN_SECTIONS))
    if unknown:
        raise UserError(f"unknown built-in tool: {unknown[0]}", f"there are: {', '.join(sorted(BUILTIN_SECTIONS))}")
    about = [system.identity, f"Knowledge cutoff: {system.knowledge_cutoff}"]
    if system.current_date is not None:
        about.append(f"Current date: {system.current_date}")
    channels = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    if developer is not None and developer.tools:
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
    builtin = [BUILTIN_SECTIONS[tool] for tool in sorted(set(system.builtin_tools))]
    tools = ["# Tools", *builtin] if builtin else []
    return "\n\n".join(["\n".join(about), f"Reasoning: {system.reasoning_effort}", *tools, channels])


def _developer_text(developer: Developer) -> str:
    parts = [] if developer.instructions is None else ["# Instructions", developer.instructions]
    if developer.tools:
        parts += ["# Tools", tools_section("functions", "", developer.tools)]
    if (form := developer.response_format) is not None:  # format guide, "Structured output"
        described = [f"// {line}" for line in form.description.splitlines()]
        schema = json.dumps(form.schema, ensure_ascii=False, separators=(",", ":"))
        parts += ["# Response Formats", f"## {form.name}", "\n".join([*described, schema])]
    return "\n\n".join(parts)


Ended = Literal["end", "return", "call", "endoftext", "unfinished"]

CHANNELS = ("analysis", "commentary", "final")

# Kinds of places where a stream leaves the format. The first five are headers.
REPAIRS = {
    "no_message": "a header without <|message|>",
    "no_author": "a header without an author",
    "no_channel": "a header without a channel",
    "header": "words in a header that belong nowhere",
    "unknown_channel": "a channel that gpt-oss does not have",
    "no_start": "a header without <|start|>",
    "no_end": "a header in the middle of a message",
    "nothing_to_end": "the end of a message where none is open",
    "stray_token": "a special token where none belongs",
    "unknown_id": "an id that is in no vocabulary",
    "recipient": "a function called by another name than its own, or an answer that has a recipient",
    "not_offered": "a call of a function that was not offered",
}

_ENDS: dict[str, Ended] = {
    "<|end|>": "end",
    "<|return|>": "return",
    "<|call|>": "call",
    "<|endoftext|>": "endoftext",
}


@dataclass(frozen=True)
class Delta:
    """One step of a message: "start" once its header is read, "text" as it grows, "end" when it is over.

    index: the message's place among those parsed, from 0; the same in all of its deltas.
    text: with kind "text", whole characters, never empty.
    ended: with kind "end", which token ended it; "unfinished" if none did (max_tokens, or a new header).
    """

    kind: Literal["start", "text", "end"]
    channel: str | None
    recipient: str | None
    content_type: str | None
    text: str = ""
    role: Role = "assistant"
    name: str | None = None
    index: int = 0
    ended: Ended | None = None


class StreamParser:
    """Tokens in, deltas out. Accepts any ids in any order: text is delivered, the guesses are counted.

    prefix_role: the author that the prompt ended with (`<|start|>assistant`), or None if the stream begins with
        <|start|>. It is also the author of text that comes without any header.
    repairs: how often the stream left the format: one for each header that had to be guessed (no channel, no
        <|message|>, words that belong nowhere), for each lost <|start|> or <|end|>, for each special token where
        none belongs and for each id that is in no vocabulary. Output cut short by max_tokens is not one.
    on_repair: called for each, with its kind, one of REPAIRS.

    Text is held back only while it may still be a header; in a message each token's text comes out at once, but
    for the bytes of an unfinished character. Bytes that never become one are U+FFFD.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prefix_role: Role | None = "assistant",
        on_repair: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self.repairs = 0
        self._on_repair = on_repair
        self._tokenizer = tokenizer
        self._spelling = {token_id: spelling for spelling, token_id in tokenizer.special.items()}
        self._fallback_role: Role = prefix_role or "assistant"
        # The header being read, None between messages; its author, if the prompt has named one.
        self._header: list[Segment] | None = None if prefix_role is None else [("start", b"")]
        self._header_role: Role | None = prefix_role
        self._open: Delta | None = None  # the "start" of the message being read
        self._texts: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._done: list[Message] = []
        self._opening = b""

    @property
    def opening(self) -> bytes:
        """Of the open message: the text that was held back as a possible header until it began."""
        return self._opening

    def text_bytes(self, token_id: int) -> bytes:
        """What a token says where it is text; b"" for markup and for ids in no vocabulary."""
        return b"" if token_id in self._spelling else self._tokenizer.token_bytes(token_id)

    def repair(self, kind: str) -> None:
        """The stream left the format here; also for whoever reads its messages and has to guess."""
        self.repairs += 1
        self._on_repair(kind)

    @property
    def messages(self) -> list[Message]:
        """The messages that have ended; `finish` ends the last one."""
        return list(self._done)

    def feed(self, token_id: int) -> list[Delta]:
        """What one more token says."""
        spelling = self._spelling.get(token_id)
        if spelling is None:
            data = self._tokenizer.token_bytes(token_id)
            return self._say(data) if data and self._open is not None else self._plain(data)
        if spelling in _ENDS:
            return list(self._end(_ENDS[spelling]))
        step = _MARKUP.get(spelling)
        if step is None:
            return self._stray()
        return list(step(self))

    def finish(self) -> list[Delta]:
        """The stream is over: ends an unfinished message, and delivers text held back as a possible header.

        A header that was cut short is dropped: half a function's name is no call.
        """
        deltas = []
        if self._header is not None:
            text = read_header(self._header, self._header_role, complete=False).text
            if text and not is_cut_word(self._header, self._header_role, text):
                deltas += self._begin(complete=False)
        self._header = None
        if self._open is not None:
            deltas += self._close("unfinished")
        return deltas

    def _plain(self, data: bytes) -> list[Delta]:
        """Bytes that no message is open for: of a header."""
        if not data:
            self.repair("unknown_id")
            return []
        header = self._header_or_new()
        mark, before = header[-1]
        header[-1] = (mark, before + data)
        return list(self._begin(complete=False)) if is_hopeless(header, self._header_role) else []

    def _start(self) -> Iterator[Delta]:
        if self._open is not None or self._header is not None:
            yield from self._end("unfinished")
        self._header, self._header_role = [("start", b"")], None

    def _channel(self) -> Iterator[Delta]:
        if self._open is not None:  # <|end|><|start|>assistant got lost
            self.repair("no_end")
            yield from self._close("unfinished")
            self._header, self._header_role = [("start", b"")], self._fallback_role
        self._header_or_new().append(("channel", b""))

    def _constrain(self) -> Iterator[Delta]:
        if self._open is not None:
            yield from self._stray()
        else:
            self._header_or_new().append(("constrain", b""))

    def _message(self) -> Iterator[Delta]:
        if self._open is not None:
            yield from self._stray()
        else:
            self._header_or_new()
            yield from self._begin(complete=True)

    def _end(self, ended: Ended) -> Iterator[Delta]:
        """Ends the message; a header without <|message|> is one too, if it says or addresses anything."""
        if self._header is not None:
            header = read_header(self._header, self._header_role, complete=False)
            if header.text or header.channel or header.recipient:
                yield from self._begin(complete=False)
            self._header = None
        elif ended == "unfinished":
            self.repair("no_end")  # a new header, while a message is open
        if self._open is None:
            self.repair("nothing_to_end")
        else:
            yield from self._close(ended)

    def _stray(self) -> list[Delta]:
        """A special token where none belongs is dropped."""
        self.repair("stray_token")
        return []

    def _header_or_new(self) -> list[Segment]:
        """The header being read; between messages a new one, whose <|start|> got lost."""
        if self._header is None:
            self.repair("no_start")
            self._header, self._header_role = [("start", b"")], None
        return self._header

    def _begin(self, complete: bool) -> Iterator[Delta]:
        """Header -> message. complete: by <|message|>, as it should be. A header counts as one repair at most."""
        header = read_header(self._header or [], self._header_role, complete)
        role = header.role or self._fallback_role
        if kind := _header_repair(header, role, complete):
            self.repair(kind)
        self._header = None
        self._opening = header.text
        self._open = Delta(
            "start",
            header.channel,
            header.recipient,
            header.content_type,
            role=role,
            name=header.name,
            index=len(self._done),
        )
        yield self._open
        if header.text:
            yield from self._say(header.text)

    def _say(self, data: bytes, final: bool = False) -> list[Delta]:
        assert self._open is not None
        text = self._utf8.decode(data, final)
        if not text:
            return []
        self._texts.append(text)
        start = self._open
        # Not `replace`, which takes three times as long: this is done for each token.
        role, name, index = start.role, start.name, start.index
        return [Delta("text", start.channel, start.recipient, start.content_type, text, role, name, index)]

    def _close(self, ended: Ended) -> Iterator[Delta]:
        assert self._open is not None
        yield from self._say(b"", final=True)
        start = self._open
        yield replace(start, kind="end", ended=ended)
        self._done.append(
            Message(start.role, "".join(self._texts), start.name, start.channel, start.recipient, start.content_type)
        )
        self._open, self._texts = None, []


def _header_repair(header: Header, role: Role, complete: bool) -> str | None:
    """What is wrong with a header, the worst of it; None if nothing is."""
    if not complete:
        return "no_message"
    # Format guide: every message names its author, and the assistant's a channel.
    if header.role is None:
        return "no_author"
    if role == "assistant" and header.channel is None:
        return "no_channel"
    if header.repaired:
        return "header"
    return "unknown_channel" if role == "assistant" and header.channel not in CHANNELS else None


_MARKUP = {
    "<|start|>": StreamParser._start,
    "<|message|>": StreamParser._message,
    "<|channel|>": StreamParser._channel,
    "<|constrain|>": StreamParser._constrain,
}

"""Reads the header of a harmony message, however the model has spelled it; nothing is an error here.

A well-formed header lies between <|start|> and <|message|> and reads
`assistant to=functions.f<|channel|>commentary <|constrain|>json`, the recipient before or after the channel
(https://github.com/openai/harmony/blob/main/docs/format.md, "Receiving tool calls"). What models write instead
is collected in openai/harmony#38 #48 #60 #82, vllm#43408 #51977, llama.cpp#27720. Whatever cannot be read as a
header is handed back as text. This module knows bytes and the three marks, not token ids.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]
Mark = Literal["start", "channel", "constrain"]
Segment = tuple[Mark, bytes]  # a mark and the plain bytes after it

CONSTRAIN = "<|constrain|>"  # how a constrained content type is spelled in `content_type`, as openai-harmony does

_MAX_BYTES = 512  # a function name has at most 64 characters; a header this long is a lost <|message|>
_MAX_WORDS: dict[Mark, int] = {"start": 3, "channel": 3, "constrain": 2}  # e.g. `commentary to=functions.f json`
# The author as a word of its own, perhaps with a name, or glued to the next word (`assistantassistant`).
_ROLE = re.compile(
    rb"(system|developer|user|assistant|tool)(?::([^\s:]+)|(?=\s|$|to=|assistant|analysis|commentary|final))"
)
_RECIPIENT = re.compile(rb'to=([^\s{"]*)')
_CHANNEL = re.compile(rb"analysis|commentary|final")
_BARE_RECIPIENT = re.compile(rb"(?:functions|browser|python)(?:\.[\w.-]+)?")
_CONTENT_TYPE = re.compile(rb"[\w/+.-]+")
_KNOWN_CONTENT_TYPES = (b"json", b"code", b"text")
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_OWN_WORDS = (b"to=", b"analysis", b"commentary", b"final", *_KNOWN_CONTENT_TYPES, *map(str.encode, _ROLES))


@dataclass(frozen=True)
class Header:
    """What a header said. text: bytes in it that are no header; repaired: whether anything had to be guessed."""

    role: Role | None = None
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    text: bytes = b""
    repaired: bool = False


def read_header(segments: Sequence[Segment], role: Role | None, complete: bool) -> Header:
    """The header that `segments` spell.

    role: the author if it is known before the header (the prompt ended with it), else None; the result's role
        is None if the header does not say it either.
    complete: <|message|> has followed. If not, only what can be nothing but markup is taken for it (`to=`, the
        names of roles and channels); any other word is text.
    """
    header = Header(role=role)
    sole_channel = [mark for mark, _ in segments].count("channel") == 1
    for place, (mark, rest) in enumerate(segments):
        bounded = complete or place + 1 < len(segments)
        if mark == "channel":
            header, rest = _read_channel(header, rest, any_name=complete and sole_channel)
        elif mark == "constrain":
            header, rest = _read_constrained(header, rest, complete)
        header = _read_words(header, rest, bounded, complete, first=place == 0)
    return header


def is_hopeless(segments: Sequence[Segment], role: Role | None) -> bool:
    """Whether no continuation can make a header of this, so that its text need not be held back any longer."""
    mark, text = segments[-1]
    text = text.lstrip()
    if len(segments) == 1 and role is not None and text:
        # The author is known, so only a recipient, a name or the author once more may come before the channel.
        openers = (b"to=", b":", role.encode())
        if not any(text.startswith(opener) or opener.startswith(text) for opener in openers):
            return True
    return (
        sum(len(part) for _, part in segments) > _MAX_BYTES
        or len(text.split()) > _MAX_WORDS[mark]
        or b"\n" in text.rstrip()
        or b"{" in text
    )


def is_cut_word(segments: Sequence[Segment], role: Role | None, text: bytes) -> bool:
    """Whether `text`, left over at the end of all output, is only the beginning of one of the header's own words.

    Not before any mark: then it may as well be the whole of a very short answer.
    """
    return (len(segments) > 1 or role is None) and any(word.startswith(text.strip()) for word in _OWN_WORDS)


def _read_channel(header: Header, rest: bytes, any_name: bool) -> tuple[Header, bytes]:
    """Takes the channel's name off `rest`, one that is not gpt-oss's if `any_name`; a second wins over the first."""
    word = rest.lstrip()
    known = _CHANNEL.match(word)
    if known:
        twice = header.channel is not None
        return replace(header, channel=known[0].decode(), repaired=header.repaired or twice), word[known.end() :]
    unknown = _CONTENT_TYPE.match(word) if any_name else None
    if unknown and not word.startswith(b"to="):
        return replace(header, channel=_decode(unknown[0])), word[unknown.end() :]
    return replace(header, repaired=True), word


def _read_constrained(header: Header, rest: bytes, complete: bool) -> tuple[Header, bytes]:
    """Takes the content type off `rest`, as in `<|constrain|>json`; sampled with and without a space."""
    word = rest.lstrip()
    found = _CONTENT_TYPE.match(word)
    fits = found and (found[0] in _KNOWN_CONTENT_TYPES or complete) and not word.startswith(b"to=")
    if found and fits and header.content_type is None:
        return replace(header, content_type=CONSTRAIN + _decode(found[0])), word[found.end() :]
    return header, word


def _read_words(header: Header, rest: bytes, bounded: bool, complete: bool, first: bool) -> Header:
    """Reads plain words until one is no header; that one and all after it are text.

    bounded: a mark follows, so that the words are a whole stretch of header and not the start of an answer.
    """
    role_open = first and header.role is None  # the first word after <|start|> is the author
    taken = not first
    while word := rest.lstrip():
        step = _read_word(header, word, bounded, complete, role_open, first)
        if step is None:
            # The blank before a text separates it from the header, unless there is no header.
            text = word if taken or role_open else rest
            return replace(header, text=header.text + text, repaired=True)
        header, rest = step
        role_open, taken = False, True
    return header


def _read_word(
    header: Header, word: bytes, bounded: bool, complete: bool, role_open: bool, first: bool
) -> tuple[Header, bytes] | None:
    """The header with its next word read and what is left of `word`, or None if it is no header's word."""
    whole = word.split(maxsplit=1)[0]
    after = word[len(whole) :]
    if found := _RECIPIENT.match(word):
        return replace(header, recipient=_decode(found[1]) or header.recipient), word[found.end() :]
    if found := _ROLE.match(word):
        role = _ROLES[found[1].decode()]
        repaired = header.repaired or found[0] != whole
        if role_open:
            name = _decode(found[2]) if found[2] else None
            return replace(header, role=role, name=name, repaired=repaired), word[found.end() :]
        if first and bounded and role == header.role:
            return replace(header, repaired=repaired), word[found.end() :]
    if role_open and complete and (b"." in whole or after.lstrip().startswith(b"to=")):
        return replace(header, role="tool", name=_decode(whole)), after  # a tool's message is headed by its name
    if not complete:
        return None
    if whole in (b"analysis", b"commentary", b"final"):  # <|channel|> got lost, or its name came twice
        return replace(header, channel=header.channel or whole.decode(), repaired=True), after
    if header.recipient is None and _BARE_RECIPIENT.fullmatch(whole):
        return replace(header, recipient=_decode(whole), repaired=True), after
    if header.content_type is None and not after.strip() and _CONTENT_TYPE.fullmatch(whole):
        if header.recipient is not None:
            return replace(header, content_type=_decode(whole)), after
        if whole in _KNOWN_CONTENT_TYPES:
            return replace(header, content_type=_decode(whole), repaired=True), after
    return None


def _decode(word: bytes) -> str:
    return word.decode("utf-8", "replace")

"""Which tokens make up an answer's content, each handed out together with the first of its text that is shown.

A token is no piece of text: some hold half a character, some are held back as a possible header or stop string. Kept
here are those that were said and not shown yet. Knows neither harmony's rules nor HTTP.
"""

import codecs
from collections import deque
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ContentToken:
    """logprob, top: as in `request.Token`. offset: in the content, of the character where its text begins."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int = 0


class Telling(Protocol):
    """A parser that tells where text comes from.

    text_bytes: what a token says as text, b"" if it is markup. opening: of the open message, the text that was held
    back as a possible header until it began.
    """

    @property
    def opening(self) -> bytes: ...
    def text_bytes(self, token_id: int) -> bytes: ...


class ContentTokens:
    """Told of each token and of all content, in order. Joined, the bytes of the tokens are the content's, but for bytes
    that are no UTF-8 and for a last token that a stop string cuts."""

    def __init__(self, parser: Telling) -> None:
        self._parser = parser
        self._held: list[tuple[ContentToken, bytes]] = []  # between messages: a header's, or the next one's opening
        self._said: deque[ContentToken] = deque()
        self._said_chars = 0
        self._shown_chars = 0

    def token(self, token: ContentToken, place: str | None) -> None:
        """Before the parser has it. place: of the open message, "content" or another; None between messages."""
        data = self._parser.text_bytes(token.id)
        if data and place is None:
            self._held.append((token, data))
        elif data and place == "content":
            self._say(token, self._said_chars)

    def begin(self, place: str) -> None:
        """A message begins, with those that were held back for it."""
        opening = self._parser.opening if place == "content" else b""
        first, size = len(self._held), 0
        while first and size < len(opening):
            first -= 1
            size += len(self._held[first][1])
        utf8, chars = codecs.getincrementaldecoder("utf-8")("replace"), self._said_chars
        skipped = max(size - len(opening), 0)  # what the first one says before the opening was header
        for token, data in self._held[first:]:
            self._say(token, chars)
            chars += len(utf8.decode(data[skipped:]))
            skipped = 0
        self._held.clear()

    def say(self, text: str) -> None:
        """Content, in whole characters, before stop strings are looked for in it."""
        self._said_chars += len(text)

    def show(self, text: str) -> tuple[ContentToken, ...]:
        """The tokens that begin in `text`, which is shown now."""
        self._shown_chars += len(text)
        shown = []
        while self._said and self._said[0].offset < self._shown_chars:
            shown.append(self._said.popleft())
        return tuple(shown)

    def _say(self, token: ContentToken, offset: int) -> None:
        self._said.append(ContentToken(token.id, token.logprob, token.top, offset))

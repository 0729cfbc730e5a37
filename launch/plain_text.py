"""Reads a stream that is no harmony conversation: all of it is content, special tokens by their spelling.

Has the shape of `harmony.StreamParser`.
"""

import codecs

from .harmony import Delta
from .tokenizer import Tokenizer


class PlainText:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.opening = b""  # what the first token says: the one message begins with it
        self._tokenizer = tokenizer
        self._begun = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def text_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def feed(self, token_id: int) -> list[Delta]:
        data = self.text_bytes(token_id)
        start = []
        if not self._begun:
            self._begun, self.opening = True, data
            start = [Delta("start", "final", None, None)]
        return start + self._text(self._utf8.decode(data))

    def finish(self) -> list[Delta]:
        return self._text(self._utf8.decode(b"", True))

    def repair(self, kind: str) -> None:
        """Nothing is guessed here."""

    def _text(self, text: str) -> list[Delta]:
        return [Delta("text", "final", None, None, text)] if text else []

"""Which tokens may come next in one answer, by its Constraint: a state machine over token ids.

Where one of several headers may come, or the opening, it says which tokens go on with one of them; inside a section the
text of a grammar asks the grammar, any other text takes every token that is no markup. Knows no library and no text:
grammars are values that give masks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .constraint import Constraint, Section


class Grammar(Protocol):
    """One text, as far as it is. Everything raises DeadEndError where the grammar cannot go on."""

    def mask(self) -> bytes:
        """A bit a token that may come next, lowest bit first, in whole 32-bit words; may hold markup as well."""
        ...

    @property
    def satisfied(self) -> bool:
        """Whether the text may end here."""
        ...

    def accept(self, token: int) -> None: ...


class DeadEndError(Exception):
    """No token may come next. The message says why."""


@dataclass(frozen=True)
class Alphabet:
    """text: a bit a token that is no markup, in whole 32-bit words; which tokens may stand in a text."""

    text: bytes

    def only(self, tokens: Iterable[int]) -> bytes:
        return self._with(bytes(len(self.text)), tokens)

    def text_or(self, tokens: Iterable[int]) -> bytes:
        return self._with(self.text, tokens)

    def within(self, mask: bytes, tokens: Iterable[int]) -> bytes:
        """What is text in `mask`, and `tokens`."""
        size = len(self.text)
        both = int.from_bytes(mask[:size], "little") & int.from_bytes(self.text, "little")
        return self._with(both.to_bytes(size, "little"), tokens)

    @staticmethod
    def _with(mask: bytes, tokens: Iterable[int]) -> bytes:
        bits = bytearray(mask)
        for token in tokens:
            bits[token >> 3] |= 1 << (token & 7)
        return bytes(bits)


class Structure:
    """One answer, as far as it is. grammar_of: a fresh one for a section that has a grammar."""

    def __init__(
        self, constraint: Constraint, alphabet: Alphabet, grammar_of: Callable[[Section], Grammar | None]
    ) -> None:
        self._constraint = constraint
        self._alphabet = alphabet
        self._grammar_of = grammar_of
        self._reasoned = 0  # tokens of reasoning so far
        # Between sections: what may come, as sequences that each lead into a section, and how much of them has come.
        self._paths: list[tuple[tuple[int, ...], Section]] = self._headers(constraint.sections)
        self._passed = 0
        # In a section:
        self._section: Section | None = None
        self._grammar: Grammar | None = None

    def allowed(self) -> bytes:
        """A bit a token that may come next; at least one. Raises DeadEndError."""
        section = self._section
        if section is None:
            return self._alphabet.only({path[self._passed] for path, _ in self._paths})
        if self._grammar is not None:
            mask = self._alphabet.within(self._grammar.mask(), section.ends if self._grammar.satisfied else ())
            if not any(mask):
                raise DeadEndError("no token of the vocabulary continues what the grammar asks for")
            return mask
        limit = self._constraint.max_reasoning_tokens
        if section.reasoning and limit is not None and self._reasoned >= limit - 1:
            return self._alphabet.only(section.ends)
        return self._alphabet.text_or(section.ends)

    def accept(self, token: int) -> None:
        """`token` has come; it was allowed. One that ends the answer need not be told. Raises DeadEndError."""
        section = self._section
        if section is None:
            self._paths = [one for one in self._paths if one[0][self._passed] == token]
            self._passed += 1
            if not self._paths:
                raise DeadEndError(f"token {token} begins no message that may come here")
            whole = next((entered for path, entered in self._paths if len(path) == self._passed), None)
            if whole is not None:
                self._section, self._grammar = whole, self._grammar_of(whole)
            return
        self._reasoned += section.reasoning
        if token in section.ends:
            after = [one for one in self._constraint.sections if not (one.reasoning and section.reasoning)]
            opening = self._constraint.opening
            self._paths = [(opening + header, entered) for header, entered in self._headers(after)]
            self._passed, self._section, self._grammar = 0, None, None
        elif self._grammar is not None:
            self._grammar.accept(token)

    def _headers(self, sections: Sequence[Section]) -> list[tuple[tuple[int, ...], Section]]:
        limit = self._constraint.max_reasoning_tokens
        spent = limit is not None and self._reasoned >= limit
        return [(header, one) for one in sections if not (one.reasoning and spent) for header in one.headers]

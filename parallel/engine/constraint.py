"""What an answer must look like: the messages that it may consist of, and what may stand in each.

Token ids and grammars only, made by whoever knows the format of answers and the tokenizer. `matcher` runs it, and
`grammars` compiles what it names.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

MOST_GRAMMAR_BYTES = 128 << 10  # of a request, all its grammars together; bounds their compiling to about 2 s


@dataclass(frozen=True)
class Section:
    """One kind of message.

    headers: sequences of token ids, one of which begins it; no header of a Constraint begins another. ends: ids, one
    of which ends it. grammar: of its text, as llguidance reads it (JSON); "": text without markup, of any length. The
    text of a grammar ends only where the grammar is satisfied. reasoning: counts against the budget, and no other such
    section follows it at once.
    """

    headers: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    grammar: str = ""
    reasoning: bool = False


@dataclass(frozen=True)
class Constraint:
    """Sections follow each other in any order, with `opening` between two, until a stop token of the request comes.

    max_reasoning_tokens: of all reasoning sections together, their headers not counted, their ends counted; with 0
    there is none. None: no bound.
    """

    sections: tuple[Section, ...]
    opening: tuple[int, ...]
    max_reasoning_tokens: int | None = None


def flaw(constraint: Constraint, stop_tokens: Collection[int], vocab: int) -> str | None:
    """Why no answer can be drawn under it; None if it can be tried. Whether grammars compile is not looked at."""
    sections = constraint.sections
    size_bytes = sum(len(section.grammar.encode()) for section in sections)
    if size_bytes > MOST_GRAMMAR_BYTES:
        return f"grammars of {size_bytes} bytes, and {MOST_GRAMMAR_BYTES} is the most"
    outside = next((token for token in _tokens(constraint) if not 0 <= token < vocab), None)
    if outside is not None:
        return f"token id {outside} of the constraint is outside the vocabulary of {vocab}"
    headers = sorted(header for section in sections for header in section.headers)
    clash = any(after[: len(before)] == before for before, after in zip(headers, headers[1:], strict=False))
    if clash or () in headers or any(not section.ends for section in sections):
        return "a constraint whose headers begin each other, or with a section that cannot end"
    if not any(set(section.ends) & set(stop_tokens) and not section.reasoning for section in sections):
        return "a constraint under which no answer ends"
    if (constraint.max_reasoning_tokens or 0) < 0:
        return f"max_reasoning_tokens {constraint.max_reasoning_tokens} is less than 0"
    return None


def _tokens(constraint: Constraint) -> Iterator[int]:
    yield from constraint.opening
    for section in constraint.sections:
        yield from section.ends
        for header in section.headers:
            yield from header

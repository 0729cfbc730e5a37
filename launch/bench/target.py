"""What a benchmark asks of whatever it measures: prompts, and streams of tokens with the time that each came.

Knows neither engines nor HTTP.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .rows import About

PEERS_IDS = (1000, 190_000)  # token ids of random prompts, as the peers' benches draw them


@dataclass(frozen=True)
class Sample:
    """One stream. Times in seconds of time.perf_counter.

    came_s: of each piece that brought text or a token. tokens: of the answer; a piece may hold several, or a token no
    text. prompt_tokens: as the target counted them. error: why there is no whole answer, in a few words.
    """

    sent_s: float
    ended_s: float
    came_s: tuple[float, ...] = ()
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""

    @property
    def first_s(self) -> float | None:
        """From sending to the first token, or to the end where the one token had no text."""
        if self.error:
            return None
        return (self.came_s[0] if self.came_s else self.ended_s) - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [late - early for early, late in zip(self.came_s, self.came_s[1:], strict=False)]


@dataclass(frozen=True)
class Room:
    """What a target takes. None: not known."""

    context_tokens: int | None = None
    sequences: int | None = None


@dataclass(frozen=True)
class Prompt:
    """ids, or words where a target takes no ids. tokens: how many that should be."""

    tokens: int
    ids: tuple[int, ...] = ()
    text: str = ""


class Target(Protocol):
    """Something to measure."""

    @property
    def about(self) -> About: ...

    @property
    def room(self) -> Room: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def prompt(self, tokens: int, draw: random.Random) -> Prompt:
        """A prompt that was never sent before, so that no cache of prefixes holds it."""
        ...

    async def stream(self, prompt: Prompt, new: int) -> Sample:
        """The answer of `new` tokens at temperature 1. What goes wrong with it is told in the sample."""
        ...


def id_range(vocab: int) -> tuple[int, int]:
    """First token id of random prompts and the one after the last: ordinary ids, no markup, which stands last."""
    return PEERS_IDS if vocab >= PEERS_IDS[1] else (0, vocab * 9 // 10)


def random_ids(tokens: int, ids: tuple[int, int], draw: random.Random) -> tuple[int, ...]:
    return tuple(draw.randrange(*ids) for _ in range(tokens))


@dataclass(frozen=True)
class Progress:
    """Where a benchmark tells how far it is. step: called when a run is over. doing: what comes next."""

    step: Callable[[], object] = lambda: None
    doing: Callable[[str], object] = lambda text: None

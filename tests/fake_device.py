"""A model without arithmetic, for the scheduler and the cache: the next token is a hash of the sequence.

It sees what a real device sees, the words of a record, and keeps what a real device keeps: pages, page tables, the last
token of each row, counts of penalised tokens. A slot of a page holds the hash of all tokens up to its own; whoever
reads a page that is not what its table says, or that somebody else has written, gets other tokens than alone.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from gptoss_launch.parallel.engine.record import ANSWER, KINDS, PROMPT, Record, Sizes, places
from gptoss_launch.parallel.engine.request import Request
from gptoss_launch.parallel.engine.schedule import Result


def mix(state: int, token: int) -> int:
    return int.from_bytes(hashlib.blake2b(struct.pack("<Qq", state, token), digest_size=8).digest(), "little")


def draw(state: int, counts: Counter[int], bias: Sequence[tuple[int, float]], allowed: Sequence[int], seed: int) -> int:
    """What the fake model says after a sequence: a choice among `allowed` that every input changes."""
    for token, count in sorted(counts.items()):
        state = mix(mix(state, token), count)
    for token, value in bias:
        state = mix(mix(state, token), int(value))
    return allowed[mix(state, seed) % len(allowed)]


def repeated(prompt: Iterable[int], answer: Iterable[int]) -> Counter[int]:
    """For a penalty that takes the prompt in: each token of either once, whatever else is counted."""
    return Counter(dict.fromkeys({*prompt, *answer}, 1))


@dataclass
class EveryThird:
    """A grammar: after token t only those that are t modulo 3."""

    vocab: int
    last: int

    def tokens(self) -> list[int]:
        return [token for token in range(self.vocab) if token % 3 == self.last % 3]

    def allowed(self) -> bytes:
        bits = sum(1 << token for token in self.tokens())
        return bits.to_bytes(-(-self.vocab // 32) * 4, "little")

    def accept(self, token: int) -> None:
        assert token % 3 == self.last % 3, "a token that the grammar does not allow"
        self.last = token

    def drop(self) -> None:
        pass


def matcher_of(request: Request, vocab: int) -> EveryThird | None:
    """Requests whose id ends in "g" have a grammar."""
    return EveryThird(vocab, request.prompt_tokens[-1]) if request.id.endswith("g") else None


def alone(request: Request, vocab: int) -> list[int]:
    """The answer of a request that nobody disturbs."""
    state, tokens = 0, list(request.prompt_tokens)
    for token in tokens:
        state = mix(state, token)
    answer: list[int] = []
    matcher = matcher_of(request, vocab)
    sampling = request.sampling
    penalised = bool(sampling.presence or sampling.frequency)
    while len(answer) < request.max_tokens:
        allowed = list(range(vocab)) if matcher is None else matcher.tokens()
        counts = Counter(answer) if penalised else Counter()
        if sampling.repetition != 1:
            counts = repeated(request.prompt_tokens, answer) + counts
        token = draw(state, counts, request.sampling.logit_bias, allowed, request.sampling.seed)
        answer.append(token)
        if token in request.stop_tokens:
            break
        if matcher is not None:
            matcher.accept(token)
        state = mix(state, token)
    return answer


@dataclass(frozen=True)
class Done:
    outcome: tuple[Result, ...]

    def results(self, count: int) -> list[Result]:
        assert count <= len(self.outcome)
        return list(self.outcome[:count])


@dataclass
class FakeDevice:
    """insufficient: whether a draw's first candidates do not suffice, by step and draw."""

    sizes: Sizes
    window_tokens: int
    insufficient: Callable[[], bool] = lambda: False
    steps: int = 0
    tokens: int = 0
    _pages: dict[tuple[int, int], int] = field(default_factory=dict)  # (page, offset) -> hash
    _tables: dict[int, int] = field(default_factory=dict)  # flat entry -> page
    _last: Counter[int] = field(default_factory=Counter)
    _counts: dict[int, Counter[int]] = field(default_factory=dict)
    _prompts: dict[int, set[int]] = field(default_factory=dict)
    _biases: dict[int, list[tuple[int, float]]] = field(default_factory=dict)

    def launch(self, record: Record) -> Done:
        head, words, at = record.head, record.words, places(record.head)

        def column(name: str) -> list[int]:
            return words[at[name]].tolist()

        def floats(name: str) -> list[float]:
            return list(struct.unpack(f"={at[name].stop - at[name].start}f", words[at[name]].tobytes()))

        self.steps += 1
        self._tables |= zip(column("entry"), column("page"), strict=True)
        for row in column("reset_row"):
            self._counts[row], self._prompts[row] = Counter(), set()
        for row in set(column("bias_row")):
            self._biases[row] = []
        for row, token, value in zip(column("bias_row"), column("bias_token"), floats("bias_value"), strict=True):
            self._biases[row].append((token, value))

        states = []
        rows = column("row")
        self.tokens += sum(row != self.sizes.rows for row in rows)
        fed = zip(rows, column("position"), column("token"), column("counted"), strict=True)
        for row, position, token, counted in fed:
            token = self._last[row] if token < 0 else token
            state = 0 if row == self.sizes.rows or not position else self._read(row, position - 1, "full")
            state = mix(state, token)
            for kind in KINDS:
                self._pages[self._slot(row, position, kind)] = state
            if row != self.sizes.rows:
                for seen in range(max(0, position - self.window_tokens + 1), position):
                    assert self._read(row, seen, "window") == self._read(row, seen, "full")
            if counted == ANSWER:
                self._counts[row][token] += 1
            elif counted == PROMPT:
                self._prompts[row].add(token)
            states.append(state)

        masks = {}
        for index, draw_index in enumerate(column("masked_draw")):
            begin = at["mask"].start + index * head.mask_words
            bits = int.from_bytes(words[begin : begin + head.mask_words].tobytes(), "little")
            masks[draw_index] = [token for token in range(self.sizes.vocab) if bits >> token & 1]
        penalised = [bool(a or b) for a, b in zip(floats("presence"), floats("frequency"), strict=True)]
        everything = list(range(self.sizes.vocab))
        outcome = []
        for index, (place, row, biased) in enumerate(
            zip(column("at"), column("draw_row"), column("biased"), strict=True)
        ):
            assert rows[place] == row
            seed = struct.unpack("=q", words[at["seed"]][2 * index : 2 * index + 2].tobytes())[0]
            counts = self._counts[row] if penalised[index] else Counter()
            if floats("repetition")[index] != 1:
                assert head.repeats
                counts = repeated(self._prompts[row], self._counts[row]) + counts
            bias = self._biases[row] if biased else []
            token = draw(states[place], counts, bias, masks.get(index, everything), seed)
            complete = bool(head.exact) or not self.insufficient()
            token = token if complete else (token + 1) % self.sizes.vocab
            self._last[row] = token
            outcome.append(Result(token, complete))
        return Done(tuple(outcome))

    def _slot(self, row: int, position: int, kind: str) -> tuple[int, int]:
        index, offset = divmod(position, self.sizes.page_tokens)
        if row == self.sizes.rows:
            return self.sizes.scratch_page, offset
        entry = (KINDS.index(kind) * (self.sizes.rows + 1) + row) * self.sizes.row_pages + index
        return self._tables[entry], offset

    def _read(self, row: int, position: int, kind: str) -> int:
        return self._pages[self._slot(row, position, kind)]

"""A step as numbers: what the leader tells every rank, itself included, and what goes to the device as it is.

One array of int32 words: a head, then columns one after the other, whose lengths the head tells; never more than
`Sizes.words`. A step that a CUDA graph runs is padded to the graph's size with tokens of the scratch row, decodes or
one more chunk, so that the columns that it reads, which come first, begin where it expects them. Floats are stored by
their bits. Host arithmetic alone.
"""

import struct
from array import array
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from itertools import accumulate

from ..kernels.batch import Chunk, most_tiles, tiles
from .request import MOST_BIASES, Request, Sampling
from .schedule import Item, Running, Step

WORD_BYTES = 4
KINDS = ("window", "full")  # the order of the page tables on the device
# The leader launches step n once it has the results of step n - 2, for which every rank had to read that record. So
# nobody is more than two steps behind, and what a step uses can be used again this many steps later.
RING_STEPS = 4
LAST_NUMBER = (1 << 31) - RING_STEPS  # of a step, in a word; whole rounds of rings, so that no place comes early
PLAIN = Sampling()
ANSWER, PROMPT = 1, 2  # in the column `counted`: what a token counts as part of; 0: it does not count


@dataclass(frozen=True)
class Head:
    """number: of the step. decodes: tokens that are one of a sequence each, they come first. graph: the tokens that the
    step was padded to, 0 if it was not. most_logprobs: -1 where nobody wants any. adjusts: some draw has penalties,
    biases or a mask; repeats: some draw has a penalty that takes prompts in. The rest are lengths: of groups of
    columns, tiles padded too, and of the whole record in words.
    """

    number: int
    decodes: int
    graph: int
    exact: int
    candidates: int
    min_p: int
    adjusts: int
    repeats: int
    counts: int
    most_logprobs: int
    tokens: int
    changes: int
    draws: int
    resets: int
    biases: int
    chunks: int
    tiles: int
    masks: int
    mask_words: int
    words: int


HEAD_WORDS = len(fields(Head))
DECODES = slice(1, 2)  # where a record says how many there are

# Groups of columns in order: name of their length in Head, then the columns.
COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("tokens", ("token", "position", "row", "counted")),  # token -1: the one that was drawn last in this row
    ("tiles", ("tile",) * 4),  # rows of Batch.tiles_X4, as they are
    ("draws", ("seed",) * 2 + ("at", "draw_row", "draw_position", "top_k", "biased")),  # seed: int64s, see `places`
    ("draws", ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")),  # fp32
    ("changes", ("entry", "page")),  # of both page tables as one flat array
    ("resets", ("reset_row",)),
    ("biases", ("bias_row", "bias_place", "bias_token", "bias_value")),  # bias_value: fp32
    ("chunks", ("start", "stop", "chunk_row", "length")),
    ("masks", ("masked_draw",)),
)


@dataclass(frozen=True)
class Sizes:
    """Capacities. rows: sequences; row number `rows` is the scratch row, whose entries are all the scratch page.
    row_pages: entries of a row in each page table."""

    rows: int
    row_pages: int
    scratch_page: int
    step_tokens: int
    page_tokens: int
    vocab: int
    most_biased: int = 4  # sequences with biases that may begin in one step

    @property
    def changes(self) -> int:
        """Of one step: an admission that takes over a whole row, and the growth of everybody else."""
        return 2 * (self.row_pages + self.step_tokens // self.page_tokens + 2 + self.rows)

    @property
    def mask_words(self) -> int:
        return -(-self.vocab // 32)

    @property
    def words(self) -> int:
        rows = self.rows
        most = {"tokens": self.step_tokens, "changes": self.changes, "draws": rows, "resets": rows}
        most |= {"biases": self.most_biased * MOST_BIASES, "chunks": rows + 1, "masks": rows}
        most |= {"tiles": most_tiles(self.step_tokens, rows + 1)}
        columns = sum(len(names) * most[length] for length, names in COLUMNS)
        return HEAD_WORDS + columns + rows * self.mask_words


@dataclass(frozen=True)
class Padding:
    """What the graph of a step holds: so many tokens; of decodes alone, or, with room for so many tiles, of chunks
    too. Nothing: no graph."""

    tokens: int = 0
    tiles: int = 0


@dataclass(frozen=True)
class Record:
    """words: all of them, the head's included, of format "i"."""

    head: Head
    words: memoryview

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        found = places(self.head)
        columns = [self.words[found[name]].tolist() for name in ("start", "stop", "chunk_row", "length")]
        return tuple(Chunk(*numbers) for numbers in zip(*columns, strict=True))


def read(words: memoryview) -> Record:
    """words: a record and whatever follows it."""
    head = Head(*words[:HEAD_WORDS].tolist())
    return Record(head, words[: head.words])


def places(head: Head) -> dict[str, slice]:
    """Where each column stands among the words; `seed`, `tile` and `mask` are all their columns together. Seeds begin
    at an even word, as int64s must: the head and the columns of tokens and of tiles are even in number."""
    found = {}
    begin = HEAD_WORDS
    for length, names in COLUMNS:
        count = getattr(head, length)
        for name in names:
            first = found[name].start if name in found else begin
            found[name] = slice(first, begin + count)
            begin += count
    found["mask"] = slice(begin, begin + head.masks * head.mask_words)
    return found


def after(number: int) -> int:
    """The number of the next step. They begin at 1, and again at 1 after weeks of steps of a millisecond."""
    return number % LAST_NUMBER + 1


def scratch_item(sizes: Sizes, tokens: int, start: int = 0, sampling: Sampling = PLAIN, *, draws: bool = False) -> Item:
    """So many tokens of the scratch row, which leave nothing behind elsewhere."""
    running = Running(Request("scratch", (0,), 1, sampling), 0.0, row=sizes.rows)
    return Item(running, 0, start, tokens, draws)


def only_padding(number: int, sizes: Sizes, padding: Padding) -> Record:
    """The record of a step of nothing, as a graph holds it."""
    return encode(Step((), 0, False, (), ()), number, sizes, padding)


def encode(step: Step, number: int, sizes: Sizes, padding: Padding = Padding()) -> Record:
    """The record of `step`, padded: by decodes, or by a chunk if there is room for tiles."""
    draws, items = step.draws, step.items
    padded = max(0, padding.tokens - step.tokens)
    if padding.tiles and padded:
        items += (scratch_item(sizes, padded),)
    graph = 0 if padding.tiles else padding.tokens  # as many decodes
    columns: dict[str, Iterable[int]] = {}
    token, position, row, counted = [], [], [], []
    for item in items:
        running, stop = item.running, item.start + item.count
        known = running.tokens[item.start : stop]
        token += known + [-1] * (item.count - len(known))
        position += range(item.start, stop)
        row += [running.row] * item.count
        answer = len(running.request.prompt_tokens)
        prompt, said = PROMPT * running.repeats, ANSWER * running.counts
        counted += [said if at >= answer else prompt for at in range(item.start, stop)]
    spare = max(0, graph - len(token))
    columns["token"] = token + [0] * spare
    columns["position"] = position + [0] * spare
    columns["row"] = row + [sizes.rows] * spare
    columns["counted"] = counted + [0] * spare

    columns["entry"] = [_entry(sizes, *change[:3]) for change in step.changes]
    columns["page"] = [page for _, _, _, page in step.changes]

    ends = accumulate(item.count for item in items)
    at = [end - 1 for item, end in zip(items, ends, strict=True) if item.draws]
    columns |= _draw_columns(draws, at, sizes, graph)

    columns["reset_row"] = [running.row for running in step.fresh if running.counts]
    biases = [
        (running.row, place, id, value)
        for running in step.fresh
        for place, (id, value) in enumerate(running.request.sampling.logit_bias)
    ]
    for name, index in (("bias_row", 0), ("bias_place", 1), ("bias_token", 2)):
        columns[name] = [int(one[index]) for one in biases]
    columns["bias_value"] = _bits(one[3] for one in biases)

    begin = step.decodes
    chunks = []
    for item in items[step.decodes :]:
        chunks.append(Chunk(begin, begin + item.count, item.running.row, item.start + item.count))
        begin += item.count
    for name, field in (("start", "start"), ("stop", "stop"), ("chunk_row", "row"), ("length", "length")):
        columns[name] = [getattr(chunk, field) for chunk in chunks]
    pieces = tiles(tuple(chunks))
    pieces += [(0, 0, 0, 0)] * (padding.tiles - len(pieces))
    columns["tile"] = [number for piece in pieces for number in piece]
    masked = [(index, item.running) for index, item in enumerate(draws) if item.running.matcher is not None]
    columns["masked_draw"] = [index for index, _ in masked]

    samplings = [item.running.request.sampling for item in draws]
    logprobs = [item.running.request.logprobs for item in draws]
    lengths = {
        "tokens": len(token) + spare,
        "changes": len(step.changes),
        "draws": max(len(draws), graph),
        "resets": len(list(columns["reset_row"])),
        "biases": len(biases),
        "chunks": len(chunks),
        "tiles": len(pieces),
        "masks": len(masked),
    }
    counts = any(item.running.counts for item in step.items)
    head = Head(
        number=number,
        decodes=max(step.decodes, graph),
        graph=padding.tokens,
        exact=int(step.exact),
        candidates=int(any(one.top_p < 1 or one.top_k for one in samplings)),
        min_p=int(any(one.min_p > 0 for one in samplings)),
        adjusts=int(bool(masked) or any(_adjusts(one) for one in samplings)),
        repeats=int(any(one.repetition != 1 for one in samplings)),
        counts=int(counts),
        most_logprobs=max((-1 if most is None else most for most in logprobs), default=-1),
        mask_words=sizes.mask_words,
        words=0,
        **lengths,
    )
    body = array("i")
    written = set()
    for _, names in COLUMNS:
        for name in names:
            if name not in written:
                body.extend(columns[name])
                written.add(name)
    for _, running in masked:
        body.frombytes(_allowed(running, sizes))
    assert not padding.tokens or (head.tokens, head.tiles) == (padding.tokens, padding.tiles), "it does not fit"
    total = HEAD_WORDS + len(body)
    words = array("i", astuple(head)[:-1])
    words.append(total)
    words.extend(body)
    assert total <= sizes.words, f"a record of {total} words, and there is room for {sizes.words}"
    return read(memoryview(words))


def _entry(sizes: Sizes, kind: str, row: int, index: int) -> int:
    """Place of an entry in both page tables as one flat array."""
    return (KINDS.index(kind) * (sizes.rows + 1) + row) * sizes.row_pages + index


def _draw_columns(draws: tuple[Item, ...], at: list[int], sizes: Sizes, graph: int) -> dict[str, Iterable[int]]:
    """Padding draws greedily from a token of the scratch row."""
    padding = max(0, graph - len(draws))
    samplings = [item.running.request.sampling for item in draws]
    scratch = [sizes.rows] * padding
    zeros = [0] * padding
    columns: dict[str, Iterable[int]] = {
        "at": at + list(range(graph - padding, graph)),
        "draw_row": [item.running.row for item in draws] + scratch,
        "draw_position": [item.start + item.count for item in draws] + zeros,
        "seed": _words([one.seed for one in samplings] + zeros),
        "top_k": [one.top_k for one in samplings] + zeros,
        "biased": [int(bool(one.logit_bias)) for one in samplings] + zeros,
        "top_p": _bits([one.top_p for one in samplings] + [1.0] * padding),
    }
    columns["repetition"] = _bits([one.repetition for one in samplings] + [1.0] * padding)
    for name in ("temperature", "min_p", "presence", "frequency"):
        columns[name] = _bits([getattr(one, name) for one in samplings] + [0.0] * padding)
    return columns


def _adjusts(one: Sampling) -> bool:
    return bool(one.presence or one.frequency or one.logit_bias or one.repetition != 1)


def _bits(values: Iterable[float]) -> "array[int]":
    """fp32 values as the int32 words that hold the same bits."""
    numbers = list(values)
    words = array("i")
    words.frombytes(struct.pack(f"={len(numbers)}f", *numbers))
    return words


def _words(values: list[int]) -> "array[int]":
    """int64 values as twice as many words."""
    words = array("i")
    words.frombytes(struct.pack(f"={len(values)}q", *values))
    return words


def _allowed(running: Running, sizes: Sizes) -> bytes:
    assert running.matcher is not None
    allowed = running.matcher.allowed()
    assert len(allowed) == 4 * sizes.mask_words, f"a mask of {len(allowed)} bytes for {sizes.vocab} tokens"
    return allowed

"""KV pages under random steps of several sequences: who holds which page, and that there are always enough of them.

The bounds are those of `planning.pages`, which the engine's pool is made by.
"""

import dataclasses
from dataclasses import dataclass
from itertools import chain

import torch
from gptoss_launch.parallel.engine import kv
from gptoss_launch.parallel.planning.pages import full_pages, pool_pages, window_pages
from gptoss_launch.parallel.planning.spec import LayerKind, Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SPECS

KINDS: tuple[tuple[LayerKind, ...], ...] = (("window", "full"), ("window", "window"), ("full", "full"))


@dataclass(frozen=True)
class Sizes:
    spec: Spec
    page_tokens: int
    step_tokens: int
    kv_tokens: int

    @property
    def pool_pages(self) -> int:
        return pool_pages(self.spec, self.kv_tokens, self.step_tokens, self.page_tokens)


@st.composite
def all_sizes(draw: st.DrawFn) -> Sizes:
    kinds = draw(st.sampled_from(KINDS))
    window = draw(st.integers(1, 24))
    spec = dataclasses.replace(SPECS["tiny"], layers=2, layer_kinds=kinds, window_tokens=window)
    return Sizes(spec, draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.integers(1, 90)))


def held(sequence: kv.Sequence) -> list[int]:
    return [page for table in sequence.tables.values() for page in table if page != kv.DROPPED]


def check_pool(pool: kv.Pool, sequences: list[kv.Sequence], pages: int) -> None:
    """Each page is free or in one entry of one table: none twice, none lost."""
    everywhere = [*pool.free, *chain.from_iterable(map(held, sequences))]
    assert sorted(everywhere) == list(range(pages))


def check_sequence(sequence: kv.Sequence, first_seen: int, sizes: Sizes) -> None:
    """All that the tokens from the one on that sees `first_seen` need is there, and not more than was planned for."""
    for kind, table in sequence.tables.items():
        wanted = full_pages(sizes.spec, sequence.length, sizes.page_tokens) if kind == "full" else None
        if kind == "window" and sizes.spec.layers_of("window"):
            wanted = -(-sequence.length // sizes.page_tokens)  # entries, dropped or not
        assert len(table) == (wanted or 0)
    assert kv.DROPPED not in sequence.tables["full"]
    window = sequence.tables["window"]
    assert kv.DROPPED not in window[max(0, first_seen) // sizes.page_tokens :]
    live = sum(page != kv.DROPPED for page in window)
    assert live <= window_pages(sizes.spec, sizes.step_tokens, sizes.page_tokens)


def step(pool: kv.Pool, sequence: kv.Sequence, tokens: int, sizes: Sizes) -> None:
    """What the engine does with pages in one step, checked after each half of it."""
    spec, page_tokens = sizes.spec, sizes.page_tokens
    first_seen = sequence.length - spec.window_tokens + 1  # by the first token of the step
    kv.extend(pool, sequence, tokens, spec, page_tokens)
    check_sequence(sequence, first_seen, sizes)
    check_views(sequence, tokens, sizes)
    kv.drop_passed(pool, sequence, spec, page_tokens)
    first_seen = sequence.length - spec.window_tokens + 1  # by the next token
    check_sequence(sequence, first_seen, sizes)
    passed = sequence.tables["window"][: max(0, first_seen) // page_tokens]
    assert set(passed) <= {kv.DROPPED}  # nothing is kept that nobody sees


def check_views(sequence: kv.Sequence, tokens: int, sizes: Sizes) -> None:
    """A slot is the token's place in the page that its table names."""
    views = kv.page_views(sequence, tokens, sizes.spec, sizes.page_tokens, torch.device("cpu"))
    assert views.keys() == set(sizes.spec.layer_kinds)
    for kind, view in views.items():
        table = sequence.tables[kind]
        assert view.table_RP.tolist() == [table]
        assert view.window_tokens == (sizes.spec.window_tokens if kind == "window" else None)
        positions = range(sequence.length - tokens, sequence.length)
        slots = [table[p // sizes.page_tokens] * sizes.page_tokens + p % sizes.page_tokens for p in positions]
        assert view.slots_T.tolist() == slots and min(slots) >= 0


@settings(deadline=None, max_examples=150)
@given(all_sizes(), st.data())
def test_sequences_share_a_pool(sizes: Sizes, data: st.DataObject) -> None:
    sequences = [kv.Sequence() for _ in range(data.draw(st.integers(1, 4)))]
    pages = sizes.pool_pages * len(sequences)
    pool = kv.Pool.of(pages)
    check_pool(pool, sequences, pages)
    actions = st.tuples(st.integers(0, len(sequences) - 1), st.integers(0, sizes.step_tokens))
    for index, tokens in data.draw(st.lists(actions, max_size=40)):
        sequence = sequences[index]
        tokens = min(tokens, sizes.kv_tokens - sequence.length)
        if tokens:
            step(pool, sequence, tokens, sizes)
        else:
            kv.release(pool, sequence)
            assert sequence == kv.Sequence()
        check_pool(pool, sequences, pages)
    for sequence in sequences:
        kv.release(pool, sequence)
    assert sorted(pool.free) == list(range(pages))


@settings(deadline=None, max_examples=200)
@given(all_sizes(), st.data())
def test_the_longest_sequence_fits_whatever_its_steps(sizes: Sizes, data: st.DataObject) -> None:
    """Twice in a row, as the engine uses its pool: the second finds the pages in another order."""
    pool, sequence = kv.Pool.of(sizes.pool_pages), kv.Sequence()
    for _ in range(2):
        while left := sizes.kv_tokens - sequence.length:
            step(pool, sequence, min(left, data.draw(st.integers(1, sizes.step_tokens))), sizes)
            check_pool(pool, [sequence], sizes.pool_pages)
        kv.release(pool, sequence)


@settings(deadline=None, max_examples=100)
@given(all_sizes())
def test_largest_steps_need_no_more_than_planned(sizes: Sizes) -> None:
    """Only steps of the largest size, which is what a long prompt is: the most window pages at once."""
    pool, sequence = kv.Pool.of(sizes.pool_pages), kv.Sequence()
    while left := sizes.kv_tokens - sequence.length:
        step(pool, sequence, min(left, sizes.step_tokens), sizes)


def test_dropping_twice_and_releasing_twice_give_nothing_twice() -> None:
    spec = dataclasses.replace(SPECS["tiny"], window_tokens=8)
    pool, sequence = kv.Pool.of(40), kv.Sequence()
    kv.extend(pool, sequence, 50, spec, 4)
    for _ in range(2):
        kv.drop_passed(pool, sequence, spec, 4)
        check_pool(pool, [sequence], 40)
    assert sequence.tables["window"].count(kv.DROPPED) == 10  # position 50 sees 43 on: pages 0 to 9 end before it
    for _ in range(2):
        kv.release(pool, sequence)
        check_pool(pool, [sequence], 40)

"""The draw of the next token: what it depends on, what the filters keep, and that it follows the distribution.

Logits are fp32 unless stated. Several ranks are threads that each hold a part of the vocabulary, the parts uneven.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from drawing import (
    NEVER,
    bound,
    chi_square,
    draws_of,
    fp32,
    on_ranks,
    plain_bits,
    plain_draw,
    plain_first,
    plain_kept,
    plain_probabilities,
    plain_time,
    random_logits,
)
from gptoss_launch.parallel.kernels import sample as sampling
from gptoss_launch.parallel.kernels.hash import mix
from gptoss_launch.parallel.kernels.sample import CANDIDATES, Drawn, Wanted, exponential_times, sample, sample_exact
from gptoss_launch.parallel.model.comm import Alone
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

CUTS = {"one": (), "two": (700,), "uneven": (1, 300, 301, 900), "tiny first": (3,)}  # where a vocabulary of 1000 is cut


def wanted_by(**values: object) -> Wanted:
    def some(name: str, off: float) -> bool:
        value = values.get(name, off)
        return any(one != off for one in (value if isinstance(value, Sequence) else [value]))

    return Wanted(candidates=some("top_p", 1.0) or some("top_k", 0), min_p=some("min_p", 0.0))


def drawn_by(logits_SV: Tensor, cuts: Sequence[int] = (), wanted: Wanted | None = None, **values: object) -> Drawn:
    """What `sample` drew, the same on every rank."""
    draws, wanted = draws_of(len(logits_SV), values), wanted or wanted_by(**values)
    ranks = on_ranks(
        logits_SV.shape[1], cuts, lambda part, first, gather: sample(logits_SV[:, part], first, gather, draws, wanted)
    )
    for one in ranks:
        assert one.tokens_S.dtype == torch.int64 and one.complete_S.dtype == torch.bool
        assert one.tokens_S.shape == one.complete_S.shape == (len(logits_SV),)
        assert torch.equal(one.complete_S, ranks[0].complete_S)
        assert torch.equal(one.tokens_S, ranks[0].tokens_S)
    return ranks[0]


def exact(logits_SV: Tensor, cuts: Sequence[int] = (), **values: object) -> list[int]:
    draws = draws_of(len(logits_SV), values)
    ranks = on_ranks(
        logits_SV.shape[1], cuts, lambda part, first, gather: sample_exact(logits_SV[:, part], first, gather, draws)
    )
    assert all(torch.equal(one, ranks[0]) for one in ranks)
    return ranks[0].tolist()


def draw(logits_SV: Tensor, cuts: Sequence[int] = (), **values: object) -> list[int]:
    """What is drawn in the end: by `sample` where that is complete, which `sample_exact` then repeats."""
    drawn, again = drawn_by(logits_SV, cuts, **values), exact(logits_SV, cuts, **values)
    for token, complete, repeated in zip(drawn.tokens_S.tolist(), drawn.complete_S.tolist(), again, strict=True):
        assert token == repeated or not complete
    return again


# --- greedy


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-3, 3), min_size=6, max_size=40),
    st.sets(st.integers(1, 5), max_size=3),
    st.sampled_from([{}, {"top_p": 0.3}, {"top_k": 3}, {"min_p": 0.9}]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_greedy_takes_the_lowest_id_of_the_largest(
    values: list[int], cuts: set[int], filters: dict[str, float], dtype: torch.dtype
) -> None:
    logits_SV = torch.tensor([values], dtype=dtype)
    drawn = drawn_by(logits_SV, sorted(cuts), temperature=0.0, seed=9, position=4, **filters)
    assert drawn.tokens_S.tolist() == [values.index(max(values))] and drawn.complete_S.tolist() == [True]


def test_greedy_depends_on_neither_seed_nor_position() -> None:
    logits_SV = random_logits(1, 1000).expand(50, -1)
    drawn = drawn_by(logits_SV, temperature=0.0, seed=list(range(50)), position=list(range(50, 0, -1)))
    assert set(drawn.tokens_S.tolist()) == {int(logits_SV[0].argmax())}


# --- what a draw depends on


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_cut_vocabulary_draws_the_same(dtype: torch.dtype) -> None:
    logits_SV = random_logits(36, 1000, scale=1.0).to(dtype)  # so flat that 0.999 goes deeper than the candidates
    values = {
        "seed": list(range(36)),
        "position": list(range(100, 136)),
        "top_p": [1.0, 0.8, 0.999, 1.0, 1.0, 1.0] * 6,
        "top_k": [0, 0, 0, 50, 400, 0] * 6,
        "min_p": [0.0, 0.0, 0.0, 0.05, 0.0, 0.2] * 6,
    }
    drawn = [draw(logits_SV, cuts, **values) for cuts in CUTS.values()]
    assert all(one == drawn[0] for one in drawn)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_row_draws_the_same_in_any_batch(data: st.DataObject) -> None:
    """Alone with what it asks for, and in any company, some of which asks for more."""
    rows = data.draw(st.integers(1, 8))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    logits_SV = random_logits(rows, 1000, seed=data.draw(st.integers(0, 1000))).to(dtype)
    choices = {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_p": st.sampled_from([0.1, 0.9, 1.0]),
        "top_k": st.sampled_from([0, 1, 7, 300]),
        "min_p": st.sampled_from([0.0, 0.01, 0.5]),
        "seed": st.integers(0, 2**63 - 1),
        "position": st.integers(0, 131071),
    }
    values = {name: data.draw(st.lists(one, min_size=rows, max_size=rows)) for name, one in choices.items()}
    order = data.draw(st.permutations(range(rows)))
    alone = [drawn_by(logits_SV[i : i + 1], **{name: value[i] for name, value in values.items()}) for i in range(rows)]
    mixed = drawn_by(logits_SV[list(order)], **{name: [value[i] for i in order] for name, value in values.items()})
    for place, i in enumerate(order):
        assert mixed.complete_S[place] == alone[i].complete_S[0]
        assert mixed.tokens_S[place] == alone[i].tokens_S[0] or not mixed.complete_S[place]


def test_a_row_draws_the_same_in_tiles_of_any_height(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_SV = random_logits(11, 1000, scale=1.0)
    values = {"seed": list(range(11)), "top_p": [0.999, 1.0, 0.5] * 3 + [0.9, 1.0], "min_p": 0.001}
    expected = draw(logits_SV, (300,), **values)
    for limit_bytes in (1, 3 * 24 * 700, 4 * 72 * 1400):
        monkeypatch.setattr(sampling, "DRAW_LIMIT_BYTES", limit_bytes)
        assert draw(logits_SV, (300,), **values) == expected


def test_seed_and_position_both_matter() -> None:
    logits_SV = torch.zeros((200, 1000))
    by_seed = drawn_by(logits_SV, seed=list(range(200)), position=5).tokens_S.tolist()
    by_position = drawn_by(logits_SV, seed=5, position=list(range(200))).tokens_S.tolist()
    assert len(set(by_seed)) > 150 and len(set(by_position)) > 150  # of 200 draws from 1000, 181 are expected to differ
    assert sum(a == b for a, b in zip(by_seed, by_position, strict=True)) < 10


def test_one_rank_needs_no_threads() -> None:
    logits_SV, values = random_logits(1, 1000), {"top_p": 0.9, "seed": 3, "position": 4}
    drawn = sample(logits_SV, 0, Alone().all_gather, draws_of(1, values), wanted_by(**values))
    assert drawn.tokens_S.tolist() == draw(logits_SV, (500,), **values)


# --- bits and times


def test_bits_are_those_of_splitmix64() -> None:
    """Outputs of the reference implementation (https://prng.di.unimi.it/splitmix64.c) for the states 0 and 1234567."""
    step = 0x9E3779B97F4A7C15
    expected = {
        0: (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F),
        1234567: (6457827717110365317, 3203168211198807973, 9817491932198370423),
    }
    for state, outputs in expected.items():
        for index, output in enumerate(outputs):
            before = (state + index * step) % 2**64
            mixed = mix(torch.tensor([before - 2**64 if before >= 2**63 else before]))
            assert mixed.item() % 2**64 == output == plain_bits(before)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
def test_times_are_positive_for_any_seed(precision: torch.dtype) -> None:
    seed_S = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    times_SV = exponential_times(seed_S, torch.zeros(5, dtype=torch.int64), torch.arange(20000), precision)
    assert bool((times_SV > 0).all()) and bool(times_SV.isfinite().all())
    assert (times_SV.mean(-1) - 1).abs().max() < 0.05  # deviation of the mean of 20,000: 0.007


def test_times_in_fp32_are_those_in_fp64_rounded() -> None:
    """The small ones above all, which win: no grid of 2^-24, on which a large vocabulary would tie."""
    columns = torch.tensor([5]), torch.tensor([17]), torch.arange(300000)
    wide_V = exponential_times(*columns, torch.float64)[0]
    narrow_V = exponential_times(*columns, torch.float32)[0]
    small_V = wide_V < 1
    assert ((narrow_V / wide_V - 1).abs()[small_V] < 3e-7).all()
    assert ((narrow_V / wide_V - 1).abs() < 1e-2).all()  # near the largest, 12.6 of 300,000, u has few digits left
    smallest_X = narrow_V.sort().values[:3000]
    assert len(smallest_X.unique()) == 3000
    assert [plain_time(5, 17, token) for token in range(200)] == pytest.approx(wide_V[:200].tolist(), rel=1e-13)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
def test_times_at_either_end_of_the_bits(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for bits, largest in ((0, False), (-1, True)):
        monkeypatch.setattr(sampling, "mix", lambda x, bits=bits: torch.full_like(x, bits))
        time = exponential_times(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), precision).item()
        tail = {torch.float32: 24, torch.float64: 53}[precision] * math.log(2)
        assert time == pytest.approx(tail if largest else 2.0**-53, rel=1e-6)


# --- the definition


FILTERS = {
    "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    "top_p": st.one_of(st.just(1.0), st.floats(0.01, 0.9999)),
    "top_k": st.integers(0, 45),
    "min_p": st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
}


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.sampled_from([NEVER, -4.0, -1.0, 0.0, 0.5, 2.0]), min_size=5, max_size=40),
    st.sets(st.integers(1, 4), max_size=3),
    st.fixed_dictionaries(FILTERS),
)
def test_the_filters_with_ties(values: list[float], cuts: set[int], filters: dict[str, float]) -> None:
    """So often that all that is kept is drawn; and each draw is that of the definition."""
    assume(max(values) > NEVER)
    if filters["temperature"] > 0:
        kept, nearest = plain_kept(values, **filters)
        assume(nearest > 1e-9)  # there rounding decides, in any implementation
    logits_SV = torch.tensor([values], dtype=torch.float64).expand(20, -1)
    drawn = drawn_by(logits_SV, sorted(cuts), seed=4, position=list(range(20)), **filters)
    assert drawn.complete_S.all()
    assert drawn.tokens_S.tolist() == [plain_draw(values, 4, position, **filters) for position in range(20)]


@pytest.mark.parametrize("cuts", [(), (1500,), (10, 300, 2900)], ids=str)
@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
def test_filters_of_any_depth(cuts: tuple[int, ...], scale: float) -> None:
    """`complete` where, and only where, all that is kept is above the last candidate of every rank."""
    filters = [{"top_p": top_p} for top_p in (0.05, 0.3, 0.7, 0.95, 0.9999)]
    filters += [{"top_k": top_k} for top_k in (1, 200, CANDIDATES - 1, CANDIDATES, CANDIDATES + 1, 1024)]
    filters += [{"top_k": 1024, "top_p": 0.9}, {"top_p": 0.95, "min_p": 0.6}, {"top_k": 1024, "min_p": 0.3}, {}]
    logits = random_logits(1, 3000, scale=scale).double()
    edges = [0, *cuts, 3000]
    last = [
        logits[0, one:other].sort(descending=True).values[CANDIDATES - 1].item()
        for one, other in zip(edges, edges[1:], strict=False)
        if other - one > CANDIDATES
    ]
    rows = [one for one in filters for _ in range(3)]
    values = {
        name: [one.get(name, off) for one in rows] for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0))
    } | {"seed": list(range(len(rows)))}
    drawn = drawn_by(logits.expand(len(rows), -1), cuts, **values)
    again = exact(logits.expand(len(rows), -1), cuts, **values)
    deepest = 0
    for place, one in enumerate(filters):
        kept, nearest = plain_kept(logits[0].tolist(), **one)
        assert nearest > 1e-9
        # a list that reaches below min_p has all there is to keep
        floor = logits.max().item() + math.log(fp32(one["min_p"])) if "min_p" in one else NEVER
        needed = logits[0, plain_kept(logits[0].tolist(), **(one | {"min_p": 0.0}))[0][-1]].item()
        is_complete = needed > max(last) or floor > max(last) or one == {}
        for row in range(3 * place, 3 * place + 3):
            assert drawn.complete_S[row].item() == is_complete, one
            expected = plain_first(logits[0].tolist(), kept, row, 0, 1.0)
            assert again[row] == expected and (not is_complete or drawn.tokens_S[row] == expected)
        deepest = max(deepest, len(kept) if one else 0)
    assert bool(drawn.complete_S.any()) and not bool(drawn.complete_S.all())
    if scale == 0.01:
        assert deepest > 4 * CANDIDATES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_deeper_than_the_candidates_enter_by_id(dtype: torch.dtype) -> None:
    """All alike: what is kept is the lowest ids, from the first rank on."""
    logits_SV = torch.zeros((1, 1000), dtype=dtype).expand(400, -1)
    for filters, count in (({"top_p": 0.0101}, 11), ({"top_p": 0.6001}, 601), ({"top_k": 400}, 400)):
        values = {"seed": list(range(400)), **filters}
        assert not drawn_by(logits_SV, (600,), **values).complete_S.any()
        tokens = exact(logits_SV, (600,), **values)
        assert max(tokens) < count and len(set(tokens)) > 0.6 * min(count, 400)


def test_what_no_mask_lets_through_is_never_drawn() -> None:
    logits_SV = random_logits(300, 50)
    logits_SV[:, ::2] = NEVER
    for filters in ({}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.01}, {"temperature": 0.0}):
        drawn = drawn_by(logits_SV, (7, 30), seed=list(range(300)), **filters)
        assert drawn.complete_S.all() and all(token % 2 for token in drawn.tokens_S.tolist())
    logits_SV[:, :49] = NEVER
    assert set(draw(logits_SV, (7, 30), seed=list(range(300)), top_k=3, min_p=0.1, top_p=0.5)) == {49}


# --- the distribution


@pytest.mark.parametrize(
    ("varied", "filters"),
    [
        ("seed", {}),
        ("position", {"temperature": 2.0}),
        ("position", {"top_p": 0.8}),
        ("seed", {"temperature": 0.7, "top_p": 0.95}),
        ("position", {"top_k": 9}),
        ("position", {"min_p": 0.15}),
        ("seed", {"temperature": 1.5, "top_p": 0.9, "top_k": 12, "min_p": 0.1}),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(varied: str, filters: dict[str, float]) -> None:
    draws, vocab = 6000, 24
    logits = random_logits(1, vocab, seed=3, scale=1.0)
    values = {"seed": 11, "position": 17} | {varied: list(range(draws))} | filters
    drawn = drawn_by(logits.expand(draws, -1), (9,), **values)
    counts = np.bincount(drawn.tokens_S.numpy(), minlength=vocab)
    kept, nearest = plain_kept(logits[0].tolist(), **filters)
    weights = plain_probabilities(logits[0].tolist(), filters.get("temperature", 1.0))[kept]
    expected = draws * weights / weights.sum()
    assert drawn.complete_S.all() and nearest > 1e-6
    assert min(expected) > 5 and counts[kept].sum() == draws
    assert (set(filters) <= {"temperature"}) == (len(kept) == vocab)
    assert chi_square(counts[kept].tolist(), expected.tolist()) < bound(len(kept))


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """1000 tokens of 1e-4 each beside one of 0.9, in fp32."""
    logits = torch.full((1, 1001), math.log(1e-4))
    logits[0, 123] = math.log(0.9)
    drawn = drawn_by(logits.expand(6000, -1), (400,), seed=list(range(6000)))
    rare = [token for token in drawn.tokens_S.tolist() if token != 123]
    assert abs(len(rare) - 600) < 6 * math.sqrt(600)
    assert abs(np.mean(rare) - 500) < 6 * 1000 / math.sqrt(12 * 600)


def test_neighbouring_positions_are_independent() -> None:
    """Pairs of draws one after the other, of one seed: all 64 alike."""
    drawn = drawn_by(torch.zeros((20001, 8)), seed=1, position=list(range(20001))).tokens_S.tolist()
    counts = [0] * 64
    for one, other in zip(drawn, drawn[1:], strict=False):
        counts[8 * one + other] += 1
    assert chi_square(counts, [20000 / 64] * 64) < bound(64)

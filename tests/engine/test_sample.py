"""The draw of the next token: what it depends on, what top_p keeps, and that it follows the distribution.

Logits are fp32 unless stated. Several ranks are threads that each hold a part of the vocabulary, the parts uneven.
"""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gptoss_launch.parallel.kernels.hash import mix
from gptoss_launch.parallel.kernels.sample import FIRST_CANDIDATES, exponential_times, in_nucleus, sample
from gptoss_launch.parallel.model.comm import Alone
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from thread_ranks import ThreadComm
from torch import Tensor

CUTS = {"one": (), "two": (700,), "uneven": (1, 300, 301, 900), "tiny first": (3,)}  # where a vocabulary of 1000 is cut
INF = float("-inf")


def draw(
    logits_SV: Tensor,
    temperature: float | Sequence[float] = 1.0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
    position: int | Sequence[int] = 0,
    cuts: Sequence[int] = (),
) -> list[int]:
    """Ids that every rank drew, with the vocabulary cut before each of `cuts`."""
    rows = len(logits_SV)

    def column(value: object, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value if isinstance(value, Sequence) else [value] * rows, dtype=dtype)

    top_p_S = column(top_p, torch.float32)
    edges = [0, *cuts, logits_SV.shape[1]]
    slots, barrier = [torch.empty(0)] * (len(edges) - 1), threading.Barrier(len(edges) - 1)

    def one(rank: int) -> list[int]:
        try:
            drawn_S = sample(
                logits_SV[:, edges[rank] : edges[rank + 1]],
                edges[rank],
                ThreadComm(rank, slots, barrier).all_gather,
                column(temperature, torch.float32),
                top_p_S,
                column(seed, torch.int64),
                column(position, torch.int64),
                any_top_p=bool((top_p_S < 1).any()),
            )
            assert drawn_S.dtype == torch.int64 and drawn_S.shape == (rows,)
            return drawn_S.tolist()
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(slots)) as pool:
        drawn = list(pool.map(one, range(len(slots))))
    assert all(one == drawn[0] for one in drawn)
    return drawn[0]


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * scale


def plain_nucleus(logits: Sequence[float], top_p: float) -> tuple[set[int], float]:
    """The ids that a sorted list gives, and how near the sum of probabilities came to top_p where it was cut."""
    largest = max(logits)
    weights = [math.exp(value - largest) for value in logits]
    total = math.fsum(weights)
    kept: set[int] = set()
    reached, nearest = 0.0, math.inf
    for token in sorted(range(len(logits)), key=lambda token: (-logits[token], token)):
        kept.add(token)
        reached += weights[token] / total
        nearest = min(nearest, abs(reached - top_p))
        if reached >= top_p:
            break
    return kept, nearest


def fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


# --- greedy


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-3, 3), min_size=6, max_size=40),
    st.sets(st.integers(1, 5), max_size=3),
    st.sampled_from([1.0, 0.3]),
)
def test_greedy_takes_the_lowest_id_of_the_largest(values: list[int], cuts: set[int], top_p: float) -> None:
    logits_SV = torch.tensor([values], dtype=torch.float32)
    assert draw(logits_SV, 0.0, top_p, seed=9, position=4, cuts=sorted(cuts)) == [values.index(max(values))]


def test_greedy_depends_on_neither_seed_nor_position() -> None:
    logits_SV = random_logits(1, 1000).expand(50, -1)
    drawn = draw(logits_SV, 0.0, seed=list(range(50)), position=list(range(50, 0, -1)))
    assert set(drawn) == {int(logits_SV[0].argmax())}


# --- what a draw depends on


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.999])
def test_a_cut_vocabulary_draws_the_same(cuts: tuple[int, ...], top_p: float) -> None:
    logits_SV = random_logits(40, 1000, scale=1.0)  # so flat that 0.999 goes deeper than the first candidates
    settings = {"top_p": top_p, "seed": list(range(40)), "position": list(range(100, 140))}
    assert draw(logits_SV, **settings, cuts=cuts) == draw(logits_SV, **settings)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_row_draws_the_same_in_any_batch(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 8))
    logits_SV = random_logits(rows, 1000, seed=data.draw(st.integers(0, 1000)))
    temperature = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=rows, max_size=rows))
    top_p = data.draw(st.lists(st.sampled_from([0.1, 0.9, 1.0]), min_size=rows, max_size=rows))
    seed = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=rows, max_size=rows))
    position = data.draw(st.lists(st.integers(0, 131071), min_size=rows, max_size=rows))
    order = data.draw(st.permutations(range(rows)))
    alone = [
        draw(logits_SV[i : i + 1], temperature[i], top_p[i], seed[i], position[i])[0] for i in range(rows)
    ]  # with top_p off where it is 1, which the batch below may have on
    mixed = draw(
        logits_SV[list(order)],
        [temperature[i] for i in order],
        [top_p[i] for i in order],
        [seed[i] for i in order],
        [position[i] for i in order],
        cuts=(400,),
    )
    assert mixed == [alone[i] for i in order]


def test_seed_and_position_both_matter() -> None:
    logits_SV = torch.zeros((200, 1000))
    by_seed = draw(logits_SV, seed=list(range(200)), position=5)
    by_position = draw(logits_SV, seed=5, position=list(range(200)))
    assert len(set(by_seed)) > 150 and len(set(by_position)) > 150  # of 200 draws from 1000, 181 are expected to differ
    assert sum(a == b for a, b in zip(by_seed, by_position, strict=True)) < 10


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
            assert mixed.item() % 2**64 == output


def test_times_are_positive_for_any_seed() -> None:
    seed_S = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    times_SV = exponential_times(seed_S, torch.zeros(5, dtype=torch.int64), torch.arange(20000))
    assert bool((times_SV > 0).all()) and bool(times_SV.isfinite().all())
    assert (times_SV.mean(-1) - 1).abs().max() < 0.05  # deviation of the mean of 20,000: 0.007


# --- top_p


def nucleus(logits_SV: Tensor, top_p: Sequence[float], cuts: Sequence[int]) -> list[set[int]]:
    """The ids that the ranks keep, together."""
    edges = [0, *cuts, logits_SV.shape[1]]
    slots, barrier = [torch.empty(0)] * (len(edges) - 1), threading.Barrier(len(edges) - 1)

    def one(rank: int) -> Tensor:
        part_SV, token_V = logits_SV[:, edges[rank] : edges[rank + 1]], torch.arange(edges[rank], edges[rank + 1])
        gather = ThreadComm(rank, slots, barrier).all_gather
        return in_nucleus(part_SV.double(), token_V, torch.tensor(top_p, dtype=torch.float32), gather)

    with ThreadPoolExecutor(len(slots)) as pool:
        kept_SV = torch.cat(list(pool.map(one, range(len(slots)))), dim=1)
    return [set(row.nonzero()[:, 0].tolist()) for row in kept_SV]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 2.0]), min_size=5, max_size=40),
    st.sets(st.integers(1, 4), max_size=3),
    st.floats(0.01, 0.9999),
)
def test_top_p_with_ties(values: list[float], cuts: set[int], top_p: float) -> None:
    expected, nearest = plain_nucleus(values, fp32(top_p))
    assume(nearest > 1e-9)  # there rounding decides, in any implementation
    assert nucleus(torch.tensor([values]), [top_p], sorted(cuts)) == [expected]


@pytest.mark.parametrize("cuts", [(), (1500,), (10, 300, 2900)], ids=str)
@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
def test_top_p_of_any_depth(cuts: tuple[int, ...], scale: float) -> None:
    top_p = [0.05, 0.3, 0.7, 0.95, 0.9999]
    logits_SV = random_logits(1, 3000, scale=scale).expand(5, -1)
    expected = [plain_nucleus(logits_SV[0].tolist(), fp32(p))[0] for p in top_p]
    assert nucleus(logits_SV, top_p, cuts) == expected
    if scale == 0.01:
        assert max(map(len, expected)) > 4 * FIRST_CANDIDATES


def test_equals_deeper_than_the_candidates_enter_by_id() -> None:
    """All alike: the nucleus is the lowest ids, from the first rank on."""
    for top_p, count in ((0.1001, 101), (0.4001, 401), (0.6001, 601), (0.9999, 1000)):
        assert nucleus(torch.zeros((1, 1000)), [top_p], (600,)) == [set(range(count))]


def test_what_no_mask_lets_through_is_never_drawn() -> None:
    logits_SV = random_logits(300, 50)
    logits_SV[:, ::2] = INF
    for top_p in (1.0, 0.9):
        drawn = draw(logits_SV, top_p=top_p, seed=list(range(300)), cuts=(7, 30))
        assert all(token % 2 for token in drawn)


# --- the distribution


def chi_square(counts: Sequence[float], expected: Sequence[float]) -> float:
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))


def bound(bins: int) -> float:
    """Six standard deviations above what chi-square is on average."""
    return (bins - 1) + 6 * math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("varied", ["seed", "position"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.8), (0.7, 0.95)])
def test_draws_follow_the_distribution(varied: str, temperature: float, top_p: float) -> None:
    draws, vocab = 20000, 24
    logits = random_logits(1, vocab, seed=3, scale=1.0)
    counts = [0] * vocab
    for first in range(0, draws, 2000):
        values = {"seed": 11, "position": 17} | {varied: list(range(first, first + 2000))}
        for token in draw(logits.expand(2000, -1), temperature, top_p, values["seed"], values["position"], (9,)):
            counts[token] += 1
    scaled = (logits[0].double() / temperature).tolist()
    kept = sorted(plain_nucleus(scaled, fp32(top_p))[0]) if top_p < 1 else list(range(vocab))
    weights = [math.exp(scaled[token]) for token in kept]
    expected = [draws * weight / sum(weights) for weight in weights]
    assert min(expected) > 5 and sum(counts[token] for token in kept) == draws
    assert (top_p < 1) == (len(kept) < vocab)
    assert chi_square([counts[token] for token in kept], expected) < bound(len(kept))


def test_neighbouring_positions_are_independent() -> None:
    """Pairs of draws one after the other, of one seed: all 64 alike."""
    drawn = draw(torch.zeros((20001, 8)), seed=1, position=list(range(20001)))
    counts = [0] * 64
    for one, other in zip(drawn, drawn[1:], strict=False):
        counts[8 * one + other] += 1
    assert chi_square(counts, [20000 / 64] * 64) < bound(64)


def test_one_rank_needs_no_threads() -> None:
    logits_SV = random_logits(1, 1000)
    one = [torch.tensor([value]) for value in (1.0, 0.9)], [torch.tensor([value]) for value in (3, 4)]
    drawn_S = sample(logits_SV, 0, Alone().all_gather, *one[0], *one[1], any_top_p=True)
    assert drawn_S.tolist() == draw(logits_SV, 1.0, 0.9, 3, 4, cuts=(500,))

"""Percentiles against numpy, and arrivals against what a Poisson process is."""

import math
import random

import numpy as np
import pytest
from gptoss_launch.launch.bench.numbers import median, percentile, poisson_arrivals_s


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
def test_percentiles_are_numpys(count: int) -> None:
    values = [random.Random(count).lognormvariate(0, 2) for _ in range(count)]
    for per_cent in (0, 1, 50, 90, 99, 99.9, 100):
        assert percentile(values, per_cent) == pytest.approx(np.percentile(values, per_cent), rel=1e-12)


def test_percentiles_by_hand() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5 == median([1, 2, 3, 4])
    assert percentile([10.0, 20.0], 99) == pytest.approx(19.9)
    assert percentile([], 50) is None


def test_gaps_of_arrivals_are_exponential() -> None:
    """Mean and standard deviation of a gap are both 1 / rate, and P(gap > 1 / rate) is 1 / e: each within five standard
    errors, of 20,000 gaps of one fixed seed."""
    rate, count = 4.0, 20_000
    gaps = np.diff([0.0, *poisson_arrivals_s(rate, count, seed=1)])
    assert (gaps > 0).all()
    assert np.mean(gaps) == pytest.approx(1 / rate, abs=5 / rate / math.sqrt(count))
    assert np.std(gaps) == pytest.approx(1 / rate, abs=5 * math.sqrt(2 / count) / rate)
    assert np.mean(gaps > 1 / rate) == pytest.approx(1 / math.e, abs=5 * math.sqrt(0.25 / count))
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 5 / math.sqrt(count)  # one does not tell of the next


def test_arrivals_in_windows_are_poisson() -> None:
    """As many in a second on average as they vary by: what makes it Poisson, and not merely random."""
    counts = np.bincount(np.floor(poisson_arrivals_s(8.0, 40_000, seed=2)).astype(int))[:-1]
    assert np.mean(counts) == pytest.approx(8.0, abs=5 * math.sqrt(8 / len(counts)))
    assert np.var(counts) / np.mean(counts) == pytest.approx(1.0, abs=5 * math.sqrt(2 / len(counts)))


def test_a_seed_gives_the_same_arrivals_at_any_rate() -> None:
    slow, fast = poisson_arrivals_s(1.0, 50, seed=3), poisson_arrivals_s(2.0, 50, seed=3)
    assert slow == poisson_arrivals_s(1.0, 50, seed=3) != poisson_arrivals_s(1.0, 50, seed=4)
    assert slow == pytest.approx([2 * at_s for at_s in fast])

"""Statistics of a benchmark: percentiles, and when requests arrive. Pure functions of their arguments."""

import math
import random
from collections.abc import Sequence


def percentile(values: Sequence[float], per_cent: float) -> float | None:
    """The value that per_cent of `values` do not exceed, straight between neighbours (numpy's default; Hyndman and Fan
    1996, type 7). None without values."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * per_cent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median(values: Sequence[float]) -> float:
    middle = percentile(values, 50)
    assert middle is not None, "a median of nothing"
    return middle


def poisson_arrivals_s(rate: float, count: int, seed: int) -> list[float]:
    """When each of `count` requests arrives, in seconds from the start, `rate` a second on average, independent of one
    another: gaps are exponential with mean 1 / rate. The same seed gives the same times; at twice the rate they are
    half as late, so that rates differ by nothing else."""
    drawn = random.Random(seed)
    arrivals, now_s = [], 0.0
    for _ in range(count):
        now_s += drawn.expovariate(1.0) / rate
        arrivals.append(now_s)
    return arrivals

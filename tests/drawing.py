"""What the tests of drawing share: ranks as threads that each hold part of a vocabulary, and the plain definition.

The definition is written in Python and numpy over one whole row in fp64, bits and all; it uses nothing of ours.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from gptoss_launch.parallel.kernels.sample import Draws
from thread_ranks import ThreadComm
from torch import Tensor

T = TypeVar("T")
DTYPES = {
    "temperature": torch.float32,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "presence": torch.float32,
    "frequency": torch.float32,
    "repetition": torch.float32,
    "top_k": torch.int32,
    "seed": torch.int64,
    "position": torch.int64,
}
NOTHING = {name: 0 for name in DTYPES} | {"temperature": 1.0, "top_p": 1.0, "repetition": 1.0}
NEVER = float("-inf")


def draws_of(rows: int, settings: Mapping[str, object]) -> Draws:
    """Each setting one value for all rows, or a list."""
    columns = {}
    for name, dtype in DTYPES.items():
        value = settings.get(name, NOTHING[name])
        columns[f"{name}_S"] = torch.tensor(value if isinstance(value, Sequence) else [value] * rows, dtype=dtype)
    assert not set(settings) - set(DTYPES)
    return Draws(**columns)


def on_ranks(vocab: int, cuts: Sequence[int], work: Callable[[slice, int, Callable[[Tensor], Tensor]], T]) -> list[T]:
    """What work(its columns, first token, all_gather) returns on each rank, the vocabulary cut before each of cuts."""
    edges = [0, *cuts, vocab]
    slots, barrier = [torch.empty(0)] * (len(edges) - 1), threading.Barrier(len(edges) - 1)

    def one(rank: int) -> T:
        try:
            columns = slice(edges[rank], edges[rank + 1])
            return work(columns, edges[rank], ThreadComm(rank, slots, barrier).all_gather)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(slots)) as pool:
        return list(pool.map(one, range(len(slots))))


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * scale


def fp32(value: float) -> float:
    return float(np.float32(value))


def plain_bits(x: int) -> int:
    """splitmix64's output for state x, by its publication, in whole numbers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def plain_time(seed: int, position: int, token: int) -> float:
    stream = plain_bits(plain_bits(seed) + position)
    return -math.log1p(-((plain_bits(stream + token) >> 12) + 0.5) / 2**52)


def plain_probabilities(logits: Sequence[float], temperature: float) -> np.ndarray:
    scaled = np.asarray(logits, dtype=np.float64) / fp32(temperature)
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def plain_kept(
    logits: Sequence[float], temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> tuple[list[int], float]:
    """Ids that the three filters leave, most likely first, and how near a threshold some probability came."""
    p = plain_probabilities(logits, temperature)
    order = sorted((t for t in range(len(p)) if logits[t] > NEVER), key=lambda token: (-logits[token], token))
    nucleus, reached, nearest = 0, 0.0, math.inf
    while nucleus < len(order) and (top_p >= 1 or reached < fp32(top_p)):
        reached += p[order[nucleus]]
        nucleus += 1
        if top_p < 1:
            nearest = min(nearest, abs(reached - fp32(top_p)))
    kept = order[: min(nucleus, top_k or len(order))]
    if min_p > 0:
        shares = p / p.max()
        nearest = min([nearest, *(abs(share - fp32(min_p)) for share in shares if share < 1)])
        kept = [token for token in kept if shares[token] >= fp32(min_p)]
    return kept, nearest


def plain_draw(logits: Sequence[float], seed: int, position: int, temperature: float, **filters: float) -> int:
    """The token that Sampling's docstring asks for."""
    if temperature == 0:
        return min(range(len(logits)), key=lambda token: (-logits[token], token))
    return plain_first(logits, plain_kept(logits, temperature, **filters)[0], seed, position, temperature)


def plain_first(logits: Sequence[float], kept: Sequence[int], seed: int, position: int, temperature: float) -> int:
    """Of the tokens kept, the one that finishes first."""
    return max(kept, key=lambda t: (logits[t] / fp32(temperature) - math.log(plain_time(seed, position, t)), -t))


def chi_square(counts: Sequence[float], expected: Sequence[float]) -> float:
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))


def bound(bins: int) -> float:
    """Six standard deviations above what chi-square is on average."""
    return (bins - 1) + 6 * math.sqrt(2 * (bins - 1))

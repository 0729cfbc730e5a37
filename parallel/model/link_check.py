"""What the links between the GPUs of a node give: copies from one to another, and the sum over all of them.

Measures with nothing else running, in one process; knows nothing of what a link should give.
"""

import time
from collections.abc import Callable

import torch

COPY_BYTES = 256 << 20  # long enough for any link to reach its speed
REPEATS = 4
ROUNDS = 3  # the best counts: what comes between is not the link's


def copy_bytes_s(source: int, target: int) -> float:
    """Bytes a second of a copy."""
    given = torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
    taken = torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{target}")
    return COPY_BYTES / _best_s(lambda: taken.copy_(given), (source, target))


def all_reduce_bytes_s(gpus: int) -> float:
    """Bytes a second that NCCL's all-reduce over the first `gpus` moves through each GPU's link: its bus bandwidth, as
    NCCL's own tests have it."""
    import torch.cuda.nccl

    parts = [torch.ones(COPY_BYTES // 4, device=f"cuda:{index}") for index in range(gpus)]
    seconds = _best_s(lambda: torch.cuda.nccl.all_reduce(parts), tuple(range(gpus)))
    return COPY_BYTES / seconds * 2 * (gpus - 1) / gpus


def _best_s(work: Callable[[], object], gpus: tuple[int, ...]) -> float:
    """Seconds of one call."""

    def run(repeats: int) -> float:
        began_s = time.perf_counter()
        for _ in range(repeats):
            work()
        for index in gpus:
            torch.cuda.synchronize(index)
        return (time.perf_counter() - began_s) / repeats

    run(1)
    return min(run(REPEATS) for _ in range(ROUNDS))

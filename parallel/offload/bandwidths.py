"""What this machine's memory gives its cores, and its link a GPU: `python -m ...bandwidths FILE` measures both, within
some seconds, and keeps them there (`planning.speeds`).

A process of its own, as a plan is made where no torch is loaded. Measures with nothing else running; knows no plan.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..kernels.cpu_build import NoLibraryError, cpu_flags, level_for, library
from ..kernels.cpu_products import SOURCE, Threads, thread_count
from ..planning.speeds import Speeds, keep_speeds

HOST_BYTES = 1 << 30  # more than caches hold
LINK_BYTES = 256 << 20
ROUNDS = 5  # the best counts: what comes between is not the memory's


def host_bytes_s() -> float:
    """As our experts on the CPU read it; by torch where they cannot be compiled."""
    memory = torch.zeros(HOST_BYTES, dtype=torch.uint8).fill_(1)  # written, so that its pages are there
    try:
        threads = Threads(library(SOURCE, level_for(cpu_flags())), thread_count())
        return HOST_BYTES / _best_s(lambda: threads.read(memory))
    except NoLibraryError:
        words = memory.view(torch.int64)
        return HOST_BYTES / _best_s(lambda: words.sum())


def link_bytes_s(device: torch.device) -> float:
    """From pinned memory to the GPU."""
    given = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    taken = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)

    def copy() -> None:
        taken.copy_(given, non_blocking=True)
        torch.cuda.synchronize(device)

    return LINK_BYTES / _best_s(copy)


def _best_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return min(times)


def main() -> None:
    link = link_bytes_s(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    keep_speeds(Path(sys.argv[1]), Speeds(host=host_bytes_s(), link=link))


if __name__ == "__main__":
    main()

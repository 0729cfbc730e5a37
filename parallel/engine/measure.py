"""What a rank's memory really went into, by the names of the plan, and how long a step takes.

On CUDA from the books of torch's own allocator. On the CPU torch keeps none, and no memory is reported.
"""

import time
from collections.abc import Callable

import torch

from . import kv
from .engine import Engine

REPEATS = 5


class Meter:
    """Bytes that stay in use since the mark before, each under a name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: dict[str, int] = {}

    def mark(self, name: str) -> None:
        if self._device.type == "cuda":
            self._parts[name] = torch.cuda.memory_allocated(self._device) - sum(self._parts.values())

    def outside_bytes(self) -> int:
        """What is used on the device, by this process or others, and is not the allocator's."""
        if self._device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)

    def finish(self, communication_bytes: int) -> dict[str, int]:
        """The marked parts, and three more: workspace_bytes, what the allocator holds besides them at its peak;
        communication_bytes, as it was found; and context_bytes, what else is used outside of the allocator: CUDA's
        context, loaded kernels, other processes.
        """
        if self._device.type != "cuda":
            return {}
        return self._parts | {
            "workspace_bytes": torch.cuda.max_memory_reserved(self._device) - sum(self._parts.values()),
            "communication_bytes": communication_bytes,
            "context_bytes": self.outside_bytes() - communication_bytes,
        }


def warm_up(engine: Engine) -> None:
    """On a GPU the largest step at the end of the longest context, so that kernels are loaded and the peak is seen and
    taken, before anybody else takes it; on the CPU a token."""
    plan, sequence = engine.plan, kv.Sequence()
    tokens = 1
    if plan.device == "cuda":
        tokens = min(plan.step_tokens, plan.context_tokens)
        while sequence.length + 2 * tokens <= plan.context_tokens:  # pages as if these steps had been made
            kv.extend(engine.pool, sequence, tokens, plan.spec, plan.page_tokens)
            kv.drop_passed(engine.pool, sequence, plan.spec, plan.page_tokens)
    engine.step(sequence, [0] * tokens)
    kv.release(engine.pool, sequence)


def step_times(engine: Engine) -> dict[str, float]:
    """Seconds of a decode step of one token, and of its all-reduces alone: what communication can cost at most.

    Every rank of the replica calls it.
    """
    spec, sequence = engine.plan.spec, kv.Sequence()
    step_s = _fastest(lambda: engine.step(sequence, [0]), engine.device)
    kv.release(engine.pool, sequence)
    if engine.plan.ranks == 1:
        return {"decode_step_s": step_s}
    message_TH = torch.zeros((1, spec.hidden), dtype=engine.weights.embed_VH.dtype, device=engine.device)

    def all_reduces() -> None:
        for _ in range(2 * spec.layers + 1):  # two a layer, and the embedding's
            engine.comm.all_reduce(message_TH)

    return {"decode_step_s": step_s, "communication_s": _fastest(all_reduces, engine.device)}


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began_s)
    return min(times)

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

    def finish(self) -> dict[str, int]:
        """The marked parts, and two more: workspace_bytes, what the allocator holds besides them at its peak; and
        context_bytes, what is used on the device outside of it: CUDA's context, loaded kernels, NCCL, other processes.
        """
        if self._device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.max_memory_reserved(self._device)
        return self._parts | {
            "workspace_bytes": reserved - sum(self._parts.values()),
            "context_bytes": total - free - torch.cuda.memory_reserved(self._device),
        }


def warm_up(engine: Engine) -> None:
    """A step of the largest size on a GPU, so that kernels are loaded and the peak is seen; a token on the CPU."""
    plan = engine.plan
    tokens = min(plan.step_tokens, plan.context_tokens) if plan.device == "cuda" else 1
    sequence = kv.Sequence()
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

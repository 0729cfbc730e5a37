"""What a rank's memory really went into, by the names of the plan, and the step that finds out.

On CUDA from the books of torch's own allocator. On the CPU torch keeps none, and nothing is reported.
"""

import torch

from . import kv
from .engine import Engine


class Meter:
    """Bytes that stay allocated since the mark before, each under a name."""

    def __init__(self, device: str) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        self._parts: dict[str, int] = {}

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            self._parts[name] = torch.cuda.memory_allocated(self.device) - sum(self._parts.values())

    def finish(self) -> dict[str, int]:
        """The marked parts, and two more: workspace_bytes, what the allocator holds besides them at its peak; and
        context_bytes, what is used on the device outside of it: CUDA's context, loaded kernels, other processes."""
        if self.device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.max_memory_reserved(self.device)
        return self._parts | {
            "workspace_bytes": reserved - sum(self._parts.values()),
            "context_bytes": total - free - torch.cuda.memory_reserved(self.device),
        }


def warm_up(engine: Engine) -> None:
    """A step of the largest size on a GPU, so that kernels are loaded and the peak is seen; a token on the CPU."""
    plan = engine.plan
    tokens = min(plan.step_tokens, plan.context_tokens) if plan.device == "cuda" else 1
    sequence = kv.Sequence()
    engine.step(sequence, [0] * tokens)
    kv.release(engine.pool, sequence)

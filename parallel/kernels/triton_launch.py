"""How a Triton kernel is given what is fixed when it is compiled, and when it may start.

From sm_90 on a kernel of a decode step is launched while the one before it still runs (programmatic dependent launch):
what it does before `gdc_wait` overlaps with the other's end. That may be: read weights, and what the kernel before the
last has written, since each of these kernels waits before it lets the next one start. A kernel must not write before it
has waited.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor


def early(x: Tensor) -> bool:
    """Whether kernels on the device of x may start before the last one has ended."""
    return x.is_cuda and _capability(x.device) >= (9, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Kept, as every launch asks."""
    return torch.cuda.get_device_capability(device)


def constants(**values: Any) -> dict[str, Any]:
    """Constexpr arguments, num_warps and num_stages of a launch, without types: those of triton.jit know neither that
    an int serves as a constexpr nor what a launch takes besides. EARLY: start as said above."""
    return values | {"launch_pdl": True} if values.get("EARLY") else values

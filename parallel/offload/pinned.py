"""Host memory that copies to a GPU need not wait for: locked where it is, for as long as its tensor is there. Or what
is left where the system refuses that.

Does not know what is in it.
"""

import mmap
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAPPED = 2  # cudaHostRegisterMapped: kernels read it too, at the same address


class NotPinnedError(Exception):
    """Says how much, and what CUDA answered."""


@dataclass
class Pins:
    """Locks memory until that is refused once, and leaves memory as it is from then on: copies from there are slower,
    but the same. slow: where it is said."""

    slow: list[str]
    refused: bool = False

    def __call__(self, tensor: Tensor) -> Tensor:
        if not self.refused:
            try:
                return pinned(tensor)
            except NotPinnedError as error:
                self.refused = True
                why = f"{error}; `ulimit -l` may help"
                self.slow.append(f"experts in host memory that is not pinned, so that each copy is staged: {why}")
        return tensor


def pinned(tensor: Tensor) -> Tensor:
    """The same values in pages of their own, locked until the tensor goes away. Raises NotPinnedError where the system
    refuses.

    torch's own pinned memory is rounded up to a power of two, which no plan foresees. Pages that are shared with other
    tensors would be locked for both, and whoever gets the memory next would find it locked still.
    """
    pages = mmap.mmap(-1, tensor.nbytes)  # unmapped with the last tensor that views it
    copy = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)
    runtime: Any = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(copy.data_ptr(), copy.nbytes, MAPPED))
    if code:
        _forget_error()
        raise NotPinnedError(f"{tensor.nbytes} bytes of host memory cannot be pinned: CUDA error {code}")
    weakref.finalize(copy, _unpin, copy.data_ptr()).atexit = False  # the process takes its locks with it
    return copy


def _unpin(address: int) -> None:
    """Called before the memory goes."""
    torch.cuda.synchronize()  # copies from there may be under way
    runtime: Any = torch.cuda.cudart()
    code = int(runtime.cudaHostUnregister(address))
    assert code == 0, f"host memory at {address:#x} is not unpinned: CUDA error {code}"


def _forget_error() -> None:
    """CUDA keeps an error for whoever asks next, which would be some kernel that has nothing to do with it."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        pass

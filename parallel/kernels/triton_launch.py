"""How a Triton kernel is given what is fixed when it is compiled, when it may start, and how the last of its programs
knows that it is.

From sm_90 on a kernel of a decode step is launched while those before it still run (programmatic dependent launch), as
soon as all programs of the last one have begun: what it does before `gdc_wait` overlaps with them. That may be: read
weights, and what an earlier step has left. A kernel writes, and reads what this step has made, once it has waited: then
all before it are over, since each of them has waited too. The step's record, and what `begin` made of its tokens, may
be read earlier: the last kernel of `begin` lets none start while it runs. One exception: triton_decode._gate_up lets
none start before it has waited, so that those up to the next norm may read what was made before it.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ARRIVALS = 4096  # counters of a device
MOST_REGISTERS = 255  # of a lane
PROGRAMS_AT_ONCE, WARPS_AT_ONCE = 16, 48  # that any multiprocessor from sm_80 on runs, as far as registers allow
FOUND_S = 0.2  # by when a kernel that is not compiled is found; most take some ms, the first some ten


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


def capped(x: Tensor, registers: int | None) -> dict[str, int]:
    """For `constants`: the most registers of a lane, None for as many as the compiler likes. Triton's interpreter, for
    x on a CPU, takes no such option."""
    return {} if registers is None or not x.is_cuda else {"maxnreg": registers}


@contextmanager
def compiled_together(threads: int) -> Iterator[None]:
    """Within it no kernel runs: all that are launched are compiled instead, in so many threads, or found in Triton's
    cache. They are there on return. What they would have written is not, so nothing may be looked up by it."""
    run = triton.JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if isinstance(kernel, triton.FutureKernel) and kernel.future.done():
            kernel.result()  # a later launch finds it in the process; Triton 3.6 would look for its file each time
        return kernel

    triton.JITFunction.run = compile_only  # what a launch calls; Triton has no other way to turn one into a warm-up
    try:
        with _Compilers(threads, "compile") as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        triton.JITFunction.run = run


class _Compilers(ThreadPoolExecutor):
    """Threads of Triton's that compile. As long as all kernels are found in its cache, each is waited for: that takes
    less time than to let threads that read small files wait for Python's lock."""

    _compiles = False

    def submit(self, compile_one: Callable[[], Any]) -> Future[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kernel = super().submit(_compiled, compile_one)
        if not self._compiles:
            self._compiles = bool(wait((kernel,), FOUND_S).not_done)
        return kernel


def _compiled(compile_one: Callable[[], Any]) -> Any:
    """A kernel, and what passes the arguments to it: up to Triton 3.6 a module in C, for which the first launch would
    call a compiler. It goes into Triton's cache too."""
    kernel = compile_one()
    driver: Any = triton.runtime.driver.active
    driver.launcher_cls(kernel.src, kernel.metadata)
    return kernel


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors; 1 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def at_once(warps: int, registers: int) -> int:
    """Programs of so many warps, with at most so many registers a lane, that any multiprocessor from sm_80 on runs at
    the same time: each of its quarters shares out 16,384 registers, 256 at a time."""
    by_registers = 4 * (16384 // (-(-registers // 8) * 8 * 32)) // warps
    return min(by_registers, WARPS_AT_ONCE // warps, PROGRAMS_AT_ONCE)


@cache
def arrivals(device: torch.device) -> Tensor:
    """ARRIVALS counters for `arrive`, zeros between kernels. One stream a device: calls may not overlap."""
    return torch.zeros(ARRIVALS, dtype=torch.int32, device=device)


@triton.jit
def arrive(arrivals, expected):
    """True for the last of the expected programs: what the others stored is visible to it. Leaves the counter at 0."""
    tl.debug_barrier()  # stores of all lanes come before the release below
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(arrivals, 0)
    return last

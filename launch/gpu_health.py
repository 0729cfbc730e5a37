"""Whether GPUs are in order, as their driver tells: errors of memory, clocks that are held down, who else uses them.

`look_at_gpus` reads, `judge_gpus` makes checks of it and touches nothing. Loads no torch; measures nothing.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..parallel.planning.machine import format_size, visible_handles
from .node_reports import Check

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h) that a person has to do something about. A power cap, idleness
# and clocks that were set on purpose are none.
SLOWED = {
    0x08: "slowed down by hardware, for heat or power",
    0x20: "slowed down by the driver, for heat",
    0x40: "slowed down by hardware, for heat",
    0x80: "slowed down by the power supply",
}


@dataclass(frozen=True)
class Health:
    """One GPU. None: it does not say, as consumer cards do not of memory errors.

    uncorrected: memory errors since the driver was loaded that ECC could not correct. remap_failed, remap_pending: rows
    of memory that went bad could not be, or will at the next reset be, replaced. slowed: why clocks are held down.
    processes: of others, in words.
    """

    uncorrected: int | None
    remap_failed: bool
    remap_pending: bool
    slowed: tuple[str, ...]
    celsius: int | None
    processes: tuple[str, ...]


def look_at_gpus(nvml: Any) -> tuple[Health, ...]:
    """Those that CUDA shows. nvml: the module, begun with."""
    return tuple(_look(nvml, handle) for handle in visible_handles(nvml, os.environ.get("CUDA_VISIBLE_DEVICES")))


def _look(nvml: Any, handle: Any) -> Health:
    def ask(name: str, *arguments: Any) -> Any:
        """None where the GPU, the driver or the binding does not know it."""
        function: Callable[..., Any] | None = getattr(nvml, name, None)
        try:
            return None if function is None else function(handle, *arguments)
        except nvml.NVMLError:
            return None

    bits = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if bits is None:  # its name before driver 535
        bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    if bits & 0xC0:  # heat or power, which is told apart there
        bits &= ~0x08
    remapped = ask("nvmlDeviceGetRemappedRows")  # corrected, uncorrected, pending, failed; from Ampere on
    processes = ask("nvmlDeviceGetComputeRunningProcesses") or ()
    return Health(
        uncorrected=ask("nvmlDeviceGetTotalEccErrors", 1, 0),  # uncorrected, since the driver was loaded
        remap_failed=bool(remapped and remapped[3]),
        remap_pending=bool(remapped and remapped[2]),
        slowed=tuple(words for bit, words in SLOWED.items() if bits & bit),
        celsius=ask("nvmlDeviceGetTemperature", 0),
        processes=tuple(_in_words(nvml, one) for one in processes if one.pid != os.getpid()),
    )


def _in_words(nvml: Any, process: Any) -> str:
    try:
        name = nvml.nvmlSystemGetProcessName(process.pid)
        name = os.path.basename(name.decode() if isinstance(name, bytes) else name)
    except nvml.NVMLError:  # of another user, or outside this container
        name = "?"
    held = f", {format_size(process.usedGpuMemory)}" if process.usedGpuMemory else ""
    return f"{process.pid} {name}{held}"


def judge_gpus(gpus: Sequence[Health]) -> Iterable[Check]:
    """A line for each GPU that is in order, one for each fault of the others, and one for processes."""
    for number, gpu in enumerate(gpus):
        faults = list(_faults(gpu))
        state = "no memory errors" if gpu.uncorrected is not None else "no word of memory errors"
        heat = "" if gpu.celsius is None else f", {gpu.celsius} C"
        if not faults:
            yield Check(f"GPU {number} health", f"{state}, clocks free{heat}", "in order", True, "")
        for found, wanted, hint in faults:
            yield Check(f"GPU {number} health", found + heat, wanted, False, hint)
    if gpus:
        others = [f"GPU {number}: {process}" for number, gpu in enumerate(gpus) for process in gpu.processes]
        hint = "what they hold is not free: end them, or hide the GPU with CUDA_VISIBLE_DEVICES"
        yield Check("other processes on the GPUs", "; ".join(others) or "none", "none", not others, hint)


def _faults(gpu: Health) -> Iterable[tuple[str, str, str]]:
    """(found, wanted, hint)"""
    if gpu.uncorrected:
        hint = "nvidia-smi --gpu-reset; a GPU whose errors come again has to be replaced"
        yield f"{gpu.uncorrected} memory errors that ECC could not correct", "none", hint
    if gpu.remap_failed:
        yield "rows of its memory are bad and cannot be replaced", "none", "the GPU has to be replaced"
    if gpu.remap_pending:
        yield "rows of its memory wait to be replaced", "none", "nvidia-smi --gpu-reset replaces them"
    for words in gpu.slowed:
        yield words, "clocks free", "look at cooling and power; nvidia-smi -q -d PERFORMANCE,TEMPERATURE says more"

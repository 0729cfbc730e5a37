"""What doctor tries out where it may take its time: kernels against their references, and links between GPUs.

Loads torch, in this process, and uses every GPU that CUDA shows. `judge_kernels` touches nothing.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ..parallel.planning.choice import sm
from ..parallel.planning.machine import Gpu
from .gpu_links import judge_links, links_of
from .node_reports import Check

if TYPE_CHECKING:
    from ..parallel.model.kernel_check import Agreement

# Compute capability; below, and on a CPU but for its experts, plans take the references themselves.
TRITON_FROM = (8, 0)
NOT_TRIED = "the words are torch's, Triton's or the driver's; other lines of doctor may say why"


def measure(gpus: Sequence[Gpu]) -> list[Check]:
    """gpus: those that CUDA shows. Without any, the CPU's kernels."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # numbers GPUs as the driver does; torch is not loaded yet
    checks: list[Check] = []
    for index, gpu in enumerate(gpus):
        if gpu.capability >= TRITON_FROM:
            checks += _tried(f"kernels on GPU {index}", lambda index=index: _kernels_on(index))
        else:
            found = f"{sm(gpu)}: plain torch, which is the reference"
            checks.append(Check(f"kernels on GPU {index}", found, "none", True, ""))
    if not gpus:
        checks += _tried("kernels on the CPU", _kernels_of_cpu)
    if len(gpus) > 1:
        checks += _tried("links between GPUs", lambda: _links(gpus))
    return checks


def _tried(name: str, work: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        return list(work())
    except Exception as error:  # whatever torch, Triton, a compiler or the driver raises is what is wrong here
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [Check(name, f"cannot be tried: {type(error).__name__}: {first}", "tried", False, NOT_TRIED)]


def _kernels_on(index: int) -> Iterable[Check]:
    from ..parallel.model.kernel_check import check_gpu

    return judge_kernels(f"on GPU {index}", check_gpu(index))


def _kernels_of_cpu() -> Iterable[Check]:
    from ..parallel.model.kernel_check import check_cpu

    return judge_kernels("on the CPU", check_cpu())


def judge_kernels(where: str, agreements: "Sequence[Agreement]") -> Iterable[Check]:
    """A line for each operation that disagrees, or one for all of them."""
    bad = [one for one in agreements if not one.holds]
    for one in bad:
        hint = "nothing right comes from it: leave this device out, or --kernels plain; then tell us"
        found = f"off by {one.error:.1e} of the largest value"
        yield Check(f"{one.operation} {where}", found, f"at most {one.limit:.0e}", False, hint)
    if agreements and not bad:
        worst = max(agreements, key=lambda one: one.error / one.limit)
        found = f"as their references, of {len(agreements)}; the largest error {worst.error:.1e} ({worst.operation})"
        yield Check(f"kernels {where}", found, f"at most {worst.limit:.0e} of the largest value", True, "")


def _links(gpus: Sequence[Gpu]) -> Iterable[Check]:
    import pynvml

    from ..parallel.model.link_check import all_reduce_bytes_s, copy_bytes_s

    pynvml.nvmlInit()
    try:
        links = links_of(pynvml)
    finally:
        pynvml.nvmlShutdown()
    copies = {pair: copy_bytes_s(*pair) for pair in links}
    return judge_links(links, copies, all_reduce_bytes_s(len(gpus)))

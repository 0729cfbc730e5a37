"""What links between GPUs should give, as their driver tells, and what was measured beside it.

    links_of        reads the driver: which GPUs NVLink joins, and how PCIe is plugged
    judge_links     makes checks of that and of measurements, and touches nothing

Loads no torch.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..parallel.planning.machine import visible_handles
from .node_reports import Check

# Bytes a second of one NVLink in one direction, from this compute capability on (NVIDIA's white papers of P100, V100,
# A100, RTX 3090, H100, B200). The version that NVML tells would do, but drivers have told Hopper's wrong.
NVLINK_BYTES_S = {(6, 0): 20e9, (7, 0): 25e9, (8, 0): 25e9, (8, 6): 14.0625e9, (9, 0): 25e9, (10, 0): 50e9}
# Of one lane, by PCIe's generation (PCI-SIG: transfers a second, less the encoding).
LANE_BYTES_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
GPU = 0  # NVML_NVLINK_DEVICE_TYPE_GPU; at the end of other links is a switch, behind which are all GPUs

# Shares of it that are wanted. A copy over PCIe may have to go through host memory, twice over the same lanes.
COPY_SHARE = {"NVLink": 0.6, "PCIe": 0.25}
REDUCE_SHARE = {"NVLink": 0.4, "PCIe": 0.1}


@dataclass(frozen=True)
class Link:
    """Between two GPUs, in one direction."""

    kind: str
    bytes_s: float


Pair = tuple[int, int]


def links_of(nvml: Any) -> dict[Pair, Link]:
    """Of every two GPUs that CUDA shows. nvml: the module, begun with."""
    handles = visible_handles(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    places = [_bus(nvml.nvmlDeviceGetPciInfo(handle)) for handle in handles]
    nvlinks = [_nvlinks(nvml, handle) for handle in handles]
    pcie = [_pcie_bytes_s(nvml, handle) for handle in handles]
    found = {}
    for one in range(len(handles)):
        for other in range(len(handles)):
            if one != other:
                joined = sum(speed for speed, far in nvlinks[one] if far in ("switch", places[other]))
                slower = Link("PCIe", min(pcie[one], pcie[other]))
                found[one, other] = Link("NVLink", joined) if joined else slower
    return found


def _nvlinks(nvml: Any, handle: Any) -> list[tuple[float, str]]:
    """(bytes a second, bus address of what is at its end, or "switch") of each link that is up."""
    found = []
    capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle))
    speed = next((NVLINK_BYTES_S[first] for first in reversed(NVLINK_BYTES_S) if capability >= first), 0.0)
    for number in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            if nvml.nvmlDeviceGetNvLinkState(handle, number):
                is_gpu = nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, number) == GPU
                far = _bus(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, number)) if is_gpu else "switch"
                found.append((speed, far))
        except nvml.NVMLError:  # no link of that number
            continue
    return found


def _bus(info: Any) -> str:
    return f"{info.domain:x}:{info.bus:x}:{info.device:x}"


def _pcie_bytes_s(nvml: Any, handle: Any) -> float:
    """What the slot allows, not what it is at now: idle links are slowed down."""
    generation = nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
    newest = max(LANE_BYTES_S)
    return LANE_BYTES_S[min(generation, newest)] * nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)


def judge_links(links: Mapping[Pair, Link], copies: Mapping[Pair, float], all_reduce: float | None) -> Iterable[Check]:
    """A line for each pair that is too slow, or one for all of them; and one for the all-reduce over all GPUs.

    copies, all_reduce: bytes a second, measured.
    """
    shares = {pair: copies[pair] / links[pair].bytes_s for pair in links}
    slow = [pair for pair in sorted(links) if shares[pair] < COPY_SHARE[links[pair].kind]]
    for pair in slow:
        yield _copy(pair, links[pair], copies[pair])
    if links and not slow:
        worst = min(links, key=lambda pair: shares[pair])
        check = _copy(worst, links[worst], copies[worst])
        yield Check("links between GPUs", f"{len(links)} ways, the slowest {check.found}", check.wanted, True, "")
    if links and all_reduce is not None:
        slowest = min(links.values(), key=lambda link: link.bytes_s)
        wanted = REDUCE_SHARE[slowest.kind] * slowest.bytes_s
        found = f"{_rate(all_reduce)} through each of {1 + max(one for one, _ in links)} GPUs"
        hint = "NCCL_DEBUG=INFO says which way it takes; nvidia-smi topo -m shows the ways that there are"
        yield Check("all-reduce", found, f"{_rate(wanted)} or more", all_reduce >= wanted, hint)


def _copy(pair: Pair, link: Link, measured: float) -> Check:
    wanted = COPY_SHARE[link.kind] * link.bytes_s
    found = f"GPU {pair[0]} to {pair[1]}: {_rate(measured)} of {_rate(link.bytes_s)} ({link.kind})"
    hint = "nvidia-smi nvlink -s, and topo -m; is something else running? A machine that stays slow is to be left out"
    return Check("links between GPUs", found, f"{_rate(wanted)} or more", measured >= wanted, hint)


def _rate(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.1f} GB/s"

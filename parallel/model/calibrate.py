"""Which all-reduce for which message size: measured once per GPU, CUDA, torch and number of ranks, and kept on disk.

All ranks measure together, since a collective needs all of them; rank 0's times decide, and every rank gets its
decision.
"""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from ..planning.cache import cache_folder
from ..planning.plan import DTYPE_BYTES, Plan
from ..planning.speeds import CALIBRATION
from .comm import WAYS, Comm, Group, Limits, Linked, least, message_sizes

REPEATS = 30  # all-reduces per measurement, of which the fastest of three runs counts


def connect(plan: Plan, device: torch.device) -> tuple[Comm, tuple[str, ...]]:
    """The fastest Comm that the default process group's devices allow, and which of its ways did not work here. Called
    by every rank of the replica."""
    if device.type != "cuda" or not can_link():
        return Group(), ()
    buffer_bytes = plan.step_tokens * plan.spec.hidden * DTYPE_BYTES[plan.dtype]
    linked = Linked(buffer_bytes, limits=())
    kept = [read_cache(cache_file(device, plan.ranks), buffer_bytes) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(kept, src=0)
    if kept[0] is None:
        kept = [measure(linked, buffer_bytes, device)]
        dist.broadcast_object_list(kept, src=0)
        if dist.get_rank() == 0:
            write_cache(cache_file(device, plan.ranks), kept[0])
    linked.limits = tuple((limit, way) for limit, way in kept[0] or ())
    for size in message_sizes(buffer_bytes):  # now, so that NCCL takes its buffers before they are counted
        linked.all_reduce_by("group", torch.zeros(size, dtype=torch.uint8, device=device))
    torch.cuda.synchronize()
    return linked, linked.slow


def can_link() -> bool:
    """Whether every GPU of the replica can read the memory of every other one, as all ranks see it."""
    here, count = torch.cuda.current_device(), torch.cuda.device_count()
    mine = count >= dist.get_world_size() and all(
        torch.cuda.can_device_access_peer(here, other) for other in range(dist.get_world_size()) if other != here
    )
    return bool(least(int(mine)))


def measure(linked: Linked, buffer_bytes: int, device: torch.device) -> Limits:
    """The fastest way for each size, as (most bytes, way); neighbours that agree are one entry."""
    limits: list[tuple[int, str]] = []
    for size in message_sizes(buffer_bytes):
        message = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
        ways = [way for way in WAYS if linked.takes(way, message)]
        times = {way: min(_seconds(linked, way, message) for _ in range(3)) for way in ways}
        best = min(ways, key=lambda way: times[way])
        if limits and limits[-1][1] == best:
            limits.pop()
        limits.append((size, best))
    return tuple(limits)


def _seconds(linked: Linked, way: str, message: torch.Tensor) -> float:
    """Of one all-reduce among REPEATS in a CUDA graph, as steps of decodes have it."""
    linked.all_reduce_by(way, message)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(REPEATS):
            linked.all_reduce_by(way, message)
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / REPEATS


def cache_file(device: torch.device, ranks: int) -> Path:
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    software = f"cuda{torch.version.cuda}-torch{torch.__version__}"
    return cache_folder(CALIBRATION) / f"all-reduce-{'+'.join(WAYS)}-in-graph-{name}-x{ranks}-{software}.json"


def read_cache(path: Path, buffer_bytes: int) -> Limits | None:
    """What was measured before; None if nothing was, or only for smaller messages."""
    try:
        limits = tuple((int(limit), way) for limit, way in json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    known = bool(limits) and limits[-1][0] >= buffer_bytes and all(way in WAYS for _, way in limits)
    return limits if known else None


def write_cache(path: Path, limits: Limits | None) -> None:
    """Whole or not at all; a disk that cannot be written only means measuring again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(limits) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError:
        pass

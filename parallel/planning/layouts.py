"""Which layouts there are on a machine, and what each of them holds: replicas, ranks, ep, and the memory they need.

A layout is a mesh and a number of replicas on a node. Knows bytes and GPUs; does not know which layout is the best
(`choice`), nor how fast one is (`estimate`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UserError
from .machine import Gpu, Link
from .memory import Device, rank_memory
from .plan import DType, RankMemory
from .shards import Mesh, local_slices, table
from .spec import Spec

PAGE_TOKENS = 16
STEP_TOKENS: dict[Device, int] = {"cuda": 2048, "cpu": 512}
SMALLEST_CONTEXT_TOKENS = 1024  # chosen unasked; shorter ones hold little but the system message

# What the hidden state between layers is kept in: sums over many layers may leave fp16's range of 65504.
RESIDUAL: dict[DType, DType] = {"bf16": "bf16", "fp16": "fp32", "fp32": "fp32", "fp64": "fp64"}


@dataclass(frozen=True)
class Place:
    """Where ranks would run, and in which precision."""

    device: Device
    gpus: tuple[Gpu, ...]  # of one node, all alike, in their order; () on the CPU
    nodes: int
    link: Link
    host_free_bytes: int | None  # of one node; None: not known, not checked
    dtype: DType


@dataclass(frozen=True)
class Layout:
    """mesh: of one replica. per_node: replicas on the fullest node. context_tokens: the longest sequence."""

    mesh: Mesh
    per_node: int
    context_tokens: int


def kv_tokens(context_tokens: int) -> int:
    """One request runs at a time, so the cache holds one context: whole pages of it."""
    return -(-context_tokens // PAGE_TOKENS) * PAGE_TOKENS


def step_tokens(device: Device, context_tokens: int) -> int:
    return min(STEP_TOKENS[device], context_tokens)


def context_choices(max_context_tokens: int) -> tuple[int, ...]:
    """Contexts that the planner picks by itself, longest first: the model's own, then 8, 7, 6, 5 times powers of two.

    Steps this coarse keep a plan the same from start to start, while free memory differs by some MiB.
    """
    steps = [eighths << power for power in range(64) for eighths in (5, 6, 7, 8)]
    shorter = [tokens for tokens in steps if SMALLEST_CONTEXT_TOKENS <= tokens < max_context_tokens]
    return (max_context_tokens, *reversed(shorter))


def meshes(spec: Spec, ranks: Iterable[int], ep: int | None) -> tuple[Mesh, ...]:
    """Every mesh of so many ranks that the model can be cut for; with `ep`, only those of that ep."""
    found = []
    for count in ranks:
        for ways in range(1, count + 1):
            if count % ways == 0 and ep in (None, ways):
                try:
                    check_cuts(spec, Mesh(count, ways))
                except UserError:
                    continue
                found.append(Mesh(count, ways))
    return tuple(found)


def check_cuts(spec: Spec, mesh: Mesh) -> None:
    """Raises the shard table's UserError for the first tensor that has too few units for `mesh`."""
    for row in table(spec):
        local_slices(row, mesh, 0)


def memories(spec: Spec, place: Place, mesh: Mesh, context_tokens: int) -> tuple[RankMemory, ...]:
    """What each rank of one replica holds."""
    return tuple(
        rank_memory(
            spec,
            mesh,
            rank,
            place.device,
            place.dtype,
            RESIDUAL[place.dtype],
            place.dtype,
            context_tokens=context_tokens,
            kv_tokens=kv_tokens(context_tokens),
            page_tokens=PAGE_TOKENS,
            step_tokens=step_tokens(place.device, context_tokens),
        )
        for rank in range(mesh.ranks)
    )


def shortfall(spec: Spec, place: Place, layout: Layout) -> int:
    """Bytes missing on the GPU that lacks the most, and in a node's host memory besides; 0: it fits.

    On the CPU all ranks share the host's memory.
    """
    rows = memories(spec, place, layout.mesh, layout.context_tokens)
    on_gpu, on_host = 0, layout.per_node * sum(row.host_bytes for row in rows)
    if place.device == "cpu":
        on_host += layout.per_node * sum(row.device_bytes for row in rows)
    else:
        used = place.gpus[: layout.per_node * layout.mesh.ranks]
        missing = (rows[i % layout.mesh.ranks].device_bytes - gpu.free_bytes for i, gpu in enumerate(used))
        on_gpu = max(0, *missing)
    return on_gpu + (0 if place.host_free_bytes is None else max(0, on_host - place.host_free_bytes))


def longest(spec: Spec, place: Place, mesh: Mesh, per_node: int, contexts: Iterable[int]) -> Layout | None:
    """The layout with the first of `contexts`, longest first, that fits; None if none does."""
    layouts = (Layout(mesh, per_node, context) for context in contexts)
    return next((layout for layout in layouts if not shortfall(spec, place, layout)), None)


def most_replicas(spec: Spec, place: Place, layout: Layout) -> Layout:
    """`layout`, which fits, with as many replicas on a node as fit."""
    for per_node in range(len(place.gpus) // layout.mesh.ranks, layout.per_node, -1):
        more = Layout(layout.mesh, per_node, layout.context_tokens)
        if not shortfall(spec, place, more):
            return more
    return layout

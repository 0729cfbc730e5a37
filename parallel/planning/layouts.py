"""Which layouts there are on a machine, and what each of them holds: replicas, ranks, ep, and the memory they need.

A layout is a mesh and a number of replicas on a node. Knows bytes and GPUs; does not know which layout is the best
(`choice`), nor how fast one is (`estimate`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TypeVar

from ..errors import UserError
from .machine import Gpu, Link
from .memory import Device, Room, rank_memory
from .pages import page_bytes
from .plan import DType, Kept, Kernels, KvDType, RankMemory, Rest, kept
from .shards import Mesh, local_slices, part, table
from .spec import Spec

T = TypeVar("T")

PAGE_TOKENS = 16
STEP_TOKENS: dict[Device, int] = {"cuda": 2048, "cpu": 512}
MOST_SEQUENCES: dict[Device, int] = {"cuda": 256, "cpu": 64}  # that run at the same time in one replica
SPARE_SHARE = 0.9  # of the GPU memory left over that goes to the KV cache; the rest is for what no plan foresees
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
    kv_dtype: KvDType
    asked_kernels: Kernels | None = None
    rest: Rest = "bf16"

    @property
    def kernels(self) -> Kernels:
        """Triton's are for bf16, those of the CPU for all but fp64."""
        if self.asked_kernels is not None:
            return self.asked_kernels
        if self.device == "cpu":
            return "plain" if self.dtype == "fp64" else "cpu"
        return "triton" if self.dtype == "bf16" else "plain"

    @property
    def kept(self) -> Kept:
        """What the rest really is kept in."""
        return kept(self.rest, self.dtype, self.kernels)

    @property
    def unpacks(self) -> bool:
        """Whether weights of 8 bits are dequantized for each product, instead of read as they are."""
        return self.rest != "bf16" and self.kernels == "plain"


@dataclass(frozen=True)
class Layout:
    """mesh: of one replica. per_node: replicas on the fullest node. context_tokens: the longest sequence. span: nodes
    that a replica lies on; with several, the only replica on each of them."""

    mesh: Mesh
    per_node: int
    context_tokens: int
    span: int = 1

    def here(self, ranks: Sequence[T]) -> Sequence[T]:
        """Of something for each rank of a replica, that on its fullest node, the first."""
        return ranks[: part(self.mesh.ranks, 1, 0, self.span).stop]

    def gpus(self, place: Place) -> tuple[Gpu, ...]:
        """Of the fullest node, those of its replicas' ranks in order; of a replica on several nodes, those of all its
        ranks."""
        if self.span == 1:
            return place.gpus[: self.per_node * self.mesh.ranks]
        parts = (part(self.mesh.ranks, 1, node, self.span) for node in range(self.span))
        return tuple(gpu for own in parts for gpu in place.gpus[: own.stop - own.start])


def one_context(device: Device, context_tokens: int) -> Room:
    """The least that a layout has to have room for: a single sequence of the whole context."""
    kv_tokens = -(-context_tokens // PAGE_TOKENS) * PAGE_TOKENS
    return Room(context_tokens, 1, kv_tokens, PAGE_TOKENS, step_tokens(device, context_tokens))


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


def memories(spec: Spec, place: Place, mesh: Mesh, room: Room, prompt_graphs: bool = True) -> tuple[RankMemory, ...]:
    """What each rank of one replica holds. prompt_graphs: as `memory.rank_memory`."""
    return tuple(
        rank_memory(
            spec,
            mesh,
            rank,
            place.device,
            place.dtype,
            RESIDUAL[place.dtype],
            place.kv_dtype,
            place.kernels,
            room,
            place.kept,
            prompt_graphs,
        )
        for rank in range(mesh.ranks)
    )


def shortfall(spec: Spec, place: Place, layout: Layout, room: Room | None = None) -> int:
    """Bytes missing on the GPU that lacks the most, and in a node's host memory besides; 0: it fits.

    On the CPU all ranks share the host's memory. room: one context unless given.
    """
    rows = memories(spec, place, layout.mesh, room or one_context(place.device, layout.context_tokens))
    on_gpu, on_host = 0, layout.per_node * sum(row.host_bytes for row in layout.here(rows))
    if place.device == "cpu":
        on_host += layout.per_node * sum(row.device_bytes for row in layout.here(rows))
    else:
        used = layout.gpus(place)
        missing = (rows[i % layout.mesh.ranks].device_bytes - gpu.free_bytes for i, gpu in enumerate(used))
        on_gpu = max(0, *missing)
    return on_gpu + (0 if place.host_free_bytes is None else max(0, on_host - place.host_free_bytes))


def longest(spec: Spec, place: Place, layout: Layout, contexts: Iterable[int]) -> Layout | None:
    """`layout` with the first of `contexts`, longest first, that fits; None if none does."""
    layouts = (replace(layout, context_tokens=context) for context in contexts)
    return next((layout for layout in layouts if not shortfall(spec, place, layout)), None)


def most_replicas(spec: Spec, place: Place, layout: Layout) -> Layout:
    """`layout`, which fits, with as many replicas on a node as fit."""
    for per_node in range(len(place.gpus) // layout.mesh.ranks, layout.per_node, -1):
        more = replace(layout, per_node=per_node)
        if not shortfall(spec, place, more):
            return more
    return layout


def widest(spec: Spec, place: Place, layout: Layout, sequences: int | None) -> Room:
    """The room of `layout`, which fits with one context: as many sequences as fit, at most MOST_SEQUENCES, and on GPUs
    what is left over as KV cache. On the CPU the cache stays at one context, as the memory is not the model's alone.

    sequences: asked for; may be more than fit, which `shortfall` tells.
    """
    least = one_context(place.device, layout.context_tokens)
    room = replace(least, sequences=sequences or 1)
    if sequences is None:
        halves = (MOST_SEQUENCES[place.device] >> halved for halved in range(MOST_SEQUENCES[place.device].bit_length()))
        rooms = (replace(least, sequences=count) for count in halves)
        room = next(one for one in rooms if one.sequences == 1 or not shortfall(spec, place, layout, one))
    if place.device == "cpu" or shortfall(spec, place, layout, room):
        return room
    rows = memories(spec, place, layout.mesh, room)
    used = layout.gpus(place)
    pages = min(
        int((gpu.free_bytes - rows[index % layout.mesh.ranks].device_bytes) * SPARE_SHARE)
        // page_bytes(spec, layout.mesh, index % layout.mesh.ranks, place.kv_dtype, PAGE_TOKENS)
        for index, gpu in enumerate(used)
    )
    most = room.kv_tokens + pages * PAGE_TOKENS
    # in steps, so that a plan stays the same from start to start; no more than all sequences can ever use
    steps = (eighths << power for power in range(64) for eighths in (5, 6, 7, 8))
    filled = max((tokens for tokens in takewhile(lambda tokens: tokens <= most, steps)), default=0)
    return replace(room, kv_tokens=max(room.kv_tokens, min(filled, room.sequences * room.kv_tokens)))

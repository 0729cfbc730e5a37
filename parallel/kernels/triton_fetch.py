"""Experts brought from host memory by the GPU itself: which a step lacks, in whose place they come, and the copy.

Host memory that is pinned lies in the GPU's address space, so that a kernel reads it over the link like its own.
Nothing waits for the host, and a step of decodes is one CUDA graph. A layer's slots are a cache: what is lacking takes
the place of what was unused for longest. Knows places and bytes; nothing of what an expert computes.

All kernels here are launched plainly (`triton_launch`): a slot is written once whoever read it is over. They let none
start while they run, so that the kernel after them has all bytes once it has waited; and those after it, which may read
weights before they wait, are let start only then (triton_decode._gate_up).

P pairs (token, expert), E experts of a layer, S slots.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from .triton_launch import constants, processors

ALIGNED_BYTES = 16  # of each part of an expert, and where it begins
CHUNK_BYTES = 16 << 10  # that a program copies at a time: 128 bytes of each lane
PROGRAMS = 4  # of a multiprocessor, which read 8 MB at a time: the link needs 0.1 MB on the way
PAIRS = 256  # looked at together
COUNTED = 4  # hits, misses, for how many ns steps stood still; the last fills 32 bytes
_CLOCK, _HITS, _MISSES, _STALLED, _BEGAN, _ENDED = (tl.constexpr(at) for at in range(6))


@dataclass(frozen=True)
class Cache:
    """A layer's experts in slots on the device, with what they are copied from, and the room for all of a step's.

    place_E: int32, where each expert is, -1: in no slot. expert_S, used_S: int64, what is in each slot, and the step in
    which it was last used. state: int64, by the names above. copies: int32 [max(S, E), 2] and how_many [1], of the
    step: where from (a slot, or -1 - expert: the host), and where to. addresses: int64 [parts, 4] of the host's, the
    slots', the room's, and the bytes of one expert. chunks: int32 [chunks of an expert, 2], part and place in it.
    counted: int64 [COUNTED] in pinned memory. kept: what the addresses are of.
    """

    place_E: Tensor
    expert_S: Tensor
    used_S: Tensor
    state: Tensor
    copies: Tensor
    how_many: Tensor
    addresses: Tensor
    chunks: Tensor
    counted: Tensor
    kept: tuple[tuple[Tensor, Tensor, Tensor], ...]


def fits(parts: Sequence[Tensor]) -> bool:
    """Whether experts of these, [E, ...], can be copied by words."""
    sizes = (part[0].nbytes % ALIGNED_BYTES == 0 and part.data_ptr() % ALIGNED_BYTES == 0 for part in parts)
    return all(part.is_contiguous() for part in parts) and all(sizes)


def make_cache(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], hot: Sequence[int], counted: Tensor, device: torch.device
) -> Cache:
    """parts: of all experts on the host [E, ...], in slots [S, ...], and the room for all [E, ...], for blocks, scales
    and biases of both products. hot: the experts that are in the slots, the most used first."""
    experts, slots = len(parts[0][0]), len(parts[0][1])
    sizes = tuple(host[0].nbytes for host, _, _ in parts)
    place_E = torch.full((experts,), -1, dtype=torch.int32)
    place_E[list(hot)] = torch.arange(slots, dtype=torch.int32)
    addresses = [[*(tensor.data_ptr() for tensor in three), size] for three, size in zip(parts, sizes, strict=True)]
    return Cache(
        place_E=place_E.to(device),
        expert_S=torch.tensor(hot, dtype=torch.int64, device=device),
        used_S=-torch.arange(slots, device=device),
        state=torch.zeros(6, dtype=torch.int64, device=device),
        copies=torch.empty((max(slots, experts), 2), dtype=torch.int32, device=device),
        how_many=torch.zeros(1, dtype=torch.int32, device=device),
        addresses=torch.tensor(addresses, device=device),
        chunks=_chunks(sizes, device),
        counted=counted,
        kept=tuple(parts),
    )


@cache
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The same for all layers."""
    rows = [(part, start) for part, size in enumerate(sizes) for start in range(0, size, CHUNK_BYTES)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def fetch(experts_TX: Tensor, cache: Cache) -> Tensor:
    """int64 [T, X]: the slots of a step's experts, once all are there. At most as many pairs as slots."""
    places_TX = torch.empty_like(experts_TX)
    pairs, slots = experts_TX.numel(), len(cache.used_S)
    assert pairs <= slots
    _replace[(1,)](
        experts_TX,
        places_TX,
        cache.place_E,
        cache.expert_S,
        cache.used_S,
        cache.state,
        cache.copies,
        cache.how_many,
        cache.counted,
        pairs,
        slots,
        len(cache.place_E),
        **constants(
            SLOTS=triton.next_power_of_2(slots),
            EXPERTS=triton.next_power_of_2(len(cache.place_E)),
            TIMED=experts_TX.is_cuda,
            num_warps=1,
        ),
    )
    _copy_all(cache, gathers=False)
    return places_TX


def gather(experts_TX: Tensor, cache: Cache) -> None:
    """A step's experts into their places in the room for all. The slots stay as they are."""
    _list_wanted[(1,)](
        experts_TX,
        cache.place_E,
        cache.state,
        cache.copies,
        cache.how_many,
        cache.counted,
        experts_TX.numel(),
        len(cache.place_E),
        **constants(
            EXPERTS=triton.next_power_of_2(len(cache.place_E)), PAIRS=PAIRS, TIMED=experts_TX.is_cuda, num_warps=4
        ),
    )
    _copy_all(cache, gathers=True)


def _copy_all(cache: Cache, gathers: bool) -> None:
    on_gpu = cache.state.is_cuda
    programs = PROGRAMS * processors(cache.state.device) if on_gpu else 2
    _copy[(programs,)](
        cache.copies,
        cache.how_many,
        cache.addresses,
        cache.chunks,
        cache.state,
        len(cache.chunks),
        **constants(GATHERS=gathers, CHUNK=CHUNK_BYTES // 8, TIMED=on_gpu, num_warps=4),
    )


@triton.jit
def _count(state, counted, hits, misses, TIMED: tl.constexpr):
    """Adds to what the host reads, and begins the next stall; the one before has ended."""
    hits += tl.load(state + _HITS)
    total = misses + tl.load(state + _MISSES)
    stalled, began, ended = tl.load(state + _STALLED), tl.load(state + _BEGAN), tl.load(state + _ENDED)
    stalled += tl.where(began > 0, tl.maximum(ended - began, 0), 0)
    tl.store(state + _HITS, hits)
    tl.store(state + _MISSES, total)
    tl.store(state + _STALLED, stalled)
    tl.store(counted, hits)
    tl.store(counted + 1, total)
    tl.store(counted + 2, stalled)
    if TIMED:
        tl.store(state + _BEGAN, tl.where(misses > 0, globaltimer().to(tl.int64), 0))


@triton.jit(do_not_specialize=["pairs", "slots", "held"])
def _replace(
    experts,
    places,
    place_E,
    expert_S,
    used_S,
    state,
    copies,
    how_many,
    counted,
    pairs,
    slots,
    held,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TIMED: tl.constexpr,
):
    """One program of one warp, which keeps the cache in registers while it goes through the pairs."""
    e, s = tl.arange(0, EXPERTS), tl.arange(0, SLOTS)
    place = tl.load(place_E + e, mask=e < held, other=-1)
    inside = tl.load(expert_S + s, mask=s < slots, other=-1)
    last = 0x7FFFFFFFFFFFFFFF
    used = tl.load(used_S + s, mask=s < slots, other=last)
    now = tl.load(state + _CLOCK) + 1
    for pair in range(pairs):  # what is there and needed is not given up
        slot = tl.sum(tl.where(e == tl.load(experts + pair).to(tl.int32), place, 0), 0)
        used = tl.where(s == slot, now, used)
    hits = tl.sum((used == now).to(tl.int32), 0)
    misses = 0
    for pair in range(pairs):
        expert = tl.load(experts + pair).to(tl.int32)
        slot = tl.sum(tl.where(e == expert, place, 0), 0)
        if slot < 0:
            slot = tl.argmin(used, 0).to(tl.int32)
            gone = tl.sum(tl.where(s == slot, inside, 0), 0)
            place = tl.where(e == gone, -1, tl.where(e == expert, slot, place))
            inside = tl.where(s == slot, expert, inside)
            used = tl.where(s == slot, now, used)
            tl.store(copies + misses * 2, -1 - expert)
            tl.store(copies + misses * 2 + 1, slot)
            misses += 1
        tl.store(places + pair, slot.to(tl.int64))
    tl.store(how_many, misses)
    tl.store(place_E + e, place, mask=e < held)
    tl.store(expert_S + s, inside, mask=s < slots)
    tl.store(used_S + s, used, mask=s < slots)
    tl.store(state + _CLOCK, now)
    _count(state, counted, hits, misses, TIMED)


@triton.jit(do_not_specialize=["pairs", "held"])
def _list_wanted(
    experts,
    place_E,
    state,
    copies,
    how_many,
    counted,
    pairs,
    held,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    TIMED: tl.constexpr,
):
    """Every expert that some pair needs, from where it is."""
    e = tl.arange(0, EXPERTS)
    place = tl.load(place_E + e, mask=e < held, other=-1)
    wanted = tl.zeros((EXPERTS,), tl.int32)
    for begin in range(0, pairs, PAIRS):
        pair = begin + tl.arange(0, PAIRS)
        expert = tl.load(experts + pair, mask=pair < pairs, other=-1).to(tl.int32)
        wanted = tl.maximum(wanted, tl.max((expert[:, None] == e[None, :]).to(tl.int32), 0))
    at = tl.cumsum(wanted, 0) - 1
    tl.store(copies + at * 2, tl.where(place < 0, -1 - e, place), mask=wanted != 0)
    tl.store(copies + at * 2 + 1, e, mask=wanted != 0)
    count = tl.sum(wanted, 0)
    tl.store(how_many, count)
    misses = tl.sum(tl.where(place < 0, wanted, 0), 0)
    _count(state, counted, count - misses, misses, TIMED)


@triton.jit(do_not_specialize=["chunks_each"])
def _copy(
    copies,
    how_many,
    addresses,
    chunks,
    state,
    chunks_each,
    GATHERS: tl.constexpr,
    CHUNK: tl.constexpr,
    TIMED: tl.constexpr,
):
    """The programs share out the chunks of all experts that are copied."""
    lane = tl.arange(0, CHUNK)
    total = tl.load(how_many) * chunks_each
    for at in range(tl.program_id(0), total, tl.num_programs(0)):
        copy, chunk = at // chunks_each, at % chunks_each
        source, target = tl.load(copies + copy * 2), tl.load(copies + copy * 2 + 1)
        part, start = tl.load(chunks + chunk * 2), tl.load(chunks + chunk * 2 + 1)
        table = addresses + part * 4
        size = tl.load(table + 3)
        from_host = source < 0
        place = tl.where(from_host, -1 - source, source).to(tl.int64)
        begin = tl.where(from_host, tl.load(table), tl.load(table + 1)) + place * size + start
        to = tl.load(table + (2 if GATHERS else 1)) + target.to(tl.int64) * size + start
        words = tl.multiple_of(begin, 16).to(tl.pointer_type(tl.int64), bitcast=True) + lane
        there = tl.multiple_of(to, 16).to(tl.pointer_type(tl.int64), bitcast=True) + lane
        more = lane < tl.multiple_of((size - start) // 8, 2)
        tl.store(there, tl.load(words, mask=more), mask=more)
    if TIMED:
        if total > 0:
            tl.atomic_max(state + _ENDED, globaltimer().to(tl.int64), sem="relaxed")

"""Where experts go that the device cannot hold: the ways there are, what fits, and how fast each may be.

One rank. A way keeps everything but experts on the device, as many experts as fit beside it, and the others in host
memory or in the checkpoint's mapped file. The estimates are sums of bytes over bandwidths; they compare ways, and count
nothing of prefill. Knows no words (`reasons`) and moves nothing (`parallel.offload`).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod

from .choice import Asked
from .estimate import PACE, bandwidth, read_bytes, unpacked_bytes
from .layouts import PAGE_TOKENS, Place, context_choices, memories
from .machine import Speeds
from .memory import PROCESS, Room, stored_element_bytes
from .placement import Routing
from .plan import DType, Misses, RankMemory, Way
from .shards import Mesh, table
from .spec import Spec

CONTEXT_TOKENS = 8192  # chosen unasked: what a longer one takes, experts would lose
SEQUENCES = 4  # at a time: many would need all experts in every step
STEP_TOKENS = 512  # of a prompt, so that the workspace leaves room for experts
STAGED_EXPERTS = 10  # on the device besides: one as it comes over the link, and what repacking it takes
# Between tensors, where torch's allocator cannot use it: a GPU here is filled to the brim, and a run on an H200 under a
# cap of 11 GiB ended 32 MiB short with 223 MiB of them.
GAPS_BYTES = 320 << 20

# Where the machine's own are not known. Low on purpose: a desktop of some years ago.
ASSUMED = Speeds(host=20e9, link=10e9, disk=1e9)
# Of the host's read bandwidth. On two cores of an EPYC with AVX-512 our C++ reaches 0.9 of it with the experts of one
# token, and a whole step of four layers of 20b as much as it; with AVX2 alone less (NOTES.md of the benchmarks).
CPU_SHARE = 0.8
# What a layer takes besides, where the host waits for the device to know which experts are needed, and then starts its
# kernels and copies one by one: 0.4 to 0.5 ms beside an H200, before the parts of experts were looked up once.
WAIT_S = 300e-6
CPU_LAYER_S = 800e-6  # where the CPU computes too: an H200's host of 16 cores took that much longer than its bytes do
FETCH_S = 10e-6  # where the device brings experts itself: three kernels more


@dataclass(frozen=True)
class Found:
    """A way that fits, and the rank that it makes."""

    way: Way
    room: Room
    memory: RankMemory


def ways(spec: Spec, place: Place, speeds: Speeds, asked: Asked) -> tuple[Found, ...]:
    """Those that fit, the fastest first; of equally fast ones the one that takes less of the host's memory.

    place: the GPU, of which the first is used, or the CPU. Empty where not even the dense part fits, or where the
    host's memory is not known.
    """
    if place.host_free_bytes is None:
        return ()
    speeds = known(speeds)
    found = [*_on_gpu(spec, place, speeds, asked)] if place.device == "cuda" else [*_on_cpu(spec, place, speeds, asked)]
    wanted = [one for one in found if asked.misses in (None, one.way.misses)]
    return tuple(sorted(wanted, key=lambda one: (-one.way.tok_s, one.way.host_bytes)))


def one_rank(asked: Asked) -> bool:
    """Whether what was asked for leaves it at a single rank, the only shape that is offloaded."""
    return all(asked_for in (None, 1) for asked_for in (asked.ranks, asked.ep, asked.dp))


def hot_experts(routing: Routing | None, slots: int) -> tuple[tuple[int, ...], ...]:
    """For each layer the experts to keep on the device, the most used first; () where their use is not known."""
    if routing is None or not slots:
        return ()
    ordered = (sorted(range(len(counts)), key=lambda expert: -counts[expert]) for counts in routing.counts)
    return tuple(tuple(order[:slots]) for order in ordered)


def ahead(spec: Spec, misses: Misses, slots: int, asked: Asked) -> int:
    """As Offload.ahead: of what was asked for, so many as a layer has slots for beside a token's own."""
    if misses != "copied":
        return 0
    return max(0, min(asked.look_ahead, slots - spec.experts_per_token))


def known(speeds: Speeds) -> Speeds:
    """With what is assumed in place of what is not known."""
    given = {name: value for name, value in dataclasses.asdict(speeds).items() if value is not None}
    return dataclasses.replace(ASSUMED, **given)


def _besides_bytes(spec: Spec, place: Place, misses: Misses) -> int:
    """On the device beside the slots, and what the workspace takes besides. Where kernels read all that a step needs at
    one go, one layer's experts are there together while a prompt runs (`offload.experts`)."""
    staged = STAGED_EXPERTS + (spec.experts if misses == "copied" and place.kernels != "plain" else 0)
    return staged * expert_bytes(spec, place.dtype) + GAPS_BYTES


def all_here(spec: Spec, place: Place, room: Room) -> RankMemory:
    """A rank that keeps all experts on its device, and yet runs prompts as one that does not: without graphs."""
    return memories(spec, place, Mesh(), room, prompt_graphs=False)[0]


def without_slots_bytes(spec: Spec, place: Place, misses: Misses, row: RankMemory) -> int:
    """On the device of a rank that keeps no experts there. row: `all_here`."""
    experts = spec.layers * spec.experts * expert_bytes(spec, place.dtype)
    graphs_bytes = row.graphs_bytes - _graphs_bytes(place, misses, row)
    return row.device_bytes - graphs_bytes - experts + _besides_bytes(spec, place, misses)


def _graphs_bytes(place: Place, misses: Misses, row: RankMemory) -> int:
    """Of CUDA graphs, where the host is not asked in the middle of a step (`offload.fetched`); kept free where that is
    known only later."""
    return row.graphs_bytes if misses == "copied" and place.kernels == "triton" else 0


@cache
def expert_bytes(spec: Spec, dtype: DType) -> int:
    """Of one expert of one layer, with its biases."""
    rows = [row for row in table(spec) if any(cut.axis == "ep" for cut in row.cuts)]
    return sum(prod(row.shape) * stored_element_bytes(row, dtype) for row in rows) // (spec.layers * spec.experts)


def room_for(spec: Spec, asked: Asked, context_tokens: int | None = None) -> Room:
    context = context_tokens or asked.context_tokens or min(CONTEXT_TOKENS, spec.max_context_tokens)
    kv_tokens = -(-context // PAGE_TOKENS) * PAGE_TOKENS
    return Room(context, asked.sequences or SEQUENCES, kv_tokens, PAGE_TOKENS, min(STEP_TOKENS, context))


def _on_gpu(spec: Spec, place: Place, speeds: Speeds, asked: Asked) -> Iterator[Found]:
    assert place.host_free_bytes is not None
    gpu, one = place.gpus[0], expert_bytes(spec, place.dtype)
    host_free = place.host_free_bytes - PROCESS["cuda"].host_bytes
    needed = float(spec.layers * spec.experts_per_token * one)
    gpu_speed = bandwidth(gpu.name)
    for misses in ("copied", "computed"):
        least = 1 if misses == "copied" else 0  # without a slot nothing can be copied
        least = spec.experts_per_token if asked.longest_context else least  # the longest leaves room for a token's
        for room in _rooms(spec, asked):
            row = all_here(spec, place, room)
            base = without_slots_bytes(spec, place, misses, row)
            slots = min(spec.experts, (gpu.free_bytes - base) // (spec.layers * one))
            if slots >= least:
                break
        else:
            continue
        share = hit_share(spec, asked, slots)
        dense = _token_bytes(spec, place, room.context_tokens) - needed
        waiting = spec.layers * one * (spec.experts if misses == "copied" else spec.experts - slots)
        kept = "memory" if waiting <= host_free else "file"
        if host_free < 0:
            continue
        missed = needed * (1 - share)
        device_read = dense + (needed if misses == "copied" else needed - missed)
        disk = 0.0 if kept == "memory" else missed * max(0.0, 1 - host_free / waiting)
        moved = {"link_bytes": missed if misses == "copied" else 0.0}
        moved |= {"cpu_read_bytes": missed if misses == "computed" else 0.0}
        # a GPU that is not in the table is taken to be so fast that it does not count
        fetched = misses == "copied" and place.kernels == "triton" and kept == "memory"
        fetched &= not ahead(spec, misses, slots, asked)
        layer_s = FETCH_S if fetched else WAIT_S + (CPU_LAYER_S if misses == "computed" else 0.0)
        pace = PACE[place.kernels]
        took_s = pace.besides_s(spec.layers, 1) + spec.layers * layer_s
        took_s += pace.read_s(gpu_speed, dense, device_read - dense) if gpu_speed else 0.0
        assert speeds.link and speeds.host and speeds.disk
        took_s += moved["link_bytes"] / speeds.link + moved["cpu_read_bytes"] / (speeds.host * CPU_SHARE)
        took_s += disk / speeds.disk
        way = Way(
            device="cuda",
            slots=slots,
            kept=kept,
            misses=misses,
            host_bytes=waiting if kept == "memory" else 0,
            device_read_bytes=device_read,
            disk_bytes=disk,
            tok_s=round(1 / took_s, 2),
            **moved,
        )
        experts_here = spec.layers * slots * one
        memory = dataclasses.replace(
            row,
            weights_bytes=row.weights_bytes - spec.layers * spec.experts * one + experts_here,
            workspace_bytes=row.workspace_bytes + _besides_bytes(spec, place, misses),
            graphs_bytes=_graphs_bytes(place, misses, row),
            host_bytes=row.host_bytes + way.host_bytes,
        )
        yield Found(way, room, memory)


def _on_cpu(spec: Spec, place: Place, speeds: Speeds, asked: Asked) -> Iterator[Found]:
    """Experts in the mapped file: how much of it stays in memory is the system's affair."""
    assert place.host_free_bytes is not None and speeds.host and speeds.disk
    one = expert_bytes(spec, place.dtype)
    packed = spec.layers * spec.experts * _mapped_bytes(spec)
    for room in _rooms(spec, asked):
        row = in_file(spec, place, room)
        spare = place.host_free_bytes - row.device_bytes - row.host_bytes
        if spare >= 0:
            break
    else:
        return
    needed = float(spec.layers * spec.experts_per_token * one)
    read = _token_bytes(spec, place, room.context_tokens)
    disk = needed * max(0.0, 1 - spare / packed)
    took_s = read / (speeds.host * CPU_SHARE) + disk / speeds.disk
    yield Found(
        Way(
            device="cpu",
            slots=0,
            kept="file",
            misses="computed",
            host_bytes=0,
            device_read_bytes=0.0,
            link_bytes=0.0,
            cpu_read_bytes=read,
            disk_bytes=disk,
            tok_s=round(1 / took_s, 2),
        ),
        room,
        row,
    )


def in_file(spec: Spec, place: Place, room: Room) -> RankMemory:
    """A rank on the CPU whose experts stay in the mapped file."""
    row = memories(spec, place, Mesh(), room)[0]
    packed = spec.layers * spec.experts * _mapped_bytes(spec)
    return dataclasses.replace(row, weights_bytes=row.weights_bytes - packed)


def in_memory(spec: Spec, place: Place, speeds: Speeds, context_tokens: int) -> Way:
    """The way of a plan that holds all on the CPU, to compare others with."""
    speeds = known(speeds)
    assert speeds.host
    read = _token_bytes(spec, place, context_tokens)
    packed = spec.layers * spec.experts * expert_bytes(spec, place.dtype)
    tok_s = round(speeds.host * CPU_SHARE / read, 2)
    return Way("cpu", 0, "memory", "computed", packed, 0.0, 0.0, read, 0.0, tok_s)


def _token_bytes(spec: Spec, place: Place, context_tokens: int) -> float:
    """What one rank reads for a token of a single stream."""
    read = read_bytes(spec, Mesh(), place.dtype, 1, context_tokens, place.kept)
    return read + (unpacked_bytes(spec, place.dtype) if place.unpacks else 0)


def _mapped_bytes(spec: Spec) -> int:
    """Of one expert of one layer in the file: blocks and scales, as biases are few and are converted."""
    rows = [row for row in table(spec) if row.dtype == "U8"]
    return sum(row.nbytes for row in rows) // (spec.layers * spec.experts)


def _rooms(spec: Spec, asked: Asked) -> Iterator[Room]:
    """The one that is wanted, and shorter contexts where none was asked for; all, where the longest was."""
    first = spec.max_context_tokens if asked.longest_context else room_for(spec, asked).context_tokens
    yield room_for(spec, asked, first)
    if asked.context_tokens is None:
        yield from (room_for(spec, asked, other) for other in context_choices(first)[1:])


def hit_share(spec: Spec, asked: Asked, slots: int) -> float:
    """Of the experts that tokens choose, those that the device has: by the recorded routing, else as if all were alike
    and chosen at random."""
    if asked.routing is None:
        return slots / spec.experts
    hit = sum(sum(sorted(counts, reverse=True)[:slots]) for counts in asked.routing.counts)
    total = sum(map(sum, asked.routing.counts))
    return hit / total if total else slots / spec.experts

"""Chooses where the ranks run and in which layout. Knows nothing of how that is put into words (`reasons`).

The order of decisions: the device and its precision, the longest context that some layout reaches, among those layouts
the one that the workload is best served by (`estimate`), then as many replicas as there is room for.
"""

import dataclasses
from dataclasses import dataclass

from ..errors import UserError
from .estimate import BATCH_TOKENS, Step, bandwidth, decode_step, expert_load
from .layouts import Layout, Place, check_cuts, context_choices, longest, meshes, most_replicas
from .machine import Gpu, Machine, format_size
from .memory import Device
from .placement import Routing
from .plan import REST_KL, DType, Kernels, KvDType, Misses, Rest, Workload
from .shards import Mesh, part
from .spec import Spec

# The compute dtype from this compute capability on. bf16 units came with Ampere (sm_80); Turing (sm_75) has fp16 ones.
# Nothing is listed below: PyTorch's wheels for this version are built with CUDA 13, whose compiler starts at sm_75.
PRECISION: tuple[tuple[tuple[int, int], DType], ...] = (((8, 0), "bf16"), ((7, 5), "fp16"))

# The estimate is no better than this (test_steps_as_measured): what is within it of the fastest step counts as equally
# fast.
TIE = 1.08
# Whole experts make wider products than slices of all experts, so they may weigh this much more on the busiest rank.
WHOLE_EXPERTS = 1.1


@dataclass(frozen=True)
class Asked:
    """What the user fixed; None leaves the choice to the planner.

    gpu_memory_bytes: what each GPU has free, in place of what was found; 0 leaves the GPUs out. dp: replicas.
    ranks: of one replica. ep: how many ways experts are placed; divides ranks. routing: to place experts by.
    kv_dtype: of the KV cache, the compute dtype unless given. sequences: that run at the same time in a replica.
    kernels: must be for the device and the dtype. longest_context: also where it takes memory from experts.
    misses: what is done about experts that the device has not; computed is all that the CPU as device can. rest,
    rest_kl: as in a Plan. look_ahead: as Offload.ahead.
    """

    dtype: DType | None = None
    gpu_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    context_tokens: int | None = None
    dp: int | None = None
    ranks: int | None = None
    ep: int | None = None
    workload: Workload = "latency"
    routing: Routing | None = None
    kv_dtype: KvDType | None = None
    sequences: int | None = None
    kernels: Kernels | None = None
    longest_context: bool = False
    misses: Misses | None = None
    rest: Rest = "bf16"
    rest_kl: float = REST_KL
    look_ahead: int = 0


FREE = Asked()  # all left to the planner


@dataclass(frozen=True)
class Choice:
    """A layout that was chosen, and among what. steps: estimates by ranks of a replica; empty where the device's
    bandwidth is not known."""

    layout: Layout
    dp: int
    nodes: int
    steps: dict[int, Step]
    candidates: tuple[Layout, ...]


# --- the machine


def with_overrides(machine: Machine, asked: Asked) -> Machine:
    gpus = machine.gpus
    if asked.gpu_memory_bytes == 0:
        gpus = ()
    elif asked.gpu_memory_bytes is not None:
        if not gpus:
            raise UserError(
                f"--gpu-memory {format_size(asked.gpu_memory_bytes)}, but {machine.name} has no GPU",
                "--machine NAME plans for a machine that has one",
            )
        gpus = tuple(dataclasses.replace(gpu, free_bytes=asked.gpu_memory_bytes) for gpu in gpus)
    host = machine.host_memory_bytes if asked.host_memory_bytes is None else asked.host_memory_bytes
    return dataclasses.replace(machine, gpus=gpus, host_memory_bytes=host)


def why_no_gpu(machine: Machine, asked: Asked) -> str:
    """Why no GPU of `machine` is used, in words; empty where one is."""
    if not machine.gpus:
        return "no GPU"
    if asked.gpu_memory_bytes == 0:
        return "the GPUs are left out, as asked"
    gpu = machine.gpus[0]
    return "" if dtype_of(gpu) else f"{gpu.name} is {sm(gpu)}, and PyTorch's CUDA 13 wheels start at sm_75"


def sm(gpu: Gpu) -> str:
    return f"sm_{gpu.capability[0]}{gpu.capability[1]}"


def dtype_of(gpu: Gpu) -> DType | None:
    return next((dtype for capability, dtype in PRECISION if gpu.capability >= capability), None)


def find_place(machine: Machine, asked: Asked) -> Place:
    """The GPUs that are like the first one, from it on, or the CPU where that one cannot be used.

    Ranks of one replica run the same kernels, so that each of them routes alike: GPUs of several kinds are not mixed.
    """
    found = dtype_of(machine.gpus[0]) if machine.gpus else None
    if found is None:
        if asked.rest == "fp8":
            message = "--rest fp8 is for GPUs: a CPU has no fast way to read it"
            raise UserError(message, "--rest int8 takes as many bytes, and is finer")
        return on_cpu(machine, asked)
    kinds = [(gpu.name, gpu.capability) for gpu in machine.gpus]
    alike = next((index for index, kind in enumerate(kinds) if kind != kinds[0]), len(kinds))
    return Place(
        device="cuda",
        gpus=machine.gpus[:alike],
        nodes=machine.nodes,
        link=machine.link,
        host_free_bytes=machine.host_memory_bytes,
        dtype=asked.dtype or found,
        kv_dtype=asked.kv_dtype or asked.dtype or found,
        asked_kernels=_kernels(asked, "cuda", asked.dtype or found),
        rest=asked.rest,
    )


def on_cpu(machine: Machine, asked: Asked) -> Place:
    if machine.host_memory_bytes is None:
        raise UserError(f"how much memory {machine.name} has free is not known", "say so: --host-memory 16GiB")
    dtype = asked.dtype or "fp32"
    kernels = _kernels(asked, "cpu", dtype)
    kv_dtype, memory_bytes = asked.kv_dtype or dtype, machine.host_memory_bytes
    return Place("cpu", (), machine.nodes, "none", memory_bytes, dtype, kv_dtype, kernels, asked.rest)


def _kernels(asked: Asked, device: Device, dtype: DType) -> Kernels | None:
    """What was asked for. Raises UserError where there is no such thing for the device and the dtype."""
    can = {"plain", "triton"} if (device, dtype) == ("cuda", "bf16") else {"plain"}
    if device == "cpu" and dtype != "fp64":
        can |= {"cpu", "cpu-int8"}
    if asked.kernels is not None and asked.kernels not in can:
        raise UserError(
            f"--kernels {asked.kernels} cannot be had with {dtype} on the {'GPU' if device == 'cuda' else 'CPU'}",
            f"there {'are' if len(can) > 1 else 'is'} {', '.join(sorted(can))}",
        )
    return asked.kernels


# --- the layout


def check_layout(spec: Spec, machine: Machine, place: Place, asked: Asked) -> None:
    """Raises UserError for a layout that this machine cannot have, however large its memory."""
    name, ranks = ("--ranks", asked.ranks) if asked.ranks is not None else ("--ep", asked.ep or 1)
    assert ranks is not None
    most = spec.kv_heads
    if ranks > most:
        raise UserError(
            f"{name} {ranks}: attention is cut in whole KV groups, and the model has {most}",
            f"{name} {most} is the most; --dp takes further GPUs for further replicas",
        )
    if asked.ranks is not None:
        Mesh(asked.ranks, asked.ep or 1)
    here = len(place.gpus)
    if place.device == "cuda":
        each = "" if place.nodes == 1 else f" on each of {place.nodes} nodes"
        if ranks > here * place.nodes:
            raise UserError(
                f"{name} {ranks}: {machine.name} has {_gpus(place)}{each}", f"{name} {here * place.nodes} is the most"
            )
        if ranks > here and not may_span(place, asked):
            raise UserError(
                f"--dp {asked.dp} with {name} {ranks}: a node of {machine.name} has {_gpus(place)}, and one replica "
                "alone may lie on several nodes",
                f"--dp 1, or {name} {here} at most",
            )
        if ranks <= here and asked.dp is not None and asked.dp > here // ranks * place.nodes:
            raise UserError(
                f"--dp {asked.dp} with {ranks} rank{'s' * (ranks > 1)} each takes {asked.dp * ranks} GPUs, and "
                f"{machine.name} has {_gpus(place)}{each}",
                f"--dp {here // ranks * place.nodes} is the most" + (f" with {name} {ranks}" if ranks > 1 else ""),
            )
    if not meshes(spec, _rank_choices(spec, place, asked), asked.ep):
        check_cuts(spec, Mesh(ranks, asked.ep or 1))


def _gpus(place: Place) -> str:
    count = len(place.gpus)
    return f"{count} {place.gpus[0].name}"


def _rank_choices(spec: Spec, place: Place, asked: Asked) -> tuple[int, ...]:
    """Sizes of a replica to look at: on the CPU the smallest, as more ranks share the same memory and cores."""
    if asked.ranks is not None:
        return (asked.ranks,)
    if place.device == "cpu":
        return (asked.ep or 1,)
    most = len(place.gpus) // asked_per_node(place, asked)
    return tuple(range(1, min(most, spec.kv_heads) + 1))


def asked_per_node(place: Place, asked: Asked) -> int:
    """Replicas that the fullest node has to hold: those asked for, or one."""
    dp = asked.dp or 1
    first = part(dp, 1, 0, min(place.nodes, dp))
    return first.stop - first.start


def may_span(place: Place, asked: Asked) -> bool:
    """Whether a replica may lie on several nodes: only where there is no other."""
    return place.nodes > 1 and asked.dp in (None, 1)


def span_of(place: Place, asked: Asked, ranks: int) -> int:
    """Nodes that a replica of so many ranks lies on: as few as have the GPUs. On CPUs, where any number of ranks may
    share a node, all of them if one replica alone is asked for and has a rank for each."""
    if place.device == "cuda":
        return -(-ranks // len(place.gpus))
    return place.nodes if asked.dp == 1 and ranks >= place.nodes else 1


def candidates(spec: Spec, place: Place, asked: Asked, context_tokens: int) -> tuple[Layout, ...]:
    """Layouts to look at first: those inside a node, unless more ranks are asked for."""
    return _layouts(spec, place, asked, _rank_choices(spec, place, asked), context_tokens)


def spanning(spec: Spec, place: Place, asked: Asked, context_tokens: int) -> tuple[Layout, ...]:
    """Layouts to look at if none of those fits: of more ranks than a node has GPUs."""
    if place.device == "cpu" or asked.ranks is not None or not may_span(place, asked):
        return ()
    most = min(len(place.gpus) * place.nodes, spec.kv_heads)
    return _layouts(spec, place, asked, tuple(range(len(place.gpus) + 1, most + 1)), context_tokens)


def _layouts(spec: Spec, place: Place, asked: Asked, ranks: tuple[int, ...], context_tokens: int) -> tuple[Layout, ...]:
    per_node = asked_per_node(place, asked)
    return tuple(
        Layout(mesh, per_node, context_tokens, span_of(place, asked, mesh.ranks))
        for mesh in meshes(spec, ranks, asked.ep)
    )


def choose(spec: Spec, place: Place, asked: Asked) -> Choice | None:
    """The layout, one inside a node before any other; None if none fits."""
    for looked_at in (candidates, spanning):
        choice = choose_among(spec, place, asked, looked_at(spec, place, asked, spec.max_context_tokens))
        if choice is not None:
            return choice
    return None


def choose_among(spec: Spec, place: Place, asked: Asked, layouts: tuple[Layout, ...]) -> Choice | None:
    """The best of `layouts`, in the longest context that fits; None if none does."""
    contexts = context_choices(spec.max_context_tokens) if asked.context_tokens is None else (asked.context_tokens,)
    fitting: list[Layout] = []
    for one in layouts:
        layout = longest(spec, place, one, contexts)
        if layout is not None:
            contexts = tuple(context for context in contexts if context >= layout.context_tokens)
            fitting.append(layout)
    if not fitting:
        return None
    context = max(layout.context_tokens for layout in fitting)
    fitting = [layout for layout in fitting if layout.context_tokens == context]
    if asked.dp is None and place.device == "cuda" and fitting[0].span == 1:
        fitting = [most_replicas(spec, place, layout) for layout in fitting]
    batch = BATCH_TOKENS[asked.workload]
    by_ranks = {ranks: _best_ep(spec, fitting, ranks, batch) for ranks in {layout.mesh.ranks for layout in fitting}}
    ordered = [by_ranks[ranks] for ranks in sorted(by_ranks)]
    speed = bandwidth(place.gpus[0].name) if place.gpus else None
    steps: dict[int, Step] = {}
    if speed is not None:
        for layout in ordered:
            link = place.link if layout.span == 1 else "network"
            step = decode_step(spec, layout.mesh, place.dtype, speed, link, batch, context, place.kept, place.kernels)
            steps[layout.mesh.ranks] = step
    layout = _best(ordered, steps, asked.workload)
    if layout.span > 1:
        return Choice(layout, 1, layout.span, steps, tuple(ordered))
    nodes = place.nodes if asked.dp is None else min(place.nodes, asked.dp)
    return Choice(layout, asked.dp or layout.per_node * nodes, nodes, steps, tuple(ordered))


def _best_ep(spec: Spec, fitting: list[Layout], ranks: int, batch_tokens: int) -> Layout:
    """Among layouts of so many ranks: the largest ep whose busiest rank reads about as little of experts as any."""
    loads = {layout: expert_load(spec, layout.mesh, batch_tokens) for layout in fitting if layout.mesh.ranks == ranks}
    least = min(loads.values())
    return max((layout for layout in loads if loads[layout] <= least * WHOLE_EXPERTS), key=lambda one: one.mesh.ep)


def _best(layouts: list[Layout], steps: dict[int, Step], workload: Workload) -> Layout:
    """latency: the shortest step, but more replicas where that costs next to nothing. throughput: the most tokens/s of
    a node. Where speed is not known: the fewest ranks."""
    if not steps:
        return layouts[0]
    if workload == "throughput":
        return max(layouts, key=lambda one: one.per_node / steps[one.mesh.ranks].seconds)
    fastest = min(step.seconds for step in steps.values())
    near = [layout for layout in layouts if steps[layout.mesh.ranks].seconds <= fastest * TIE]
    return max(near, key=lambda one: (one.per_node, -steps[one.mesh.ranks].seconds))

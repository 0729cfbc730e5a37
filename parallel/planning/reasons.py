"""The planner's words: a `why` line for each decision, and what is said when nothing fits. Decides nothing."""

import bisect
import dataclasses
from collections.abc import Sequence

from ..errors import NoPlanError
from .choice import TIE, WHOLE_EXPERTS, Asked, Choice, candidates, dtype_of, on_cpu, sm, spanning, why_no_gpu
from .estimate import BATCH_TOKENS, Step, expert_load
from .layouts import (
    MOST_SEQUENCES,
    PAGE_TOKENS,
    SMALLEST_CONTEXT_TOKENS,
    Layout,
    Place,
    context_choices,
    longest,
    memories,
    meshes,
    one_context,
    shortfall,
)
from .machine import Machine, format_size
from .memory import Room, weights_bytes
from .offload import (
    all_here,
    expert_bytes,
    hit_share,
    in_file,
    in_memory,
    known,
    one_rank,
    room_for,
    without_slots_bytes,
)
from .pages import pool_pages
from .placement import Order, imbalance
from .plan import DType, Kernels, Offload, RankMemory, Way, kept
from .shards import Mesh
from .spec import Spec

DTYPE_WHY: dict[DType, str] = {
    "bf16": "{} multiplies bf16 at full speed, and the checkpoint's own tensors are bf16",
    "fp16": "{} has no bf16 units; hidden states between layers are kept in fp32, as they may outgrow fp16",
    "fp32": "on a CPU the exact one is the default",
}
KERNELS_WHY: dict[Kernels, str] = {
    "triton": "Triton's",
    "plain": "plain torch, which is slow: Triton's are for bf16",
    "cpu": "experts, and products with bf16 weights in fp32, by our C++, compiled at first use; else plain torch",
    "cpu-int8": "as cpu, but with activations rounded to 8 bits before each product of experts",
}
BANDWIDTH_NAMES = {"host": "host memory", "link": "link to the GPU", "disk": "disk"}
MOST_CPU_TOK_S = 100  # the estimate counts bytes alone; a model that is read faster waits for Python
PARTS = ("weights", "kv", "workspace", "graphs", "communication", "context")
PART_NAMES = {"kv": "KV cache", "context": "CUDA context"}


# --- why


def why(
    spec: Spec,
    machine: Machine,
    place: Place,
    asked: Asked,
    choice: Choice,
    room: Room,
    replica: Sequence[RankMemory],
    orders: tuple[Order, ...],
) -> list[str]:
    """A line for each decision. machine: as it was found, before --gpu-memory and --host-memory."""
    mesh, context = choice.layout.mesh, choice.layout.context_tokens
    lines = [_device(machine, place, asked), _memory(place, choice, replica)]
    lines += [_ranks(place, asked, choice), _dp(place, asked, choice)]
    lines += [_span(spec, place, asked, choice)] if choice.layout.span > 1 else []
    lines += [_ep(spec, asked, choice)]
    lines += _one_stream(spec, machine, place, choice.layout)
    if asked.routing is not None:
        lines.append(_placement(asked, mesh, orders))
    unused = [f"--misses {asked.misses}"] * (asked.misses is not None) + ["--look-ahead"] * bool(asked.look_ahead)
    lines += [f"{flag}: asked for, and of no use, as no expert is left elsewhere" for flag in unused]
    dtype_why = "asked for" if asked.dtype else DTYPE_WHY[place.dtype].format(sm(place.gpus[0]) if place.gpus else "")
    lines += [f"dtype {place.dtype}: {dtype_why}; experts stay packed MXFP4", *_rest(spec, mesh, place, asked)]
    if asked.context_tokens is not None:
        lines.append(f"context {context} tokens: asked for, of the model's {spec.max_context_tokens}")
    elif context == spec.max_context_tokens:
        lines.append(f"context {context} tokens: all that the model was made for, and it fits")
    else:
        lines.append(
            f"context {context} tokens: the longest of the planner's steps that fits, of the model's "
            f"{spec.max_context_tokens}{_room_of_bf16_cache(spec, place, asked, choice.layout)}"
        )
    lines.append(f"kernels {place.kernels}: {'asked for; ' if asked.kernels else ''}{KERNELS_WHY[place.kernels]}")
    lines.append(_sequences(place, asked, room))
    pages = pool_pages(spec, room.kv_tokens, room.sequences, room.step_tokens, PAGE_TOKENS)
    whole = room.kv_tokens // context
    held = "1 whole context" if whole == 1 else f"{whole} whole contexts"
    lines.append(
        f"KV cache {room.kv_tokens} tokens, {held}: {pages} pages of {PAGE_TOKENS} tokens; "
        f"{spec.layers_of('window')} of {spec.layers} layers keep only {spec.window_tokens} tokens and the step"
    )
    lines.append(f"prompts go in steps of at most {room.step_tokens} tokens, which bounds the workspace")
    return lines


def _room_of_bf16_cache(spec: Spec, place: Place, asked: Asked, layout: Layout) -> str:
    """On a CPU the cache is in fp32 unless asked otherwise, and bf16 takes half."""
    if place.device == "cuda" or place.kv_dtype != "fp32" or asked.kv_dtype is not None:
        return ""
    narrow = dataclasses.replace(place, kv_dtype="bf16")
    there = longest(spec, narrow, layout, context_choices(spec.max_context_tokens))
    if there is None or there.context_tokens <= layout.context_tokens:
        return ""
    return f"; --kv-dtype bf16 has room for {there.context_tokens}"


def _rest(spec: Spec, mesh: Mesh, place: Place, asked: Asked) -> list[str]:
    """Nothing, where all is kept in the compute dtype."""
    if place.kept == "bf16":
        return ["attention, embedding and head stay bf16 as in the checkpoint, and are read as they are"]
    if place.kept is None:
        return []
    otherwise = kept("bf16", place.dtype, place.kernels)
    saved = weights_bytes(spec, mesh, 0, place.dtype, otherwise)
    saved -= weights_bytes(spec, mesh, 0, place.dtype, place.kept)
    how = "dequantized for each product, which saves memory and no time" if place.unpacks else "read as it is"
    return [
        f"rest {place.rest}: asked for; attention, embedding and head in 8 bits with a scale a row take "
        f"{format_size(saved)} less a rank, {how}; compared with {place.dtype} at the start, and refused where the "
        f"mean KL divergence is over {asked.rest_kl:g} nats"
    ]


def _one_stream(spec: Spec, machine: Machine, place: Place, layout: Layout) -> list[str]:
    """Of a rank alone on a CPU; nothing for others."""
    if place.kernels not in ("cpu", "cpu-int8") or layout.mesh.ranks > 1:
        return []
    way = in_memory(spec, place, machine.speeds, layout.context_tokens)
    return [f"one stream: {_way(way)}", _bandwidths(machine, ("host",))] if way.tok_s < MOST_CPU_TOK_S else []


def _sequences(place: Place, asked: Asked, room: Room) -> str:
    if asked.sequences is not None:
        reason = "asked for"
    elif room.sequences == MOST_SEQUENCES[place.device]:
        reason = f"the most that are planned for on {'a GPU' if place.device == 'cuda' else 'a CPU'}, and they fit"
    else:
        reason = "the largest power of two that fits beside one whole context"
    return f"sequences {room.sequences} at a time: {reason}; others wait"


def _device(machine: Machine, place: Place, asked: Asked) -> str:
    if place.device == "cpu":
        assert place.host_free_bytes is not None
        reason = why_no_gpu(machine, asked)
        return f"device cpu: {reason}; {format_size(place.host_free_bytes)} of host memory can be had"
    gpu = place.gpus[0]
    least = min(one.free_bytes for one in place.gpus)
    if len(place.gpus) == 1:
        line = f"device cuda: {gpu.name} ({sm(gpu)}) has {format_size(least)} free"
    else:
        line = f"device cuda: {len(place.gpus)} {gpu.name} ({sm(gpu)}) a node, {place.link}, with at least "
        line += f"{format_size(least)} free each"
    others = len(machine.gpus) - len(place.gpus)
    return line + (f"; {others} of other kinds are left out: ranks run the same kernels" if others else "")


def _memory(place: Place, choice: Choice, replica: Sequence[RankMemory]) -> str:
    fullest = max(replica, key=lambda row: row.device_bytes)
    if place.device == "cuda":
        free = min(gpu.free_bytes for gpu in choice.layout.gpus(place))
        return f"{_rank(choice.layout.mesh, fullest)}: {_parts(fullest)} are {_of(fullest.device_bytes, free)}"
    assert place.host_free_bytes is not None
    total = choice.layout.per_node * sum(row.device_bytes + row.host_bytes for row in choice.layout.here(replica))
    return (
        f"{_rank(choice.layout.mesh, fullest)}: {_parts(fullest)}; with {format_size(fullest.host_bytes)} a process "
        f"all ranks{' of a node' * (choice.layout.span > 1)} take {_of(total, place.host_free_bytes)}"
    )


def _rank(mesh: Mesh, row: RankMemory) -> str:
    return "1 rank" if mesh.ranks == 1 else f"rank {row.rank}, the fullest"


def _parts(row: RankMemory) -> str:
    sizes = {name: getattr(row, f"{name}_bytes") for name in PARTS}
    return ", ".join(f"{PART_NAMES.get(name, name)} {format_size(size)}" for name, size in sizes.items() if size)


def _of(used_bytes: int, free_bytes: int) -> str:
    return f"{format_size(used_bytes)} of {format_size(free_bytes)}"


def _ranks(place: Place, asked: Asked, choice: Choice) -> str:
    ranks = choice.layout.mesh.ranks
    head = f"ranks {ranks}: "
    others = [layout.mesh.ranks for layout in choice.candidates if layout.mesh.ranks != ranks]
    step = choice.steps.get(ranks)
    if asked.ranks is not None:
        return head + "asked for" + (f"; {_step(step)}" if step else "")
    if place.device == "cpu" and ranks > 1:
        return head + f"the fewest that ep {asked.ep} divides"
    if place.device == "cpu":
        return head + "more ranks would share the same memory and cores; --ranks N starts them all the same"
    if not others:
        fixed = "".join(f", with --{name} {value}" for name, value in (("dp", asked.dp), ("ep", asked.ep)) if value)
        alone = len(place.gpus) == 1 and choice.layout.span == 1
        reason = "there is 1 GPU a node" if alone else "no other number of ranks holds this context"
        return head + reason + fixed + (f"; {_step(step)}" if step else "")
    if step is None:
        return head + f"the fewest that fit, as the memory bandwidth of {place.gpus[0].name} is not in the table"
    if asked.workload == "throughput":
        rates = {
            layout.mesh.ranks: layout.per_node * step.batch_tokens / choice.steps[layout.mesh.ranks].seconds
            for layout in choice.candidates
        }
        others_text = ", ".join(f"{rates[other]:.0f} with {other}" for other in others)
        return head + f"{_step(step)}; a node makes {rates[ranks]:.0f} tokens/s so, against {others_text}"
    others_text = ", ".join(f"{_ms(choice.steps[other].seconds)} with {other}" for other in others)
    slower = step.seconds > min(one.seconds for one in choice.steps.values())
    tie = f"; what is within {round((TIE - 1) * 100)} % counts as equal, and this makes the most replicas" * slower
    return head + f"{_step(step)}; against {others_text}{tie}"


def _step(step: Step) -> str:
    """The estimate as a sum."""
    terms = [f"{step.read_bytes / 1e9:.2f} GB read in {_ms(step.read_s)}", f"{_ms(step.besides_s)} besides"]
    if step.reduces:
        terms.append(f"{step.reduces} all-reduces of {step.reduce_s * 1e6:.1f} us")
    return f"estimated decode step of {step.batch_tokens}: {_ms(step.seconds)} ({', '.join(terms)})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _dp(place: Place, asked: Asked, choice: Choice) -> str:
    ranks, layout = choice.layout.mesh.ranks, choice.layout
    head = f"dp {choice.dp}: "
    if place.device == "cpu":
        each = f" of each of {place.nodes} nodes" if place.nodes > 1 else ""
        return head + ("asked for" if asked.dp else f"one replica has the whole CPU{each}")
    gpus, nodes = len(place.gpus), place.nodes
    where = _count(gpus, "GPU") + (f" on each of {nodes} nodes" if nodes > 1 else "")
    idle = gpus * nodes - choice.dp * ranks
    inside = "inside one node" if layout.span == 1 else f"over {layout.span} nodes"
    line = head + ("asked for, " if asked.dp else "") + f"{where}, {_count(ranks, 'rank')} a replica, {inside}"
    if idle:
        line += f"; {_count(idle, 'GPU')} stay{'s' * (idle == 1)} idle"
        if asked.dp is None and layout.span == 1 and layout.per_node < gpus // ranks:
            line += f", as a further replica does not fit in {layout.context_tokens} tokens of context"
    return line


def _span(spec: Spec, place: Place, asked: Asked, choice: Choice) -> str:
    """Why a replica lies on several nodes, and what that costs."""
    span, ranks = choice.layout.span, choice.layout.mesh.ranks
    if asked.ranks is None:
        reason = "no layout inside one fits, but with experts in host memory (--ranks 1)"
    else:
        reason = f"{ranks} ranks were asked for" + ("" if place.device == "cpu" else f", and one has {_gpus(place)}")
    line = (
        f"nodes {span}: one replica lies on all of them, as {reason}; each of its {2 * spec.layers} all-reduces a step "
    )
    line += "goes over the network"
    step = choice.steps.get(ranks)
    if step is None:
        return line
    each, all_s = f"{step.reduce_s * 1e6:.0f} us by RDMA and more by TCP", step.reduces * step.reduce_s
    return f"{line}, {each}: {_ms(all_s)} of {_ms(step.seconds)}"


def _gpus(place: Place) -> str:
    return _count(len(place.gpus), "GPU")


def _ep(spec: Spec, asked: Asked, choice: Choice) -> str:
    mesh, batch = choice.layout.mesh, BATCH_TOKENS[asked.workload]
    head = f"ep {mesh.ep}, etp {mesh.etp}: " + ("asked for; " if asked.ep else "")
    if mesh.ranks == 1:
        return head + f"one rank holds all {spec.experts} experts"
    loads = {one.ep: expert_load(spec, one, batch) for one in meshes(spec, (mesh.ranks,), None)}
    others = ", ".join(f"{load:.2f} with ep {ep}" for ep, load in loads.items() if ep != mesh.ep)
    rule = f"; whole experts within {round((WHOLE_EXPERTS - 1) * 100)} % of the least" if mesh.ep > 1 else ""
    return (
        f"{head}the busiest rank is expected to read {loads[mesh.ep]:.2f} experts a layer at {_count(batch, 'token')} "
        f"a step, against {others}" + ("" if asked.ep else rule)
    )


def _placement(asked: Asked, mesh: Mesh, orders: tuple[Order, ...]) -> str:
    assert asked.routing is not None
    head = f"routing recorded with {asked.routing.model}: "
    if mesh.ep == 1:
        return head + "not used, as with ep 1 every rank holds a part of each expert"
    published = [tuple(range(len(counts))) for counts in asked.routing.counts]
    before = imbalance(asked.routing, published, mesh.ep)
    after = imbalance(asked.routing, orders or published, mesh.ep)
    return head + (
        f"busiest rank over the mean {before.overall:.3f} in the published order, {after.overall:.3f} as placed; "
        f"in the worst layer {before.worst:.3f} and {after.worst:.3f}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


# --- why offloaded


def why_offloaded(
    spec: Spec,
    found: Machine,
    machine: Machine,
    place: Place,
    asked: Asked,
    offload: Offload,
    room: Room,
    row: RankMemory,
) -> list[str]:
    """As `why`, for a rank whose experts are not all on its device."""
    taken = offload.taken
    lines = [_device(found, place, asked)]
    if place.device == "cuda":
        host = "" if place.host_free_bytes is None else f" of {format_size(place.host_free_bytes)}"
        lines.append(
            f"1 rank: {_parts(row)} are {_of(row.device_bytes, place.gpus[0].free_bytes)}; host memory "
            f"{format_size(row.host_bytes)}{host}"
        )
        if idle := len(place.gpus) - 1:
            each = "" if place.nodes == 1 else " a node"
            lines.append(
                f"ranks 1: no number of ranks in a node holds all experts, and only one rank can leave some elsewhere; "
                f"{_count(idle, 'GPU')}{each} stay{'s' * (idle == 1)} idle"
            )
    else:
        total = row.device_bytes + row.host_bytes
        lines.append(f"1 rank: {_parts(row)}; with {format_size(row.host_bytes)} a process {format_size(total)}")
    experts = spec.layers * spec.experts * expert_bytes(spec, place.dtype)
    lines.append(
        f"offload: {format_size(experts)} of experts do not fit; {taken.name}: {_way(taken)}"
        + (f", the most of {len(offload.others) + 1} ways" if offload.others else ", the only way that fits")
    )
    if asked.look_ahead:
        lines.append(
            f"look-ahead: {offload.ahead} experts of the next layer, asked for; the estimate counts nothing saved by it"
        )
    lines += [f"instead: {way.name}: {_way(way)}" for way in offload.others]
    lines.append(_bandwidths(machine, ("host", "disk") if place.device == "cpu" else ("host", "link", "disk")))
    if taken.slots:
        share = hit_share(spec, asked, taken.slots)
        if asked.routing is None:
            known = "as if all experts were used alike; --routing FILE would tell"
        else:
            known = f"by the routing recorded with {asked.routing.model}"
        lines.append(f"experts: {share:.0%} of those that a token needs are on the GPU, {known}")
    dtype_why = "asked for" if asked.dtype else DTYPE_WHY[place.dtype].format(sm(place.gpus[0]) if place.gpus else "")
    lines += [f"dtype {place.dtype}: {dtype_why}; experts stay packed MXFP4", *_rest(spec, Mesh(), place, asked)]
    if asked.context_tokens is not None:
        context_why = "asked for"
    elif asked.longest_context:
        context_why = "the longest of the planner's steps that fits beside as many experts as a token needs"
    else:
        context_why = "a longer one would take memory from the experts; --context N, or auto for the longest"
    lines.append(f"context {room.context_tokens} tokens: {context_why}, of the model's {spec.max_context_tokens}")
    lines.append(f"kernels {place.kernels}: {'asked for; ' if asked.kernels else ''}{KERNELS_WHY[place.kernels]}")
    few = "asked for" if asked.sequences else "many would need all experts in every step"
    lines.append(f"sequences {room.sequences} at a time: {few}; others wait")
    lines.append(f"prompts go in steps of at most {room.step_tokens} tokens, which bounds the workspace")
    return lines


def with_rest(way: Way) -> str:
    """What --rest int8 would make of it, where it was not asked for."""
    return f"--rest int8, which is not chosen unasked: {way.name}: {_way(way)}"


def _way(way: Way) -> str:
    """What it costs, as a sum."""
    terms = {"read by the GPU": way.device_read_bytes, "over the link": way.link_bytes}
    terms |= {"read by the CPU": way.cpu_read_bytes, "from disk": way.disk_bytes}
    moved = ", ".join(f"{size / 1e9:.2f} GB {what}" for what, size in terms.items() if size)
    return f"estimated {way.tok_s:.1f} tokens/s ({moved} a token)"


def _bandwidths(machine: Machine, names: Sequence[str]) -> str:
    """names: fields of Speeds."""
    terms = []
    for name in names:
        given = getattr(machine.speeds, name)
        value = getattr(known(machine.speeds), name)
        terms.append(f"{BANDWIDTH_NAMES[name]} {value / 1e9:.1f} GB/s" + ("" if given else " (assumed, not known)"))
    return "bandwidths: " + ", ".join(terms)


# --- why not


def no_plan(spec: Spec, found: Machine, machine: Machine, place: Place, asked: Asked) -> NoPlanError:
    """What was tried, by how much the nearest of it falls short, and what would fit. found: before overrides."""
    context = asked.context_tokens or min(SMALLEST_CONTEXT_TOKENS, spec.max_context_tokens)
    nearest: dict[int, tuple[int, Layout]] = {}  # by ranks: bytes short, layout
    for layout in (*candidates(spec, place, asked, context), *spanning(spec, place, asked, context)):
        short, ranks = shortfall(spec, place, layout), layout.mesh.ranks
        if ranks not in nearest or short < nearest[ranks][0]:
            nearest[ranks] = short, layout
    tried = [_tried(spec, place, short, layout) for short, layout in nearest.values()]
    if place.device == "cuda":
        tried.append(f"experts in host memory: {_why_not_offloaded(spec, place, asked)}")
    else:
        tried.append(f"1 rank on a GPU: {why_no_gpu(found, asked)}")
    short, layout = min(nearest.values(), key=lambda one: one[0])
    changes = _changes(spec, machine, place, asked, layout)
    # experts in the file take less than any layout that holds them
    if place.device == "cpu" and (least := _file_row(spec, machine, place, asked)) is not None:
        assert place.host_free_bytes is not None
        total = least.device_bytes + least.host_bytes
        short = total - place.host_free_bytes
        parts = f"{_parts(least)}, process {format_size(least.host_bytes)}"
        needs = f"needs {_of(total, place.host_free_bytes)} ({parts})"
        tried.insert(0, f"1 rank on the CPU, experts in the file, {context} tokens: {_short(short)}; {needs}")
        in_file_fits = f"{_up(total)} of free host memory fit, with experts in the checkpoint's file"
        changes = [*_shorter_in_file(spec, machine, asked, context), in_file_fits, *changes]
    return NoPlanError(
        f"no plan for {context} tokens of context fits {machine.name}: {_short(short)}",
        tuple(tried),
        "; ".join(changes),
    )


def _file_row(spec: Spec, machine: Machine, place: Place, asked: Asked) -> RankMemory | None:
    """The least that a rank on the CPU takes; None where its experts are not left in the file."""
    context = asked.context_tokens or min(SMALLEST_CONTEXT_TOKENS, spec.max_context_tokens)
    if not one_rank(asked) or _whole_fits(spec, place, asked):
        return None
    return in_file(spec, on_cpu(machine, asked), room_for(spec, asked, context))


def _shorter_in_file(spec: Spec, machine: Machine, asked: Asked, context: int) -> list[str]:
    """The longest context that a plan with experts in the file has room for."""
    assert machine.host_memory_bytes is not None
    for tokens in context_choices(context):
        row = in_file(spec, on_cpu(machine, asked), room_for(spec, asked, tokens))
        if tokens < context and row.device_bytes + row.host_bytes <= machine.host_memory_bytes:
            return [f"--context {tokens} fits"]
    return []


def _whole_fits(spec: Spec, place: Place, asked: Asked) -> bool:
    """Whether a short context, or another layout, needs no offload."""
    free = dataclasses.replace(asked, ranks=None, ep=None, dp=None)
    shortest = min(SMALLEST_CONTEXT_TOKENS, spec.max_context_tokens)
    return any(not shortfall(spec, place, layout) for layout in candidates(spec, place, free, shortest))


def _why_not_offloaded(spec: Spec, place: Place, asked: Asked) -> str:
    if not one_rank(asked):
        return "only for one rank, and --ranks, --ep or --dp asks for more"
    if place.host_free_bytes is None:
        return "how much host memory is free is not known; --host-memory SIZE says so"
    room = room_for(spec, asked)
    if _whole_fits(spec, place, asked):
        return "only where nothing fits without, and a shorter context or another layout would"
    row = all_here(spec, place, room_for(spec, asked, min(room.context_tokens, SMALLEST_CONTEXT_TOKENS)))
    needed, what = without_slots_bytes(spec, place, asked.misses or "computed", row), "all but the experts takes"
    if asked.misses == "copied":
        needed += spec.layers * expert_bytes(spec, place.dtype)
        what = "all but the experts, and one of each layer, take"
    return f"{what} {_of(needed, place.gpus[0].free_bytes)}, and {format_size(row.host_bytes)} of host"


def _tried(spec: Spec, place: Place, short: int, layout: Layout) -> str:
    """The layout, and how the bytes of its fullest rank add up."""
    mesh, context = layout.mesh, layout.context_tokens
    rows = memories(spec, place, mesh, one_context(place.device, context))
    row = max(rows, key=lambda one: one.device_bytes)
    where = f"on {place.gpus[0].name}" if place.device == "cuda" else "on the CPU"
    where += f" over {layout.span} nodes" * (layout.span > 1)
    replicas = "" if layout.per_node == 1 else f"{layout.per_node} replicas of "
    cut = f" (ep {mesh.ep}, etp {mesh.etp})" if mesh.ranks > 1 else ""
    if place.device == "cuda":
        free = min(gpu.free_bytes for gpu in layout.gpus(place))
        needs = f"{_of(row.device_bytes, free)} ({_parts(row)})"
        host_bytes = layout.per_node * sum(one.host_bytes for one in layout.here(rows))
        if place.host_free_bytes is not None and host_bytes > place.host_free_bytes:
            needs += f" and {_of(host_bytes, place.host_free_bytes)} in host memory"
    else:
        assert place.host_free_bytes is not None
        total = layout.per_node * sum(one.device_bytes + one.host_bytes for one in layout.here(rows))
        needs = f"{_of(total, place.host_free_bytes)} ({_parts(row)}, process {format_size(row.host_bytes)})"
    ranks = _count(mesh.ranks, "rank")
    return f"{replicas}{ranks} {where}{cut}, {place.dtype}, {context} tokens: {_short(short)}; needs {needs}"


def _short(size_bytes: int) -> str:
    return f"short by {size_bytes} bytes ({format_size(size_bytes)})"


def _changes(spec: Spec, machine: Machine, place: Place, asked: Asked, layout: Layout) -> list[str]:
    """What would fit, the smallest change first. layout: the one that falls short by the least."""
    changes = []
    mesh, context = layout.mesh, layout.context_tokens
    shorter = [tokens for tokens in context_choices(context) if tokens < context]
    fits = longest(spec, place, layout, shorter)
    if fits is not None:
        changes.append(f"--context {fits.context_tokens} fits")
    changes += _other_layouts(spec, place, asked, context)
    if place.dtype == "fp32" and fits is None:
        if not shortfall(spec, dataclasses.replace(place, dtype="bf16"), layout):
            changes.append("--dtype bf16 fits")
    rows = memories(spec, place, mesh, one_context(place.device, context))
    host_bytes = layout.per_node * sum(row.host_bytes for row in layout.here(rows))
    if place.device == "cpu":
        total = host_bytes + layout.per_node * sum(row.device_bytes for row in layout.here(rows))
        return [*changes, f"{_up(total)} of free host memory fit"]
    changes += _other_gpus(spec, machine, place, asked, context)
    need = _up(max(row.device_bytes for row in rows))
    count = layout.per_node * mesh.ranks
    lacks_host = place.host_free_bytes is not None and host_bytes > place.host_free_bytes
    free = min(gpu.free_bytes for gpu in layout.gpus(place))
    if max(row.device_bytes for row in rows) <= free:
        changes += [f"{_up(host_bytes)} of free host memory fit"] if lacks_host else []
    else:
        if lacks_host and _all_but_experts_fit(spec, place, asked):
            changes.append(f"{_up(host_bytes)} of free host memory fit, with experts in the checkpoint's file")
        changes.append(f"a GPU with {need} free fits" if count == 1 else f"{count} GPUs with {need} free each fit")
        changes += [f"{_up(host_bytes)} of host memory are needed besides"] if lacks_host else []
    if _cpu_fits(spec, machine, asked, context):
        changes.append("--gpu-memory 0 runs it on the CPU, slowly")
    return changes


def _all_but_experts_fit(spec: Spec, place: Place, asked: Asked) -> bool:
    """On the GPU, in a plan that leaves experts elsewhere."""
    if not one_rank(asked) or _whole_fits(spec, place, asked):
        return False
    context = asked.context_tokens or min(SMALLEST_CONTEXT_TOKENS, spec.max_context_tokens)
    row = all_here(spec, place, room_for(spec, asked, context))
    return without_slots_bytes(spec, place, asked.misses or "computed", row) <= place.gpus[0].free_bytes


def _cpu_fits(spec: Spec, machine: Machine, asked: Asked, context: int) -> bool:
    """Whether the same without the GPUs is a plan, with all in memory or with experts in the file."""
    if machine.host_memory_bytes is None or asked.rest == "fp8" or asked.dtype == "fp16" or asked.kernels is not None:
        return False
    if not shortfall(spec, on_cpu(machine, asked), Layout(Mesh(), 1, context)):
        return True
    row = in_file(spec, on_cpu(machine, asked), room_for(spec, asked, context))
    total = row.device_bytes + row.host_bytes
    return one_rank(asked) and asked.misses != "copied" and total <= machine.host_memory_bytes


def _other_layouts(spec: Spec, place: Place, asked: Asked, context: int) -> list[str]:
    """The nearest other --ranks or --dp that fits, where one of them was asked for."""
    changes = []
    if asked.ranks is not None and place.device == "cuda":
        free = dataclasses.replace(asked, ranks=None)
        layouts = (*candidates(spec, place, free, context), *spanning(spec, place, free, context))
        fitting = {layout.mesh.ranks for layout in layouts if not shortfall(spec, place, layout)}
        if fitting:
            wanted = asked.ranks
            changes.append(f"--ranks {min(fitting, key=lambda ranks: abs(ranks - wanted))} fits")
    if asked.dp is not None:
        fewer = bisect.bisect_left(
            range(1, asked.dp), True, key=lambda dp: not _some_fit(spec, place, asked, context, dp)
        )
        if fewer:
            changes.append(f"--dp {fewer} fits")
    return changes


def _some_fit(spec: Spec, place: Place, asked: Asked, context: int, dp: int) -> bool:
    """Whether so many replicas fit in some layout."""
    fewer = dataclasses.replace(asked, dp=dp)
    return any(not shortfall(spec, place, layout) for layout in candidates(spec, place, fewer, context))


def _other_gpus(spec: Spec, machine: Machine, place: Place, asked: Asked, context: int) -> list[str]:
    """For one replica: freer GPUs of this node in place of the first ones; or how many like these would do."""
    if (asked.dp or 1) > 1:
        return []
    sizes = range(1, spec.kv_heads + 1) if asked.ranks is None else (asked.ranks,)
    usable = [index for index, gpu in enumerate(machine.gpus) if dtype_of(gpu)]
    freest = sorted(usable, key=lambda index: -machine.gpus[index].free_bytes)
    for ranks in sizes:
        chosen = sorted(freest[:ranks])
        gpus = tuple(machine.gpus[index] for index in chosen)
        if chosen == list(range(ranks)) or len(gpus) < ranks or len({gpu.name for gpu in gpus}) > 1:
            continue
        if _fits(spec, dataclasses.replace(place, gpus=gpus), context, ranks):
            return [f"CUDA_VISIBLE_DEVICES={','.join(str(index) for index in chosen)} fits"]
    for ranks in sizes:
        more = dataclasses.replace(place, gpus=place.gpus[:1] * ranks)
        if ranks > len(place.gpus) and _fits(spec, more, context, ranks):
            return [f"{ranks} such GPUs in a node fit"]
    return []


def _fits(spec: Spec, place: Place, context: int, ranks: int) -> bool:
    """Whether one replica of so many ranks does, with some ep."""
    layouts = (Layout(mesh, 1, context) for mesh in meshes(spec, (ranks,), None))
    return any(not shortfall(spec, place, one) for one in layouts)


def _up(size_bytes: int) -> str:
    """In GiB, rounded up, so that what is asked for is enough."""
    return f"{-(-size_bytes * 10 // 2**30) / 10:.1f} GiB"

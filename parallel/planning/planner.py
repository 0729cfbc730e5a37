"""Chooses the plan: what the machine can hold, in which precision, with how long a context, and why.

A pure function of (Spec, Machine, Asked). Probes nothing and starts nothing. It plans one rank so far; layouts that
need more are listed as not built, with what they would need, and never chosen.
"""

import dataclasses
from dataclasses import dataclass

from ..errors import NoPlanError, UserError
from .machine import Gpu, Machine, format_size
from .memory import PROCESS, Device, rank_memory
from .pages import pool_pages
from .plan import DType, Plan, RankMemory
from .shards import SINGLE, Mesh
from .spec import Spec

PAGE_TOKENS = 16
STEP_TOKENS: dict[Device, int] = {"cuda": 2048, "cpu": 512}
SMALLEST_CONTEXT_TOKENS = 1024  # chosen unasked; shorter ones hold little but the system message

# The compute dtype from this compute capability on. bf16 units came with Ampere (sm_80); Turing (sm_75) has fp16 ones.
# Nothing is listed below: PyTorch's wheels for this version are built with CUDA 13, whose compiler starts at sm_75.
PRECISION: tuple[tuple[tuple[int, int], DType], ...] = (((8, 0), "bf16"), ((7, 5), "fp16"))
# What the hidden state between layers is kept in: sums over many layers may leave fp16's range of 65504.
RESIDUAL: dict[DType, DType] = {"bf16": "bf16", "fp16": "fp32", "fp32": "fp32", "fp64": "fp64"}

NOT_BUILT = "not built yet"


@dataclass(frozen=True)
class Asked:
    """What the user fixed; None leaves the choice to the planner.

    gpu_memory_bytes: what each GPU has free, in place of what was found; 0 leaves the GPUs out. dp: replicas.
    ranks: of one replica. ep: how many ways experts are placed; divides ranks.
    """

    dtype: DType | None = None
    gpu_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    context_tokens: int | None = None
    dp: int | None = None
    ranks: int | None = None
    ep: int | None = None


def plan(spec: Spec, machine: Machine, asked: Asked = Asked(), *, model: str, checkpoint: str | None = None) -> Plan:
    """The plan for `model`, or NoPlanError with what was tried, the shortfall and the smallest change that would fit.

    Raises UserError where what was asked is impossible on any machine, such as a context beyond the model's.
    """
    _check_layout(machine, asked)
    no_gpu = _no_gpu(machine, asked)
    machine = _with_overrides(machine, asked)
    if asked.context_tokens is not None and asked.context_tokens > spec.max_context_tokens:
        raise UserError(
            f"--context {asked.context_tokens} is more than the model's {spec.max_context_tokens} tokens",
            f"ask for at most {spec.max_context_tokens}",
        )
    place = _on_gpu(machine) or _on_cpu(machine, no_gpu)
    if asked.dtype is not None:
        place = dataclasses.replace(place, dtype=asked.dtype, dtype_why="asked for")
    context = _choose_context(spec, place, asked.context_tokens)
    if context is None:
        raise _no_plan(spec, machine, place, asked)
    memory = _memory(spec, place, context)
    return Plan(
        model=model,
        checkpoint=checkpoint,
        spec=spec,
        machine=machine.name,
        device=place.device,
        dp=1,
        ranks=1,
        ep=1,
        dtype=place.dtype,
        residual_dtype=RESIDUAL[place.dtype],
        kv_dtype=place.dtype,
        offload="none",
        context_tokens=context,
        kv_tokens=_kv_tokens(context),
        page_tokens=PAGE_TOKENS,
        step_tokens=_step_tokens(place, context),
        memory=(memory,),
        why=tuple(_reasons(spec, machine, place, asked, context, memory)),
    )


@dataclass(frozen=True)
class _Place:
    """Where the one rank would run."""

    device: Device
    free_bytes: int  # on the device, less what the process itself takes there
    host_free_bytes: int | None  # None: not known, not checked
    dtype: DType
    dtype_why: str
    no_gpu: str  # why no GPU is used, in words; empty on a GPU
    why: str  # this device


def _with_overrides(machine: Machine, asked: Asked) -> Machine:
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


def _check_layout(machine: Machine, asked: Asked) -> None:
    """Raises UserError for an impossible layout, NoPlanError for one that is not built."""
    dp, ranks, ep = asked.dp or 1, asked.ranks or 1, asked.ep or 1
    Mesh(ranks, ep)
    tried = []
    if ranks > 1:
        tried.append(f"a replica of {ranks} ranks: {NOT_BUILT}")
    if dp > 1:
        tried.append(f"{dp} replicas: {NOT_BUILT}")
    if tried:
        raise NoPlanError(
            f"{dp * ranks} ranks were asked for, and this version runs 1",
            tuple(tried),
            f"leave out --dp, --ranks and --ep: one rank is planned on {machine.name}",
        )


def _no_gpu(machine: Machine, asked: Asked) -> str:
    """Why no GPU of `machine` is used, for the case that none is."""
    if not machine.gpus:
        return "no GPU"
    if asked.gpu_memory_bytes == 0:
        return "the GPUs are left out, as asked"
    gpu = machine.gpus[0]
    return f"{gpu.name} is {_sm(gpu)}, and PyTorch's CUDA 13 wheels start at sm_75"


def _on_gpu(machine: Machine) -> _Place | None:
    """The first GPU; None if there is none that can be used."""
    dtype = _dtype_of(machine.gpus[0]) if machine.gpus else None
    if dtype is None:
        return None
    gpu, reserve = machine.gpus[0], PROCESS["cuda"].device_bytes
    why = (
        f"device cuda: {gpu.name} ({_sm(gpu)}) has {format_size(gpu.free_bytes)} free, "
        f"of which the CUDA context takes about {format_size(reserve)}"
    )
    return _Place(
        device="cuda",
        free_bytes=max(0, gpu.free_bytes - reserve),
        host_free_bytes=machine.host_memory_bytes,
        dtype=dtype,
        dtype_why=_DTYPE_WHY[dtype].format(_sm(gpu)),
        no_gpu="",
        why=why,
    )


def _on_cpu(machine: Machine, no_gpu: str) -> _Place:
    """The CPU. no_gpu: why no GPU is used, in words."""
    if machine.host_memory_bytes is None:
        raise UserError(f"how much memory {machine.name} has free is not known", "say so: --host-memory 16GiB")
    return _Place(
        device="cpu",
        free_bytes=max(0, machine.host_memory_bytes - PROCESS["cpu"].host_bytes),
        host_free_bytes=None,
        dtype="fp32",
        dtype_why=_DTYPE_WHY["fp32"],
        no_gpu=no_gpu,
        why=f"device cpu: {no_gpu}; {format_size(machine.host_memory_bytes)} of host memory can be had",
    )


_DTYPE_WHY: dict[DType, str] = {
    "bf16": "{} multiplies bf16 at full speed, and the checkpoint's own tensors are bf16",
    "fp16": "{} has no bf16 units; hidden states between layers are kept in fp32, as they may outgrow fp16",
    "fp32": "on a CPU the exact one is the default; --dtype bf16 halves the memory of all but the experts",
}


def _dtype_of(gpu: Gpu) -> DType | None:
    return next((dtype for capability, dtype in PRECISION if gpu.capability >= capability), None)


def _sm(gpu: Gpu) -> str:
    return f"sm_{gpu.capability[0]}{gpu.capability[1]}"


def _kv_tokens(context: int) -> int:
    """One request runs at a time, so the cache holds one context: whole pages of it."""
    return -(-context // PAGE_TOKENS) * PAGE_TOKENS


def _step_tokens(place: _Place, context: int) -> int:
    return min(STEP_TOKENS[place.device], context)


def _memory(spec: Spec, place: _Place, context: int, mesh: Mesh = SINGLE, rank: int = 0) -> RankMemory:
    return rank_memory(
        spec,
        mesh,
        rank,
        place.device,
        place.dtype,
        RESIDUAL[place.dtype],
        place.dtype,
        context_tokens=context,
        kv_tokens=_kv_tokens(context),
        page_tokens=PAGE_TOKENS,
        step_tokens=_step_tokens(place, context),
    )


def _device_bytes(memory: RankMemory) -> int:
    return memory.weights_bytes + memory.kv_bytes + memory.workspace_bytes


def _shortfall(place: _Place, memory: RankMemory) -> int:
    """Bytes missing on the device and, with a GPU, in host memory besides."""
    device = max(0, _device_bytes(memory) - place.free_bytes)
    host = 0 if place.host_free_bytes is None else max(0, memory.host_bytes - place.host_free_bytes)
    return device + host


def context_choices(max_context_tokens: int) -> tuple[int, ...]:
    """Contexts that the planner picks by itself, longest first: the model's own, then 8, 7, 6, 5 times powers of two.

    Steps this coarse keep a plan the same from start to start, while free memory differs by some MiB.
    """
    steps = [eighths << power for power in range(64) for eighths in (5, 6, 7, 8)]
    shorter = [tokens for tokens in steps if SMALLEST_CONTEXT_TOKENS <= tokens < max_context_tokens]
    return (max_context_tokens, *reversed(shorter))


def _choose_context(spec: Spec, place: _Place, asked: int | None) -> int | None:
    """The longest context that fits; None if none does."""
    choices = context_choices(spec.max_context_tokens) if asked is None else (asked,)
    return next((context for context in choices if not _shortfall(place, _memory(spec, place, context))), None)


# --- in words


def _reasons(spec: Spec, machine: Machine, place: _Place, asked: Asked, context: int, memory: RankMemory) -> list[str]:
    """A line for each decision."""
    reasons = [place.why]
    used, free = _device_bytes(memory), place.free_bytes
    reasons.append(
        f"1 rank: weights {format_size(memory.weights_bytes)}, KV cache {format_size(memory.kv_bytes)} and workspace "
        f"{format_size(memory.workspace_bytes)} are {format_size(used)} of {format_size(free)}"
    )
    idle = len(machine.gpus) * machine.nodes - 1
    if place.device == "cuda" and idle:
        subject = "1 GPU stays idle" if idle == 1 else f"{idle} GPUs stay idle"
        reasons.append(f"{subject}: several replicas, and replicas of several ranks, are {NOT_BUILT}")
    reasons.append(f"dtype {place.dtype}: {place.dtype_why}; experts stay packed MXFP4")
    if asked.context_tokens is not None:
        reasons.append(f"context {context} tokens: asked for, of the model's {spec.max_context_tokens}")
    elif context == spec.max_context_tokens:
        reasons.append(f"context {context} tokens: all that the model was made for, and it fits")
    else:
        reasons.append(
            f"context {context} tokens: the longest of the planner's steps that fits, of the model's "
            f"{spec.max_context_tokens}"
        )
    step = _step_tokens(place, context)
    pages = pool_pages(spec, _kv_tokens(context), step, PAGE_TOKENS)
    reasons.append(
        f"KV cache for one context, as one request runs at a time: {pages} pages of {PAGE_TOKENS} tokens; "
        f"{spec.layers_of('window')} of {spec.layers} layers keep only {spec.window_tokens} tokens and the step"
    )
    reasons.append(f"prompts go in steps of at most {step} tokens, which bounds the workspace")
    return reasons


def _no_plan(spec: Spec, machine: Machine, place: _Place, asked: Asked) -> NoPlanError:
    smallest = min(SMALLEST_CONTEXT_TOKENS, spec.max_context_tokens)
    context = asked.context_tokens or smallest
    memory = _memory(spec, place, context)
    short = _shortfall(place, memory)
    where = f"1 rank on {machine.gpus[0].name}" if place.device == "cuda" else "1 rank on the CPU"
    tried = [
        f"{where}, {place.dtype}, {context} tokens: {_short(short)}; needs {format_size(_device_bytes(memory))} of "
        f"{format_size(place.free_bytes)} (weights {format_size(memory.weights_bytes)}, KV cache "
        f"{format_size(memory.kv_bytes)}, workspace {format_size(memory.workspace_bytes)})"
    ]
    tried += _unbuilt(spec, machine, place, context) if place.device == "cuda" else [f"1 rank on a GPU: {place.no_gpu}"]
    return NoPlanError(
        f"no plan for {context} tokens of context fits {machine.name}: {_short(short)}",
        tuple(tried),
        "; ".join(_changes(spec, machine, place, asked, context)),
    )


def _short(size_bytes: int) -> str:
    return f"short by {size_bytes} bytes ({format_size(size_bytes)})"


def _unbuilt(spec: Spec, machine: Machine, place: _Place, context: int) -> list[str]:
    """Layouts that would be tried here if they were built."""
    lines = []
    sizes = [ranks for ranks in range(2, len(machine.gpus) + 1) if ranks <= spec.kv_heads]
    for ranks in sizes:
        mesh = Mesh(ranks)
        memories = [_memory(spec, place, context, mesh, rank) for rank in range(ranks)]
        short = max(_shortfall(place, memory) for memory in memories)
        most = format_size(max(_device_bytes(memory) for memory in memories))
        verdict = _short(short) if short else "would fit"
        lines.append(f"{ranks} ranks: {NOT_BUILT}; needs {most} on a GPU, {verdict}")
        if not short:
            break
    lines.append(f"experts in host memory: {NOT_BUILT}")
    return lines


def _changes(spec: Spec, machine: Machine, place: _Place, asked: Asked, context: int) -> list[str]:
    """What would fit, the smallest change first."""
    changes = []
    shorter = [tokens for tokens in context_choices(context) if tokens < context]
    while shorter and _shortfall(place, _memory(spec, place, shorter[0])):
        shorter.pop(0)
    if shorter:
        changes.append(f"--context {shorter[0]} fits")
    if place.dtype == "fp32" and not shorter:
        half = dataclasses.replace(place, dtype="bf16")
        if not _shortfall(half, _memory(spec, half, context)):
            changes.append("--dtype bf16 fits")
    memory = _memory(spec, place, context)
    total = _device_bytes(memory)
    if place.device == "cuda":
        need = total + PROCESS["cuda"].device_bytes
        better = next((i for i, gpu in enumerate(machine.gpus) if gpu.free_bytes >= need and _dtype_of(gpu)), None)
        if better is not None:
            changes.append(f"CUDA_VISIBLE_DEVICES={better} fits")
        changes.append(f"a GPU with {_up(need)} free fits")
        if place.host_free_bytes is not None and memory.host_bytes > place.host_free_bytes:
            changes.append(f"{_up(memory.host_bytes)} of host memory are needed besides")
        if machine.host_memory_bytes is not None:
            on_cpu = _on_cpu(machine, "")
            on_cpu = dataclasses.replace(on_cpu, dtype=asked.dtype or on_cpu.dtype)
            if not _shortfall(on_cpu, _memory(spec, on_cpu, context)):
                changes.append("--gpu-memory 0 runs it on the CPU, slowly")
    else:
        changes.append(f"{_up(total + PROCESS['cpu'].host_bytes)} of free host memory fit")
    return changes


def _up(size_bytes: int) -> str:
    """In GiB, rounded up, so that what is asked for is enough."""
    return f"{-(-size_bytes * 10 // 2**30) / 10:.1f} GiB"

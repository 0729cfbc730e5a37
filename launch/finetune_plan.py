"""What a training run would take, as a table for people: bytes by part, disk, tokens a step, the command.

Starts nothing and needs no torch. Does not know how anything is trained.
"""

import dataclasses
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from ..parallel.errors import NoPlanError, UserError
from ..parallel.planning.choice import FREE, why_no_gpu
from ..parallel.planning.flops import ASSUMED_MFU, peak_flops, training_flops
from ..parallel.planning.machine import format_size, probe, read_machine
from ..parallel.planning.spec import Spec
from ..parallel.planning.training import (
    Share,
    TrainingMemory,
    all_values,
    embedding_bytes,
    layer_experts_bytes,
    lora_values,
    training_memory,
)
from ..parallel.planning.zero import Zero, read_zero
from .finetune_settings import FinetuneSettings, read_deepspeed


def device_and_dtype(settings: FinetuneSettings, has_gpu: bool) -> FinetuneSettings:
    """The settings with nothing left open about where and in which dtype."""
    device = settings.device or ("cuda" if has_gpu else "cpu")
    return dataclasses.replace(
        settings, device=device, dtype=settings.dtype or ("bf16" if device == "cuda" else "fp32")
    )


def print_plan(
    settings: FinetuneSettings,
    spec: Spec,
    line: str,
    *,
    to_stderr: bool = False,
    under_torchrun: bool = False,
    quiet: bool = False,
) -> TrainingMemory:
    """Bytes by part of each rank, and what a step is; the bytes are returned. Raises NoPlanError where they do not
    fit. quiet: nothing is printed, only checked."""
    machine = read_machine(settings.machine) if settings.machine else probe()
    settings = device_and_dtype(settings, bool(machine.gpus))
    assert settings.device is not None and settings.dtype is not None
    if settings.device == "cuda" and not machine.gpus:
        raise UserError(f"device=cuda, and {machine.name} has no GPU", "device=cpu, or machine=NAME for a plan")
    if settings.device == "cuda" and (reason := why_no_gpu(machine, FREE)):
        raise UserError(f"device=cuda, and {reason}", "device=cpu, or machine=NAME for a plan")
    full, here = settings.mode == "full", settings.world_size
    if settings.device == "cuda":
        here = min(settings.world_size, len(machine.gpus))
        if settings.world_size > len(machine.gpus) * machine.nodes and not under_torchrun:
            raise UserError(
                f"ranks={settings.world_size}, and {machine.name} has {len(machine.gpus) * machine.nodes} GPUs",
                "fewer ranks, or machine=NAME for a plan",
            )
    zero = None
    if settings.deepspeed is not None:
        zero = read_zero(read_deepspeed(settings.deepspeed, settings.dtype), settings.dtype)
    ranks = (settings.attention_rank, settings.expert_rank)
    attention, experts = (
        rank if target in settings.targets else 0 for target, rank in zip(("attention", "experts"), ranks, strict=True)
    )
    parts = {"all weights": all_values(spec)}
    if not full:
        parts = {"attention": lora_values(spec, attention, 0), "experts": lora_values(spec, 0, experts)}
    values = sum(parts.values())
    if settings.host_layers > spec.layers:
        raise UserError(f"host_layers={settings.host_layers}", f"{settings.model} has {spec.layers} layers")

    def memory_of(host_layers: int) -> TrainingMemory:
        share = Share(settings.world_size, zero, settings.optimizer, settings.adapter_dtype, host_layers)
        assert settings.device is not None and settings.dtype is not None
        return training_memory(
            spec, values, full, settings.dtype, settings.device, settings.sequence_tokens, share, experts
        )

    memory = memory_of(settings.host_layers)
    on_cpu = settings.device == "cpu"
    free = min(gpu.free_bytes for gpu in machine.gpus[:here]) if not on_cpu else machine.host_memory_bytes
    host = here * (memory.host_bytes + (memory.device_bytes if on_cpu else 0))
    rows = [
        ("model", f"{settings.model}, {settings.mode}"),
        ("device", f"{settings.device} of {machine.name}" + (f", {format_size(free)} free" if free else "")),
        ("ranks", _ranks_in_words(settings, zero)),
        ("dtype", settings.dtype),
        ("trained", ", ".join(f"{name} {count:,}" for name, count in parts.items() if count) + " values"),
        ("weights", format_size(memory.weights_bytes) + _waiting(settings, spec)),
        ("trained values", format_size(memory.trained_bytes)),
        ("gradients", format_size(memory.gradients_bytes)),
        ("AdamW", format_size(memory.moments_bytes)),
        ("kept hidden states", format_size(memory.kept_bytes)),
        ("workspace", format_size(memory.workspace_bytes)),
        ("CUDA context, NCCL", format_size(memory.context_bytes)),
        (f"all on each {settings.device}", f"{format_size(memory.device_bytes)} (counted, not measured)"),
        ("host memory", f"{format_size(host)} for {here} ranks" if here > 1 else format_size(host)),
        ("disk", f"{format_size(memory.disk_bytes)} a checkpoint, {settings.keep_last + 1} at most"),
        ("a step", f"at most {settings.packs_per_step * settings.sequence_tokens:,} tokens "
         f"({settings.packs_per_step} packs of {settings.sequence_tokens:,}, "
         f"{-(-settings.packs_per_step // settings.world_size)} a rank)"),
        ("steps", f"{settings.steps:,}" if settings.steps else f"as many as {settings.epochs} epochs of the data take"),
        ("time", _time(settings, spec, None if on_cpu else machine.gpus[0].name)),
        ("command", line),
    ]  # fmt: skip
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        if row[1] != "0 B":
            table.add_row(*row)
    Console(stderr=to_stderr, highlight=False, markup=False, emoji=False, quiet=quiet).print(table)
    for of_host, what, needed, there in (
        (False, f"{settings.device} of {machine.name}", memory.device_bytes, free),
        (True, f"the host memory of {machine.name}", host, machine.host_memory_bytes),
    ):
        if there is not None and needed > there:
            raise NoPlanError(
                f"{settings.mode} training of {settings.model} does not fit {what}: "
                f"short by {format_size(needed - there)}",
                (f"ranks {_ranks_in_words(settings, zero)}",),
                "more ranks, or another deepspeed (zero3, zero3-offload-part, zero3-offload, zero3-offload-all)"
                if full
                else _less_on_the_host(settings)
                if of_host and not on_cpu
                else _smaller(settings, spec, free, memory_of),
            )
    return memory


def _less_on_the_host(settings: FinetuneSettings) -> str:
    if settings.host_layers:
        return f"host_layers below {settings.host_layers}: the experts of fewer layers then wait in host memory"
    return "fewer ranks on this machine, or one with more host memory"


def _smaller(
    settings: FinetuneSettings, spec: Spec, free_bytes: int | None, memory_of: Callable[[int], TrainingMemory]
) -> str:
    """What would fit, where experts in host memory are enough for that, else what to try."""
    for layers in range(settings.host_layers + 1, spec.layers + 1):
        if settings.device == "cuda" and free_bytes is not None and memory_of(layers).device_bytes <= free_bytes:
            return f"host_layers={layers} fits the GPU: the experts of as many layers then wait in host memory"
    return "lower sequence_tokens or expert_rank, or adapter_dtype=bf16 with optimizer=adamw8bit"


def _waiting(settings: FinetuneSettings, spec: Spec) -> str:
    """Frozen weights that are not on the GPU."""
    if settings.mode == "full" or settings.device == "cpu":
        return ""
    assert settings.dtype is not None
    size, what = embedding_bytes(spec, settings.dtype), "the embedding"
    if settings.host_layers:
        size += settings.host_layers * layer_experts_bytes(spec)
        what += f" and the experts of {settings.host_layers} layers"
    return f", and {format_size(size)} in host memory: {what}"


def _time(settings: FinetuneSettings, spec: Spec, gpu: str | None) -> str:
    """Of all steps, or of a million tokens where nothing says how many steps there are."""
    assert settings.dtype is not None
    peak = None if gpu is None else peak_flops(gpu, settings.dtype)
    if peak is None:
        return f"not known: no peak of {gpu or 'a CPU'} in {settings.dtype} is in our tables"
    flops = training_flops(spec, [settings.sequence_tokens], settings.mode) / settings.sequence_tokens
    mfu = ASSUMED_MFU[settings.mode]
    tokens_per_s = mfu * peak * settings.world_size / flops
    how = f"{tokens_per_s:,.0f} tokens/s, if {mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s are reached"
    if not settings.steps:
        return f"{1e6 / tokens_per_s / 3600:.2g} hours a million tokens ({how})"
    tokens = settings.steps * settings.packs_per_step * settings.sequence_tokens
    return f"at most {tokens / tokens_per_s / 3600:.2g} hours ({how})"


def _ranks_in_words(settings: FinetuneSettings, zero: Zero | None) -> str:
    if zero is None:
        return f"{settings.world_size}" + (", each with all that is trained" if settings.world_size > 1 else "")
    host = ", weights in host memory" if zero.weights_on_host else ""
    if zero.on_host:
        host += f", {zero.on_host:.0%} of AdamW in host memory"
    return f"{settings.world_size}, DeepSpeed ZeRO stage {zero.stage} ({settings.deepspeed}){host}"

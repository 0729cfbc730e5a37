"""What a training run would take, as a table for people: bytes by part, disk, tokens a step, the command.

Starts nothing and needs no torch. Does not know how anything is trained.
"""

import dataclasses

from rich.console import Console
from rich.table import Table

from ..parallel.errors import NoPlanError, UserError
from ..parallel.planning.machine import format_size, probe, read_machine
from ..parallel.planning.spec import Spec
from ..parallel.planning.training import all_values, lora_values, training_memory
from .finetune_settings import FinetuneSettings


def device_and_dtype(settings: FinetuneSettings, has_gpu: bool) -> FinetuneSettings:
    """The settings with nothing left open about where and in which dtype."""
    device = settings.device or ("cuda" if has_gpu else "cpu")
    return dataclasses.replace(
        settings, device=device, dtype=settings.dtype or ("bf16" if device == "cuda" else "fp32")
    )


def print_plan(settings: FinetuneSettings, spec: Spec, line: str, *, to_stderr: bool = False) -> None:
    """Bytes by part, and what a step is. Raises NoPlanError where they do not fit."""
    machine = read_machine(settings.machine) if settings.machine else probe()
    settings = device_and_dtype(settings, bool(machine.gpus))
    assert settings.device is not None and settings.dtype is not None
    if settings.device == "cuda" and not machine.gpus:
        raise UserError(f"device=cuda, and {machine.name} has no GPU", "device=cpu, or machine=NAME for a plan")
    full = settings.mode == "full"
    ranks = (settings.attention_rank, settings.expert_rank)
    attention, experts = (
        rank if target in settings.targets else 0 for target, rank in zip(("attention", "experts"), ranks, strict=True)
    )
    parts = {"all weights": all_values(spec)}
    if not full:
        parts = {"attention": lora_values(spec, attention, 0), "experts": lora_values(spec, 0, experts)}
    values = sum(parts.values())
    memory = training_memory(spec, values, full, settings.dtype, settings.device, settings.sequence_tokens)
    free = machine.gpus[0].free_bytes if settings.device == "cuda" else machine.host_memory_bytes
    host = memory.host_bytes + (memory.device_bytes if settings.device == "cpu" else 0)
    rows = [
        ("model", f"{settings.model}, {settings.mode}"),
        ("device", f"{settings.device} of {machine.name}" + (f", {format_size(free)} free" if free else "")),
        ("dtype", settings.dtype),
        ("trained", ", ".join(f"{name} {count:,}" for name, count in parts.items() if count) + " values"),
        ("weights", format_size(memory.weights_bytes)),
        ("trained, gradients, AdamW", format_size(memory.trained_bytes)),
        ("kept hidden states", format_size(memory.kept_bytes)),
        ("workspace", format_size(memory.workspace_bytes)),
        ("CUDA context", format_size(memory.context_bytes)),
        (f"all on {settings.device}", f"{format_size(memory.device_bytes)} (counted, not measured)"),
        ("host memory", format_size(host)),
        ("disk", f"{format_size(memory.disk_bytes)} a checkpoint, {settings.keep_last + 1} at most"),
        ("a step", f"at most {settings.packs_per_step * settings.sequence_tokens:,} tokens "
         f"({settings.packs_per_step} packs of {settings.sequence_tokens:,})"),
        ("steps", f"{settings.steps:,}" if settings.steps else f"as many as {settings.epochs} epochs of the data take"),
        ("command", line),
    ]  # fmt: skip
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        if row[1] != "0 B":
            table.add_row(*row)
    Console(stderr=to_stderr, highlight=False).print(table)
    if free is not None and memory.device_bytes > free:
        short = format_size(memory.device_bytes - free)
        raise NoPlanError(
            f"{settings.mode} training of {settings.model} does not fit {settings.device} of {machine.name}: "
            f"short by {short}",
            ("several GPUs, and optimizer state in host memory: not built yet",),
            "lower sequence_tokens, expert_rank or attention_rank, or targets=[attention]",
        )

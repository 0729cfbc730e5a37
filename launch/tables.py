"""Plans as tables for people. Knows nothing of where they are printed."""

from rich.console import Console, Group, RenderableType
from rich.table import Table

from ..parallel.planning.machine import format_size
from ..parallel.planning.plan import Offload, Plan

PARTS = {  # of a rank's memory, and what they are called; one that is 0 on all ranks is left out
    "weights_bytes": "weights",
    "kv_bytes": "KV cache",
    "workspace_bytes": "workspace",
    "graphs_bytes": "CUDA graphs",
    "communication_bytes": "communication",
    "context_bytes": "CUDA context",
}


def plan_table(plan: Plan) -> RenderableType:
    """What runs where, bytes a rank by part, and a `why` line for each decision."""
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="bold")
    facts.add_column()
    layout = f"{plan.dp} x {plan.ranks} ranks (tp {plan.mesh.tp}, ep {plan.mesh.ep}, etp {plan.mesh.etp})"
    if plan.nodes > 1:
        layout += f" on {plan.nodes} nodes"
    for name, value in (
        ("plan", plan.digest),
        ("model", plan.model),
        ("machine", plan.machine),
        ("workload", plan.workload),
        ("replicas", layout),
        ("device", plan.device),
        ("dtype", f"{plan.dtype}, hidden states {plan.residual_dtype}, KV cache {plan.kv_dtype}"),
        ("kernels", plan.kernels),
        ("offload", "none" if plan.offload == "none" else plan.offload.taken.name),
        ("context", f"{plan.context_tokens} tokens"),
        ("sequences", f"{plan.sequences} at a time"),
        ("KV cache", f"{plan.kv_tokens} tokens"),
    ):
        facts.add_row(name, value)
    memory = Table(box=None, padding=(0, 2, 0, 0))
    parts = {name: heading for name, heading in PARTS.items() if any(getattr(row, name) for row in plan.memory)}
    for heading in ("rank", *parts.values(), f"all on {plan.device}", "host memory besides"):
        memory.add_column(heading, justify="right")
    for row in plan.memory:
        sizes = (*(getattr(row, name) for name in parts), row.device_bytes, row.host_bytes)
        memory.add_row(str(row.rank), *(format_size(size) for size in sizes))
    why = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    why.add_column(style="dim")
    why.add_column(overflow="fold")
    for line in plan.why:
        why.add_row("why", line)
    return Group(facts, "", memory, "", *([] if plan.offload == "none" else [_ways(plan.offload), ""]), why)


def _ways(offload: Offload) -> RenderableType:
    """The way that is taken, first, and the others, with what they cost a token."""
    ways = Table(box=None, padding=(0, 2, 0, 0))
    ways.add_column("experts", overflow="fold")
    for heading in ("tokens/s", "GPU reads", "link", "CPU reads", "disk"):
        ways.add_column(heading, justify="right")
    for way in (offload.taken, *offload.others):
        moved = (way.device_read_bytes, way.link_bytes, way.cpu_read_bytes, way.disk_bytes)
        ways.add_row(way.name, f"{way.tok_s:.1f}", *(format_size(round(size)) if size else "" for size in moved))
    return ways


def print_plan(plan: Plan, *, to_stderr: bool = False) -> None:
    """To stdout for `plan`, whose result it is; to stderr where it is news on the way to something else."""
    Console(stderr=to_stderr, highlight=False, markup=False, emoji=False).print(plan_table(plan), soft_wrap=False)

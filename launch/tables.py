"""Plans as tables for people. Knows nothing of where they are printed."""

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
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


def plan_table(plan: Plan, console: Console) -> RenderableType:
    """What runs where, bytes a rank by part, and a `why` line for each decision. console: whose width there is."""
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
    why = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    why.add_column(style="dim")
    why.add_column(overflow="fold")
    for line in plan.why:
        why.add_row("why", line)
    ways = [] if plan.offload == "none" else [_ways(plan.offload), ""]
    if ways and _measured(ways[0], console).minimum > console.width:
        ways = []  # the reasons say the same in words
    return Group(facts, "", _memory(plan, console), "", *ways, why)


def _memory(plan: Plan, console: Console) -> Table:
    """A line for each rank; where that is too wide, a line for each part, and a column for ranks that are alike."""
    parts = {name: heading for name, heading in PARTS.items() if any(getattr(row, name) for row in plan.memory)}
    headings = (*parts.values(), f"all on {plan.device}", "host memory besides")
    sizes = {
        row.rank: tuple(
            format_size(size) for size in (*(getattr(row, name) for name in parts), row.device_bytes, row.host_bytes)
        )
        for row in plan.memory
    }
    wide = Table("rank", *headings, box=None, padding=(0, 2, 0, 0))
    for rank, shown in sizes.items():
        wide.add_row(str(rank), *shown)
    for column in wide.columns:
        column.justify = "right"
    if _measured(wide, console).maximum <= console.width:
        return wide
    alike: dict[tuple[str, ...], list[int]] = {}
    for rank, shown in sizes.items():
        alike.setdefault(shown, []).append(rank)
    tall = Table("rank", *(_numbers(ranks) for ranks in alike.values()), box=None, padding=(0, 2, 0, 0))
    for heading, *shown in zip(headings, *alike, strict=True):
        tall.add_row(heading, *shown)
    for column in tall.columns[1:]:
        column.justify = "right"
    return tall


def _measured(table: RenderableType, console: Console) -> Measurement:
    """How wide a table would be in a terminal of any width."""
    return Measurement.get(console, console.options.update(max_width=10_000), table)


def _numbers(numbers: list[int]) -> str:
    """Ascending ones, as few words as can be: 0-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _ways(offload: Offload) -> RenderableType:
    """The way that is taken, first, and the others, with what they cost a token."""
    ways = Table(box=None, padding=(0, 2, 0, 0))
    ways.add_column("experts", overflow="fold")
    for heading in ("tokens/s", "GPU reads", "link", "CPU reads", "disk"):
        ways.add_column(heading, justify="right", no_wrap=True)
    for way in (offload.taken, *offload.others):
        moved = (way.device_read_bytes, way.link_bytes, way.cpu_read_bytes, way.disk_bytes)
        ways.add_row(way.name, f"{way.tok_s:.1f}", *(format_size(round(size)) if size else "" for size in moved))
    return ways


def print_plan(plan: Plan, *, to_stderr: bool = False) -> None:
    """To stdout for `plan`, whose result it is; to stderr where it is news on the way to something else."""
    console = Console(stderr=to_stderr, highlight=False, markup=False, emoji=False)
    console.print(plan_table(plan, console), soft_wrap=False)

"""What each rank of a plan holds, as a picture and as a table, in Markdown for people. Made from the shard table.

Knows no file that they are shown in.
"""

from .machine import format_size
from .plan import Plan
from .shards import local_slices, table


def picture(plan: Plan) -> str:
    """A Mermaid flow chart of one replica: a layer's half-layers, what each rank computes of them, and the all-reduces
    between."""
    lines = ["flowchart TB", f'  tokens["the same {plan.spec.hidden} numbers a token on every rank"]']
    for half, heading in (("attention", "half-layer 1: attention"), ("experts", "half-layer 2: experts")):
        lines.append(f'  subgraph {half}["{heading}"]')
        lines.append("    direction LR")
        for rank in range(plan.ranks):
            lines.append(f'    {half}{rank}["rank {rank}<br/>{"<br/>".join(_held(plan, rank)[half])}"]')
        lines.append("  end")
    sums = "all-reduce: every rank gets the sum"
    lines += [f'  sum1(["{sums}"])', f'  sum2(["{sums}"])']
    lines.append("  tokens --> attention --> sum1 --> experts --> sum2")
    lines.append(f'  sum2 -. "{plan.spec.layers} layers" .-> tokens')
    return "```mermaid\n" + "\n".join(lines) + "\n```\n"


def rank_table(plan: Plan) -> str:
    """A Markdown table: a row for each rank of one replica, its share of everything that is cut, and its weights."""
    headings = ("rank", "query heads", "KV heads", "experts", "expert width", "vocabulary rows", "weights")
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for rank in range(plan.ranks):
        parts = _parts(plan, rank)
        cells = [
            str(rank),
            *(f"{span} of {whole}" for span, whole in parts),
            format_size(plan.memory[rank].weights_bytes),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _held(plan: Plan, rank: int) -> dict[str, tuple[str, str]]:
    """By half-layer, in words."""
    heads, kv, experts, width, _ = (span for span, _ in _parts(plan, rank))
    return {
        "attention": (f"query heads {heads}", f"KV heads {kv}"),
        "experts": (f"experts {experts}", f"width {width}"),
    }


def _parts(plan: Plan, rank: int) -> list[tuple[str, int]]:
    """(first-last, whole) of what `rank` holds of each thing that is cut; experts by their place in expert_order."""
    rows = {row.name: row for row in table(plan.spec)}
    parts = []
    for name, dim, size in (  # size: elements of dim that are one of what is counted
        ("layers.0.sinks", 0, 1),
        ("layers.0.k.bias", 0, plan.spec.head_dim),
        ("layers.0.gate_up.bias", 0, 1),
        ("layers.0.gate_up.bias", 1, 2),
        ("embed", 0, 1),
    ):
        row = rows[name]
        held = local_slices(row, plan.mesh, rank)[dim]
        first, last = held.start // size, held.stop // size - 1
        parts.append((str(first) if first == last else f"{first}-{last}", row.shape[dim] // size))
    return parts

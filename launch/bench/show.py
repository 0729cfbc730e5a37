"""Rows of a benchmark for people: a table, the ratios of two engines, kernels by group, and a picture.

Knows nothing of how they were measured or where they are printed.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from .rows import COMPARED, Row

Cell = Callable[[Row], str]


def _number(value: float | None, digits: int = 0, unit: str = "") -> str:
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def _pair(first: float | None, second: float | None) -> str:
    if first is None or second is None:
        return "-"
    digits = 0 if first >= 100 else 2
    return f"{first:,.{digits}f} / {second:,.{digits}f}"


# heading: what stands below it
COLUMNS: dict[str, Cell] = {
    "engine": lambda row: f"{row.engine} {row.version or ''}".strip(),
    "ranks": lambda row: _number(row.ranks),
    "batch": lambda row: _number(row.batch),
    "rate /s": lambda row: _number(row.rate, 2),
    "prompt": lambda row: _number(row.prompt),
    "new": lambda row: _number(row.new),
    "prefill tok/s": lambda row: _number(row.prefill_tok_s),
    "step ms": lambda row: _number(row.decode_ms, 3),
    "tok/s": lambda row: _number(row.decode_tok_s, 1),
    "tok/s/user": lambda row: _number(row.tok_s_user, 1),
    "TTFT ms p50 / p99": lambda row: _pair(row.ttft_ms, row.ttft_p99_ms),
    "ITL ms p50 / p99": lambda row: _pair(row.itl_ms, row.itl_p99_ms),
    "request ms p50 / p99": lambda row: _pair(row.request_ms, row.request_p99_ms),
    "% roofline": lambda row: _number(None if row.roofline is None else row.roofline * 100, 1),
    "failed": lambda row: _number(sum(row.failed.values()) or None),
}
WIDEST = 1000  # characters
ALWAYS = ("engine", "prompt", "new")


def table(rows: Sequence[Row]) -> Table:
    """A line a case; columns that nobody has anything in are left out."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    cells = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    cells = {name: texts for name, texts in cells.items() if name in ALWAYS or any(text != "-" for text in texts)}
    for name in cells:
        shown.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for line in zip(*cells.values(), strict=True):
        shown.add_row(*line)
    return shown


def report(rows: Sequence[Row], ratios: Sequence[Mapping[str, Any]]) -> RenderableType:
    parts: list[RenderableType] = [table(rows)]
    for ratio in ratios:
        case = f"batch {ratio['batch']}" if ratio["rate"] is None else f"{ratio['rate']:g} requests/s"
        better = ", ".join(f"{name} {ratio[name]:.2f} x" for name in COMPARED if name in ratio)
        parts.append(f"{case}: {ratio['engine']} against {ratio['against']}: {better}")
    for row in rows:
        if row.kernels:
            whole = sum(row.kernels.values())
            groups = ", ".join(f"{name} {spent:.1f} us ({spent / whole:.0%})" for name, spent in row.kernels.items())
            parts.append(f"batch {row.batch}: {whole:.1f} us of kernels a step: {groups}")
    for note in dict.fromkeys(f"{row.engine}: {note}" for row in rows for note in row.notes):
        parts.append(f"note: {note}")
    failures = {f"{row.engine}: {count} x {reason}" for row in rows for reason, count in row.failed.items()}
    parts += [f"failed: {line}" for line in sorted(failures)]
    return Group(*parts)


def print_report(rows: Sequence[Row], ratios: Sequence[Mapping[str, Any]]) -> None:
    """To stderr: stdout is for the lines that programs read. Wider than the terminal rather than cut off."""
    wanted = Console(width=WIDEST).measure(table(rows)).maximum
    width = max(Console(stderr=True).width, wanted)
    Console(stderr=True, highlight=False, markup=False, width=width).print(report(rows, ratios))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Throughput against latency as a PNG: a line an engine, a point a case with its batch or rate beside it.

    The latency is that of a decode step; of the first token in prefill. Wants matplotlib, which `need_plot_extra`
    checks.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    prefill = rows[0].bench == "prefill"
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in dict.fromkeys(_engine(row) for row in rows):
        points = [(*_point(row), row) for row in rows if _engine(row) == name]
        known = [(x, y, row) for x, y, row in points if x is not None and y is not None]
        axes.plot([x for x, _, _ in known], [y for _, y, _ in known], marker="o", label=name)
        for x, y, row in known:
            case = f"{row.batch}" if row.rate is None else f"{row.rate:g}/s"
            axes.annotate(case, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("first token, ms" if prefill else "decode step, ms (one token of each stream)")
    axes.set_ylabel("prompt tokens a second" if prefill else "tokens a second, all streams")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    first = rows[0]
    axes.set_title(f"{first.bench} of {first.model} on {first.device or 'an unknown device'}: prompt {first.prompt}, "
                   f"{first.new} new", fontsize=10)  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def _engine(row: Row) -> str:
    return f"{row.engine} {row.version or ''}".strip()


def _point(row: Row) -> tuple[float | None, float | None]:
    """(latency, throughput)."""
    return (row.ttft_ms, row.prefill_tok_s) if row.bench == "prefill" else (row.decode_ms, row.decode_tok_s)

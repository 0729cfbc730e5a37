"""The README's table of measured speed, from tests/benchmarks/results/*.jsonl, as `bench --out` and the
runners of peers write them.

A file is one session on one machine, so that ratios within it mean something: MODEL_DEVICE_DATE.jsonl. Knows nothing of
how anything was measured.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "benchmarks" / "results"
NONE_YET = "No result of `bench` is kept yet.\n"
KEYS = """engine version device model ranks ep batch prompt new prefill_tok_s decode_ms decode_tok_s ttft_ms roofline
date bench""".split()
OURS, PEER = "gptoss-launch", "vllm"

Row = dict[str, Any]


def _figure(key: str, digits: int = 0, scale: float = 1) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else f"{row[key] * scale:,.{digits}f}"


def _engine(row: Row) -> str:
    commit = f" `{row['commit']}`" if row.get("commit") else ""
    return f"{row['engine']} {row['version'] or ''}".strip() + commit


def _load(row: Row) -> str:
    return f"{row['rate']:g} /s" if row.get("rate") is not None else f"{row['batch']}"


# heading: what stands below it
COLUMNS: dict[str, Callable[[Row], str]] = {
    "engine": _engine,
    "GPUs": _figure("ranks"),
    "batch or rate": _load,
    "prefill tok/s": _figure("prefill_tok_s"),
    "step ms": _figure("decode_ms", 2),
    "tok/s": _figure("decode_tok_s"),
    "TTFT ms": _figure("ttft_ms", 1),
    "% roofline": _figure("roofline", 0, 100),
}


def read_results(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """Rows by the file that they are in. Raises ValueError that names file and line."""
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            where = f"{path.name}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: no JSON: {error}") from None
            if "rows" in row:
                continue  # the same once more
            missing = [key for key in KEYS if key not in row]
            if missing:
                raise ValueError(f"{where}: no {', '.join(missing)}")
            found.setdefault(path.name, []).append(row)
    return found


def markdown(results: dict[str, list[Row]]) -> str:
    """A table for each model, device, kind and length; the newest row of a case counts."""
    if not results:
        return NONE_YET
    parts = []
    for name, rows in results.items():
        groups: dict[tuple[Any, ...], dict[tuple[Any, ...], Row]] = {}
        for row in sorted(rows, key=lambda one: one["date"]):
            group = row["model"], row["device"], row["bench"], row["prompt"], row["new"]
            groups.setdefault(group, {})[row["engine"], row["ep"], _load_of(row)] = row
        for group, cases in groups.items():
            parts.append(_table(name, *group, list(cases.values())))
    return "\n".join(parts)


def _load_of(row: Row) -> tuple[Any, ...]:
    """What two engines must have in common to be compared."""
    return row["ranks"] or 0, row["batch"] or 0, row.get("rate") or 0.0


def _table(name: str, model: str, device: str | None, bench: str, prompt: int, new: int, rows: list[Row]) -> str:
    rows = sorted(rows, key=lambda row: (_load_of(row), row["engine"] != OURS, row["engine"]))
    ratios = [_ratio(row, rows) for row in rows]
    columns = COLUMNS | ({f"x {PEER}": lambda row: _ratio(row, rows)} if any(ratios) else {})
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    kept = [place for place in range(len(columns)) if any(line[place] for line in cells)]
    headings = [heading for place, heading in enumerate(columns) if place in kept]
    lengths = f"prompts of {prompt:,} tokens" + (f", {new:,} new" if bench != "prefill" else "")
    days = sorted({row["date"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    link = f"[{name}](tests/benchmarks/results/{name})"
    lines = [f"{bench} of {model} on {device or 'an unknown device'}: {lengths}, {when}, {link}", ""]
    lines += [_line(headings), _line(["---"] * len(kept))]
    lines += [_line([line[place] for place in kept]) for line in cells]
    return "\n".join(lines) + "\n"


def _ratio(row: Row, rows: Sequence[Row]) -> str:
    """Our speed over the peer's in the same case of the same file."""
    if row["engine"] != OURS:
        return ""
    peers = [one for one in rows if one["engine"] == PEER and _load_of(one) == _load_of(row)]
    key = "prefill_tok_s" if row["bench"] == "prefill" else "decode_tok_s"
    speeds = [one[key] for one in peers if one[key]]
    return f"{row[key] / max(speeds):.2f}" if speeds and row[key] else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

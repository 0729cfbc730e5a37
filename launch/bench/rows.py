"""One measured case as a line of JSON, and two engines side by side.

The keys are those that every runner prints, ours and those of the peers in tests/benchmarks/peers, so that one table
can be made of all. Loads neither torch nor Click. Knows nothing of how a figure was measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from ...parallel.planning.roofline import Floor

Kind = Literal["decode", "prefill", "serve"]


@dataclass(frozen=True)
class About:
    """What was measured. version: of the engine; None: it did not say. device: of one rank, None: not known.

    route: how it was asked. packages: versions of what else decides the speed.
    """

    engine: str
    version: str | None
    model: str
    route: str
    device: str | None = None
    ranks: int | None = None
    ep: int | None = None
    commit: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    start_s: float | None = None  # from its start until it could answer


@dataclass(frozen=True)
class Row:
    """One case. _ms: milliseconds; _tok_s: tokens a second of all streams; None: not measured in this case, or unknown.

    batch: streams at the same time (serve with a rate: None). new: tokens of an answer, besides the first in `decode`.
    decode_ms: of a step. tok_s_user: decode_tok_s of one stream. ttft_ms, itl_ms: median over streams and tokens, from
    sending a request to its first token and between two; _p99: of the slowest hundredth. roofline: share of what memory
    bandwidth allows, 0 to 1, floor_ms being all of it. failed: requests without an answer, by reason. kernels:
    microseconds of a step by group. notes: what a reader must know.
    """

    bench: Kind
    engine: str
    version: str | None
    device: str | None
    model: str
    ranks: int | None
    ep: int | None
    batch: int | None
    prompt: int
    new: int
    date: str
    route: str
    commit: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    start_s: float | None = None
    rate: float | None = None
    requests: int | None = None
    seed: int | None = None
    repeats: int | None = None
    prefill_tok_s: float | None = None
    decode_ms: float | None = None
    decode_tok_s: float | None = None
    tok_s_user: float | None = None
    ttft_ms: float | None = None
    ttft_p99_ms: float | None = None
    itl_ms: float | None = None
    itl_p99_ms: float | None = None
    request_ms: float | None = None
    request_p99_ms: float | None = None
    roofline: float | None = None
    floor_ms: float | None = None
    read_bytes: int | None = None
    bandwidth_bytes_s: float | None = None
    failed: Mapping[str, int] = field(default_factory=dict)
    kernels: Mapping[str, float] | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {name: _rounded(value) for name, value in dataclasses.asdict(self).items()}


def _rounded(value: Any) -> Any:
    """Floats to six digits: more is noise, and hard to read."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return value


def now() -> str:
    """As the date of a row: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def make_row(kind: Kind, about: About, *, prompt: int, new: int, batch: int | None, **figures: Any) -> Row:
    named = {f.name: getattr(about, f.name) for f in dataclasses.fields(about)}
    return Row(bench=kind, batch=batch, prompt=prompt, new=new, date=now(), **named, **figures)


def with_roofline(row: Row, floor: Floor | str) -> Row:
    """`row` beside the floor of its step; a text says why there is none."""
    if isinstance(floor, str):
        return dataclasses.replace(row, notes=(*row.notes, f"no roofline: {floor}"))
    known = dataclasses.replace(
        row,
        read_bytes=round(floor.read_bytes),
        bandwidth_bytes_s=floor.bytes_per_s,
        floor_ms=None if floor.seconds is None else floor.seconds * 1e3,
        roofline=None if row.decode_ms is None else floor.share(row.decode_ms / 1e3),
    )
    if floor.bytes_per_s is None:
        known = dataclasses.replace(
            known, notes=(*known.notes, f"no roofline: the bandwidth of {row.device} is unknown")
        )
    return known


# --- two engines

# name: (key of a row, whether more is better)
COMPARED = {
    "decode": ("decode_tok_s", True),
    "prefill": ("prefill_tok_s", True),
    "ttft": ("ttft_ms", False),
    "itl": ("itl_ms", False),
}


def ratios(rows: Sequence[Row], first: About, second: About) -> list[dict[str, Any]]:
    """For each case that both have: how many times better the first is, in every figure that both have."""
    found = []
    others = {_case(row): row for row in rows if _same(row, second)}
    for row in rows:
        other = others.get(_case(row))
        if not _same(row, first) or other is None or other is row:
            continue
        line: dict[str, Any] = {"batch": row.batch, "rate": row.rate, "prompt": row.prompt, "new": row.new}
        line |= {"engine": row.engine, "against": f"{other.engine} {other.version or ''}".strip()}
        for name, (key, more) in COMPARED.items():
            mine, theirs = getattr(row, key), getattr(other, key)
            if mine and theirs:
                line[name] = _rounded(mine / theirs if more else theirs / mine)
        found.append(line)
    return found


def _case(row: Row) -> tuple[Any, ...]:
    return row.bench, row.batch, row.rate, row.new


def _same(row: Row, about: About) -> bool:
    return all(getattr(row, f.name) == getattr(about, f.name) for f in dataclasses.fields(about))

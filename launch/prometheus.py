"""Prometheus' text format -> numbers, and what two readings of the same server say about the time between them.

https://prometheus.io/docs/instrumenting/exposition_formats/. Reads what servers of our kind write: no timestamps, no
exemplars. Knows no metric by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"')
_ESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

Labels = tuple[tuple[str, str], ...]  # by name


@dataclass(frozen=True)
class Reading:
    """All samples of one scrape. at_s: when, of a clock that never goes back."""

    at_s: float
    values: Mapping[tuple[str, Labels], float] = field(default_factory=dict)

    def total(self, name: str) -> float | None:
        """Sum of `name` over all labels; None where there is no such sample."""
        found = [value for (sample, _), value in self.values.items() if sample == name]
        return sum(found) if found else None

    def mean(self, name: str) -> float | None:
        found = [value for (sample, _), value in self.values.items() if sample == name]
        return sum(found) / len(found) if found else None

    def by(self, name: str, label: str) -> dict[str, float]:
        """Value of `name` -> summed by one label."""
        sums: dict[str, float] = {}
        for (sample, labels), value in self.values.items():
            if sample == name:
                key = dict(labels).get(label, "")
                sums[key] = sums.get(key, 0.0) + value
        return sums


def parse(text: str, at_s: float) -> Reading:
    """Raises ValueError for what is no metrics at all."""
    values: dict[tuple[str, Labels], float] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        found = _SAMPLE.match(line)
        if found is None:
            raise ValueError(f"no line of metrics: {line[:60]!r}")
        name, inside, number = found.groups()
        labels = tuple(sorted((key, _unescaped(value)) for key, value in _LABEL.findall(inside or "")))
        values[name, labels] = float(number)  # reads NaN and +Inf as well
    return Reading(at_s, values)


def rise(before: Reading, now: Reading, name: str) -> float | None:
    """How much a counter grew between two readings, over all labels. A counter that is smaller than it was began again
    at 0, with its process. None where `now` has none."""
    found = [(labels, value) for (sample, labels), value in now.values.items() if sample == name]
    if not found:
        return None
    grown = 0.0
    for labels, value in found:
        was = before.values.get((name, labels), 0.0)
        grown += value - was if value >= was else value
    return grown


def rate(before: Reading, now: Reading, name: str) -> float | None:
    """The same for a second."""
    grown, spent_s = rise(before, now, name), now.at_s - before.at_s
    return None if grown is None or spent_s <= 0 else grown / spent_s


def quantile(before: Reading, now: Reading, name: str, share: float) -> float | None:
    """Of what a histogram counted between two readings, over all labels but its edges; None if it counted nothing.

    Straight between the edges of the bucket that it falls into, and the last finite edge beyond that, as Prometheus'
    histogram_quantile has it.
    """
    edges: dict[float, float] = {}
    for (sample, labels), value in now.values.items():
        if sample == f"{name}_bucket":
            edge = float(dict(labels)["le"])
            was = before.values.get((sample, labels), 0.0)
            edges[edge] = edges.get(edge, 0.0) + (value - was if value >= was else value)
    ordered = sorted(edges.items())
    if not ordered or ordered[-1][1] <= 0:
        return None
    wanted = share * ordered[-1][1]
    low, below = 0.0, 0.0
    for edge, count in ordered:
        if count >= wanted:
            if math.isinf(edge):
                return low
            return edge if count == below else low + (edge - low) * (wanted - below) / (count - below)
        low, below = edge, count
    return low


def _unescaped(value: str) -> str:
    return re.sub(r"\\[\\\"n]", lambda found: _ESCAPED[found[0]], value)

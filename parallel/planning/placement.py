"""Which experts sit together: a recorded routing -> an order of experts that loads the ranks evenly.

The `ep` cut gives each position a contiguous slice of the order, so an order is a placement. Knows counts alone: not
which experts the same token chooses, and nothing of tensors (the loader permutes experts and router rows alike).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .shards import part

Order = tuple[int, ...]
_RECORD = "record it with this model"
_FORM = '{"model": NAME, "counts": [[a count for each expert] for each layer]}, as serve --record-routing writes it'


@dataclass(frozen=True)
class Routing:
    """How often each expert was chosen: counts[layer][expert]. model: as it was named when that was recorded."""

    model: str
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Imbalance:
    """The load of the busiest rank over that of the average rank, 1 if all are alike; over all layers together, as a
    step waits for the busiest rank in each of them, and in the worst layer."""

    overall: float
    worst: float


def read_routing(path: Path, layers: int, experts: int) -> Routing:
    """The routing in `path`. Raises UserError, with the numbers, unless it is one of `layers` times `experts`."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}", _FORM) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("counts"), list):
        raise UserError(f"{path}: no routing", _FORM)
    rows, model = fields["counts"], fields.get("model")
    if not isinstance(model, str):
        raise UserError(f"{path}: model is {model!r}, wanted a name", _FORM)
    if len(rows) != layers:
        raise UserError(
            f"{path}: counts of {len(rows)} layers, and the model has {layers}", "record it with this model"
        )
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != experts:
            found = f"{len(row)} counts" if isinstance(row, list) else f"a {type(row).__name__}"
            raise UserError(
                f"{path}: layer {layer}: {found}, and it has {experts} experts", "record it with this model"
            )
        for expert, count in enumerate(row):
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise UserError(f"{path}: layer {layer}, expert {expert}: {count!r} is no count", _FORM)
    return Routing(model, tuple(tuple(row) for row in rows))


def place_experts(counts: Sequence[int], ep: int) -> Order:
    """The order of one layer's experts whose `ep` slices make the busiest one carry the least that was found.

    Longest processing time first (Graham 1969) into slices of fixed size: the most used expert goes to the least
    loaded slice with room, and to the smaller of two such; then pairs are swapped for as long as that lowers the
    busiest slice. The published order where none of it helps. Experts of a slice are in ascending order.
    """
    published = tuple(range(len(counts)))
    sizes = _sizes(len(counts), ep)
    slices: list[list[int]] = [[] for _ in sizes]
    for expert in sorted(published, key=lambda expert: -counts[expert]):
        room = (index for index, size in enumerate(sizes) if len(slices[index]) < size)
        least = min(room, key=lambda index: (sum(counts[e] for e in slices[index]), sizes[index]))
        slices[least].append(expert)
    while _swap(slices, counts):
        pass
    order = tuple(expert for one in slices for expert in sorted(one))
    return order if max(loads(counts, order, ep)) < max(loads(counts, published, ep)) else published


def _swap(slices: list[list[int]], counts: Sequence[int]) -> bool:
    """The swap between the busiest slice and another that lowers the larger of the two the most; False if none does.

    Each swap brings two loads closer together, so the sum of squares falls and this comes to an end.
    """
    totals = [sum(counts[expert] for expert in one) for one in slices]
    busiest = totals.index(max(totals))
    best: tuple[int, int, int, int] | None = None
    for other, total in enumerate(totals):
        for i, mine in enumerate(slices[busiest]):
            for j, theirs in enumerate(slices[other]):
                moved = counts[mine] - counts[theirs]
                after = max(totals[busiest] - moved, total + moved)
                if other != busiest and after < totals[busiest] and (best is None or after < best[0]):
                    best = after, other, i, j
    if best is None:
        return False
    _, other, i, j = best
    slices[busiest][i], slices[other][j] = slices[other][j], slices[busiest][i]
    return True


def loads(counts: Sequence[int], order: Order, ep: int) -> list[int]:
    """Sum of counts at each of the `ep` positions."""
    return [sum(counts[expert] for expert in order[part(len(order), 1, index, ep)]) for index in range(ep)]


def imbalance(routing: Routing, orders: Sequence[Order], ep: int) -> Imbalance:
    """Of all layers, each in its order. A layer that saw no token is even."""
    busiest, means = [], []
    for counts, order in zip(routing.counts, orders, strict=True):
        busiest.append(max(loads(counts, order, ep)))
        means.append(sum(counts) / ep)
    worst = max((most / mean for most, mean in zip(busiest, means, strict=True) if mean), default=1.0)
    return Imbalance(sum(busiest) / sum(means) if sum(means) else 1.0, worst)


def _sizes(experts: int, ep: int) -> list[int]:
    slices = [part(experts, 1, index, ep) for index in range(ep)]
    return [one.stop - one.start for one in slices]

"""Placement by load: against every placement where there are few, and on skewed counts where there are many."""

import itertools
import json
import random
from pathlib import Path

import pytest
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning.choice import Asked
from gptoss_launch.parallel.planning.machine import read_machine
from gptoss_launch.parallel.planning.placement import Routing, imbalance, loads, place_experts, read_routing
from gptoss_launch.parallel.planning.plan import Plan
from gptoss_launch.parallel.planning.planner import plan as choose_plan
from gptoss_launch.parallel.planning.spec import PUBLISHED

MODEL = "openai/gpt-oss-20b"


def skewed(draw: random.Random, experts: int) -> tuple[int, ...]:
    """As routers are: a few experts take most tokens (Zipf's law), in no order."""
    counts = [int(10_000 / (rank + 1)) for rank in range(experts)]
    draw.shuffle(counts)
    return tuple(counts)


@pytest.mark.parametrize(("experts", "ep"), [(6, 2), (7, 2), (7, 3), (8, 4), (5, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_against_every_placement(experts: int, ep: int, seed: int) -> None:
    draw = random.Random(seed)
    counts = skewed(draw, experts) if seed % 2 else tuple(draw.randrange(100) for _ in range(experts))
    best = min(max(loads(counts, order, ep)) for order in itertools.permutations(range(experts)))
    found = max(loads(counts, place_experts(counts, ep), ep))
    assert best <= found <= 1.1 * best  # the fewer experts, the further off: see below for the published numbers


@pytest.mark.parametrize(("experts", "ep"), [(32, 2), (32, 3), (32, 8), (128, 4), (128, 8)])
def test_skewed_counts_come_close_to_what_no_placement_beats(experts: int, ep: int) -> None:
    counts = skewed(random.Random(experts + ep), experts)
    order = place_experts(counts, ep)
    assert sorted(order) == list(range(experts))
    before, after = max(loads(counts, tuple(range(experts)), ep)), max(loads(counts, order, ep))
    # the most used expert shares its slice with at least the least used ones
    bound = max(max(counts) + sum(sorted(counts)[: experts // ep - 1]), sum(counts) / ep)
    assert after < before and after <= 1.01 * bound


def test_the_published_order_is_kept_where_nothing_helps() -> None:
    assert place_experts([7] * 8, 4) == tuple(range(8))
    assert place_experts([0] * 8, 4) == tuple(range(8))
    assert place_experts([1, 2, 3, 4], 1) == (0, 1, 2, 3)
    assert place_experts([100, 0, 0, 0], 2) == (0, 1, 2, 3)


def test_imbalance_counts_the_busiest_rank_of_each_layer() -> None:
    routing = Routing("m", ((4, 0, 0, 0), (1, 1, 1, 1), (0, 0, 0, 0)))
    even = imbalance(routing, [(0, 1, 2, 3)] * 3, 2)
    assert (even.overall, even.worst) == ((4 + 2) / (2 + 2), 2.0)


def write(path: Path, fields: object) -> Path:
    path.write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "no routing"),
        ({"model": "m"}, "no routing"),
        ({"counts": [[1, 2]]}, "model is None"),
        ({"model": "m", "counts": [[1, 2]]}, "counts of 1 layers, and the model has 2"),
        ({"model": "m", "counts": [[1, 2], [1, 2, 3]]}, "layer 1: 3 counts, and it has 2 experts"),
        ({"model": "m", "counts": [[1, 2], 5]}, "layer 1: a int, and it has 2 experts"),
        ({"model": "m", "counts": [[1, 2], [1, -2]]}, "layer 1, expert 1: -2 is no count"),
        ({"model": "m", "counts": [[1, 2], [True, 2]]}, "layer 1, expert 0: True is no count"),
    ],
)
def test_what_is_no_routing(tmp_path: Path, fields: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_routing(write(tmp_path / "routing.json", fields), layers=2, experts=2)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not readable as JSON"):
        read_routing(tmp_path / "none.json", 2, 2)
    (tmp_path / "half.json").write_text('{"model": ')
    with pytest.raises(UserError, match="not readable as JSON"):
        read_routing(tmp_path / "half.json", 2, 2)


def test_the_plan_carries_the_order_and_says_what_it_is_worth() -> None:
    draw = random.Random(0)
    routing = Routing(MODEL, tuple(skewed(draw, 32) for _ in range(24)))

    def planned(**asked: object) -> Plan:
        wanted = Asked(routing=routing, dp=1, **asked)  # type: ignore[arg-type]
        return choose_plan(PUBLISHED[MODEL], read_machine("h100x8"), wanted, model=MODEL)

    plan = planned(ranks=4, ep=4)
    assert plan.expert_order == tuple(place_experts(counts, 4) for counts in routing.counts)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    (line,) = (line for line in plan.why if line.startswith("routing recorded with"))
    before = imbalance(routing, [tuple(range(32))] * 24, 4)
    after = imbalance(routing, plan.expert_order, 4)
    assert f"{before.overall:.3f} in the published order, {after.overall:.3f} as placed" in line
    plan = planned(ranks=4, ep=1)
    assert plan.expert_order == () and any("with ep 1 every rank holds a part of each" in line for line in plan.why)

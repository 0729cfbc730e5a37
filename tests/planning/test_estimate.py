"""The estimate of a decode step: its bytes against the known ones, expectations against enumeration and simulation."""

import itertools
import json
import random

import pytest
from gptoss_launch.parallel.planning.choice import TIE
from gptoss_launch.parallel.planning.estimate import (
    BANDWIDTH,
    all_reduce_s,
    bandwidth,
    busiest_experts,
    decode_step,
    expert_load,
    read_bytes,
)
from gptoss_launch.parallel.planning.machine import machine_names, read_machine
from gptoss_launch.parallel.planning.shards import Mesh, part
from gptoss_launch.parallel.planning.spec import PUBLISHED
from results_table import RESULTS

SPECS = {name.removeprefix("openai/gpt-oss-"): spec for name, spec in PUBLISHED.items()}


@pytest.mark.parametrize(("model", "giga"), [("20b", 3.71), ("120b", 5.00)])
def test_bytes_of_a_step_at_one_token(model: str, giga: float) -> None:
    """All weights but the embedding and the experts that are not chosen; with no context there is no KV to read."""
    assert read_bytes(SPECS[model], Mesh(), "bf16", 1, 0) / 1e9 == pytest.approx(giga, abs=0.005)


def test_kv_bytes_of_a_step() -> None:
    more = read_bytes(SPECS["20b"], Mesh(), "bf16", 1, 8192) - read_bytes(SPECS["20b"], Mesh(), "bf16", 1, 0)
    assert more == (12 * 8192 + 12 * 128) * 2 * 8 * 64 * 2
    # and no more than that, as longer contexts are not what a step is judged at
    assert read_bytes(SPECS["20b"], Mesh(), "bf16", 1, 131072) == read_bytes(SPECS["20b"], Mesh(), "bf16", 1, 8192)


@pytest.mark.parametrize(
    ("experts", "ep", "by_tokens"),
    [
        (32, 8, {1: 1.53, 8: 3.83, 32: 4.00, 64: 4.00}),
        (128, 8, {1: 1.62, 8: 6.07, 32: 12.85, 64: 15.57}),
        (128, 2, {1: 2.74, 8: 16.24, 32: 43.00, 64: 57.13}),
    ],
)
def test_busiest_rank_of_the_published_models(experts: int, ep: int, by_tokens: dict[int, float]) -> None:
    for tokens, expected in by_tokens.items():
        assert busiest_experts(experts, 4, tokens, ep) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("experts", "chosen", "tokens", "ep"), [(5, 2, 1, 2), (5, 2, 2, 3), (6, 2, 3, 4), (4, 4, 2, 3)]
)
def test_busiest_rank_by_enumeration(experts: int, chosen: int, tokens: int, ep: int) -> None:
    parts = [part(experts, 1, index, ep) for index in range(ep)]
    choices = list(itertools.combinations(range(experts), chosen))
    busiest = [
        max(len([e for e in set().union(*routes) if one.start <= e < one.stop]) for one in parts)
        for routes in itertools.product(choices, repeat=tokens)
    ]
    assert busiest_experts(experts, chosen, tokens, ep) == pytest.approx(sum(busiest) / len(busiest))


def test_busiest_rank_by_simulation() -> None:
    draw = random.Random(0)
    parts = [part(32, 1, index, 3) for index in range(3)]
    total = 0
    for _ in range(2000):
        active = {expert for _ in range(5) for expert in draw.sample(range(32), 4)}
        total += max(sum(one.start <= expert < one.stop for expert in active) for one in parts)
    assert busiest_experts(32, 4, 5, 3) == pytest.approx(total / 2000, rel=0.02)


def test_width_wins_at_one_token_and_whole_experts_at_many() -> None:
    spec = SPECS["20b"]
    assert expert_load(spec, Mesh(8, 1), 1) == pytest.approx(4 * 12 / 90)  # 90 blocks over 8: the larger parts have 12
    assert expert_load(spec, Mesh(8, 1), 1) < expert_load(spec, Mesh(8, 8), 1)
    assert expert_load(spec, Mesh(8, 8), 64) < expert_load(spec, Mesh(8, 1), 64)


def test_all_reduce_as_measured() -> None:
    assert all_reduce_s("nvlink", 1, 5760) == 0
    rows = json.loads((RESULTS / "all_reduce_2xH200_2026-11-29.json").read_text("utf-8"))
    fastest = {row["bytes"]: min(one["in_step_us"] for one in rows if one["bytes"] == row["bytes"]) for row in rows}
    assert (min(fastest), max(fastest)) == (5760, 1_048_320)
    for size, us in fastest.items():
        assert all_reduce_s("nvlink", 2, size) == pytest.approx(us * 1e-6, rel=0.1), size
    assert all_reduce_s("nvlink", 2, 2_900_000) == pytest.approx(15.7e-6, rel=0.15)
    # more ranks send more, and the room of each is smaller
    assert all_reduce_s("nvlink", 8, 5760) > all_reduce_s("nvlink", 2, 5760)
    assert all_reduce_s("nvlink", 8, 65536) < 8e-6 < all_reduce_s("nvlink", 8, 65538)
    assert all_reduce_s("pcie", 4, 8192) == pytest.approx(20.3e-6, rel=0.1)
    assert all_reduce_s("pcie", 4, 384 << 10) == pytest.approx(83.5e-6, rel=0.1)


def test_a_step_adds_up_and_only_shrinks_where_links_allow() -> None:
    spec = SPECS["20b"]
    speed = bandwidth("NVIDIA H100 80GB HBM3")
    assert speed is not None
    one, two = (decode_step(spec, Mesh(ranks), "bf16", speed, "nvlink", 1, 8192) for ranks in (1, 2))
    assert one.seconds == one.read_s + one.besides_s and one.reduces == 0
    assert two.seconds == two.read_s + two.besides_s + 48 * two.reduce_s < one.seconds
    assert decode_step(spec, Mesh(2), "bf16", speed, "pcie", 1, 8192).seconds > one.seconds  # 48 x 17 us


@pytest.mark.parametrize(
    "name, batches", [("20b_H200", {1, 8, 32}), ("20b_2xH200", {1, 8, 32}), ("120b_2xH200", {1, 8})]
)
def test_steps_as_measured(name: str, batches: set[int]) -> None:
    """Of the newest run, with as much context as in its middle."""
    lines = max(RESULTS.glob(f"{name}_*.jsonl")).read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["bench"] == "decode" and row["engine"] == "gptoss-launch"]
    assert batches <= {row["batch"] for row in rows}
    for row in rows:
        speed = bandwidth(row["device"])
        assert speed is not None and speed == row["bandwidth_bytes_s"]
        step = decode_step(SPECS[row["model"]], Mesh(row["ranks"]), "bf16", speed, "nvlink", row["batch"], 1024 + 64)
        assert step.seconds * 1e3 == pytest.approx(row["decode_ms"], rel=TIE - 1), row["batch"]


def test_every_machine_that_ships_has_a_bandwidth_where_it_can_run() -> None:
    names = {gpu.name for name in machine_names() for gpu in read_machine(name).gpus if gpu.capability >= (7, 5)}
    assert all(bandwidth(name) for name in names)
    assert bandwidth("NVIDIA A1") is None  # the name as a whole, not its beginning
    assert len(BANDWIDTH) == len({name.lower() for name in BANDWIDTH})

"""Whole plans against files: a changed decision shows as a changed file. Also: plans as JSON, and their digests.

After an intended change write the files anew, look at the difference, and commit it:
    python tests/planning/test_golden_plans.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gptoss_launch.parallel.errors import NoPlanError, UserError
from gptoss_launch.parallel.planning.choice import Asked
from gptoss_launch.parallel.planning.machine import read_machine
from gptoss_launch.parallel.planning.plan import Plan, Workload
from gptoss_launch.parallel.planning.planner import plan as choose_plan
from gptoss_launch.parallel.planning.spec import PUBLISHED

GOLDEN = Path(__file__).parent / "golden"
MACHINES = [
    *("gtx1080ti", "rtx2080ti", "rtx3090", "h100", "rtx3090x2", "h200x2", "rtx3090x3", "a100-40x4"),
    *("h100x8", "h100x8-2nodes", "a100-40-2nodes", "cpu"),
]
SIZES = ("20b", "120b")
# Small machines, by name: the model, and what is asked of which machine.
SMALL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "small_20b_11gb": ("20b", "rtx2080ti", {}),
    "small_20b_16gb-laptop": ("20b", "laptop-16gb", {}),
    "small_120b_16gb-laptop": ("120b", "laptop-16gb", {}),
    "small_20b_8gb-laptop": ("20b", "laptop-8gb", {}),
    "small_20b_8gb-laptop_auto": ("20b", "laptop-8gb", {"longest_context": True}),
    "small_20b_24gb": ("20b", "rtx4090", {}),
    "small_120b_24gb-96gb": ("120b", "rtx4090", {"host_memory_bytes": 92 << 30}),
    "small_20b_cpu-16gb": ("20b", "cpu", {"host_memory_bytes": 15 << 30}),
    "small_20b_8gb-laptop_int8": ("20b", "laptop-8gb", {"rest": "int8"}),
    "small_20b_cpu-16gb_int8": ("20b", "cpu", {"host_memory_bytes": 15 << 30, "rest": "int8"}),
    "small_20b_cpu-8gb": ("20b", "cpu", {"host_memory_bytes": 8 << 30}),
    "small_20b_6gb-of-h100": ("20b", "h100", {"gpu_memory_bytes": 6 << 30}),
}
CASES: list[tuple[str, str, Workload]] = [(size, machine, "latency") for size in SIZES for machine in MACHINES]
CASES += [(size, machine, "throughput") for size in SIZES for machine in ("h200x2", "h100x8")]


def file_name(size: str, machine: str, workload: str) -> str:
    return f"{size}_{machine}.json" if workload == "latency" else f"{size}_{machine}_{workload}.json"


def golden_plan(size: str, machine: str, workload: Workload = "latency") -> Plan:
    model = f"openai/gpt-oss-{size}"
    return choose_plan(PUBLISHED[model], read_machine(machine), Asked(workload=workload), model=model)


def golden_text(size: str, machine: str, workload: Workload) -> str:
    """A plan without its architecture, which is of no interest here and long; the digest covers it. Or why not."""
    return text(lambda: golden_plan(size, machine, workload))


def small_text(name: str) -> str:
    size, machine, asked = SMALL[name]
    model = f"openai/gpt-oss-{size}"
    return text(lambda: choose_plan(PUBLISHED[model], read_machine(machine), Asked(**asked), model=model))


def text(make: Callable[[], Plan]) -> str:
    try:
        plan = make()
    except NoPlanError as error:
        fields = {"message": error.message, "tried": error.tried, "hint": error.hint}
    else:
        fields = {name: value for name, value in plan.to_json().items() if name != "spec"}
    return json.dumps(fields, indent=1) + "\n"


@pytest.mark.parametrize(("size", "machine", "workload"), CASES)
def test_plan_is_the_golden_one(size: str, machine: str, workload: Workload) -> None:
    assert golden_text(size, machine, workload) == (GOLDEN / file_name(size, machine, workload)).read_text()


@pytest.mark.parametrize("name", SMALL)
def test_plan_of_a_small_machine_is_the_golden_one(name: str) -> None:
    assert small_text(name) == (GOLDEN / f"{name}.json").read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.glob("*")} == {
        *(file_name(*case) for case in CASES),
        *(f"{name}.json" for name in SMALL),
    }


def test_json_round_trip_keeps_the_digest(tmp_path: Path) -> None:
    plan = golden_plan("20b", "h100")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert len(plan.digest) == 8 and int(plan.digest, 16) >= 0
    assert golden_plan("20b", "h200").digest != plan.digest


@pytest.mark.parametrize("field", ["context_tokens", "dtype", "why", "spec", "memory", "digest"])
def test_an_edited_plan_is_refused(field: str) -> None:
    fields = json.loads(json.dumps(golden_plan("20b", "h100").to_json()))
    edited = {
        "context_tokens": 1,
        "dtype": "fp32",
        "why": ["because"],
        "spec": fields["spec"] | {"window_tokens": 64},
        "memory": [],
        "digest": "00000000",
    }
    with pytest.raises(UserError, match="was edited"):
        Plan.from_json(fields | {field: edited[field]})


if __name__ == "__main__":
    for case in CASES:
        (GOLDEN / file_name(*case)).write_text(golden_text(*case))
    for name in SMALL:
        (GOLDEN / f"{name}.json").write_text(small_text(name))

"""Whole plans against files: a changed decision shows as a changed file. Also: plans as JSON, and their digests.

After an intended change write the files anew, look at the difference, and commit it:
    python tests/planning/test_golden_plans.py
"""

import json
from pathlib import Path

import pytest
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning.machine import read_machine
from gptoss_launch.parallel.planning.plan import Plan
from gptoss_launch.parallel.planning.planner import plan as choose_plan
from gptoss_launch.parallel.planning.spec import PUBLISHED

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    ("20b", "cpu"),
    ("20b", "gtx1080ti"),
    ("20b", "rtx3090"),
    ("20b", "h100"),
    ("20b", "h100x8-2nodes"),
    ("120b", "a100-80x8"),
    ("120b", "h100"),
    ("120b", "h200x2"),
]


def golden_plan(size: str, machine: str) -> Plan:
    model = f"openai/gpt-oss-{size}"
    return choose_plan(PUBLISHED[model], read_machine(machine), model=model)


def golden_text(plan: Plan) -> str:
    """All but the architecture, which is of no interest here and long; the digest covers it."""
    return json.dumps({name: value for name, value in plan.to_json().items() if name != "spec"}, indent=1) + "\n"


@pytest.mark.parametrize(("size", "machine"), CASES)
def test_plan_is_the_golden_one(size: str, machine: str) -> None:
    assert golden_text(golden_plan(size, machine)) == (GOLDEN / f"{size}_{machine}.json").read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*")} == {f"{size}_{machine}" for size, machine in CASES}


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
        (GOLDEN / "{}_{}.json".format(*case)).write_text(golden_text(golden_plan(*case)))

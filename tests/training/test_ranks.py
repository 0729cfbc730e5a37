"""Several ranks train what one rank trains: real torchrun over gloo, real DeepSpeed, on the embedded model."""

from pathlib import Path

import pytest
from gptoss_launch.parallel.training.checkpoints import read_values
from gptoss_launch.parallel.training.job import Job, Mode
from gptoss_launch.parallel.training.loop import Step
from gptoss_launch.parallel.training.saves import saves
from gptoss_launch.parallel.training.world import ALONE
from train_ranks import STEPS, assert_near, make_job, run_cases, stage, take_steps


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Step], Path]]:
    """Steps and folder of each mode on one rank, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("alone")
    return {mode: (take_steps(make_job(mode), folder / mode, ALONE)[0], folder / mode) for mode in ("lora", "full")}


def test_two_ranks_adapt_what_one_adapts(alone: dict[str, tuple[list[Step], Path]], tmp_path: Path) -> None:
    wanted, folder = alone["lora"]
    middle = str(saves(folder)[0][1])
    steps = run_cases(tmp_path, {"both": (make_job(), None), "more ranks": (make_job(), middle)}, ranks=2)
    assert wanted[-1].loss < 0.97 * wanted[0].loss
    assert_near(steps["both"], wanted, 1e-4)
    assert_near(steps["more ranks"], wanted, 1e-4, first=STEPS // 2 + 1)
    fewer, _ = take_steps(make_job(), tmp_path / "fewer", ALONE, saves(tmp_path / "both")[0][1])
    assert_near(fewer, wanted, 1e-4, first=STEPS // 2 + 1)


@pytest.mark.slow
def test_deepspeed_trains_what_one_rank_trains(alone: dict[str, tuple[list[Step], Path]], tmp_path: Path) -> None:
    """Every stage, both modes; resumed on as many ranks, exactly; on other numbers of ranks and in other stages."""
    modes: tuple[Mode, ...] = ("lora", "full")
    cases: dict[str, tuple[Job, str | None]] = {
        f"{mode} {number}": (make_job(mode, stage(number)), None) for mode in modes for number in range(4)
    }
    host = {"offload_optimizer": {"device": "cpu"}}
    cases["full on the host"] = (make_job("full", stage(2, **host)), None)
    cases["full all on the host"] = (make_job("full", stage(3, offload_param={"device": "cpu"}, **host)), None)
    middle = str(saves(alone["full"][1])[0][1])
    cases["full 2 from one rank"] = (make_job("full", stage(2)), middle)
    cases["full 3 from one rank"] = (make_job("full", stage(3)), middle)
    for number in range(4):
        from_itself = str(tmp_path / f"full {number}" / f"checkpoint-{STEPS // 2:08d}")
        cases[f"full {number} again"] = (make_job("full", stage(number)), from_itself)
    cases["lora 3 again"] = (make_job("lora", stage(3)), str(tmp_path / "lora 3" / f"checkpoint-{STEPS // 2:08d}"))
    for number in (1, 2, 3):
        cases[f"full {number} bf16"] = (make_job("full", stage(number), "bf16"), None)
    steps = run_cases(tmp_path, cases, ranks=2)

    for name, taken in steps.items():
        wanted, folder = alone[name.split()[0]]
        first = taken[0].step
        worst = max(abs(one.loss - other.loss) for one, other in zip(taken, wanted[first - 1 :], strict=True))
        print(f"{name}: largest difference of a loss {worst:.1e}")
        if name.endswith("bf16"):
            assert worst < 0.05 * wanted[0].loss and taken[-1].loss < 0.97 * taken[0].loss
            continue
        assert_near(taken, wanted, 1e-4, first)
        if name.endswith("again"):
            whole = steps[name.removesuffix(" again")]
            assert [step.loss for step in taken] == [step.loss for step in whole[first - 1 :]]
        if not name.endswith(("rank", "again")):
            assert_same_values(make_job("full" if "full" in name else "lora"), tmp_path / name, folder)
    for number in (1, 2, 3):
        first, *others = [steps[f"full {number} bf16"][place].loss for place in range(STEPS)]
        assert others != [first] * len(others)
    fewer, _ = take_steps(make_job("full"), tmp_path / "fewer", ALONE, saves(tmp_path / "full 3")[0][1])
    assert_near(fewer, alone["full"][0], 1e-4, first=STEPS // 2 + 1)


def assert_same_values(job: Job, ours: Path, wanted: Path) -> None:
    """All that was trained: a tensor that a stage leaves out would show here, if not in the loss."""
    values, others = (read_values(job, saves(folder)[-1][1]) for folder in (ours, wanted))
    begun = read_values(job, saves(wanted)[0][1])
    assert values.keys() == others.keys()
    for name, tensor in values.items():
        # AdamW turns the smallest gradients into whole steps: hold the mean, which no tensor left alone would pass
        moved = (others[name] - begun[name]).abs().mean()
        assert (tensor - others[name]).abs().mean() <= 0.02 * moved, name

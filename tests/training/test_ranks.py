"""Several ranks train what one rank trains: real torchrun over gloo, real DeepSpeed."""

import dataclasses
from pathlib import Path

import pytest
import torch
from gptoss_launch.parallel.training.checkpoints import read_values
from gptoss_launch.parallel.training.job import Job, Mode
from gptoss_launch.parallel.training.saves import saves
from gptoss_launch.parallel.training.world import ALONE
from small_models import checkpoint
from train_ranks import assert_near, make_job, run_cases, stage, take_steps

MODES: tuple[Mode, ...] = ("lora", "full")
ON_HOST = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.slow  # so does the next one, on the embedded model
def test_two_ranks_adapt_what_one_adapts(tmp_path: Path) -> None:
    job = make_job(checkpoint("three_blocks", tmp_path), steps=4)
    wanted, _ = take_steps(job, tmp_path / "alone", ALONE)
    steps = run_cases(tmp_path, {"both": (job, None)}, ranks=2)
    assert wanted[-1].loss < 0.99 * wanted[0].loss
    assert_near(steps["both"], wanted, 1e-4)
    fewer, _ = take_steps(job, tmp_path / "fewer", ALONE, saves(tmp_path / "both")[0][1])
    assert_near(fewer, wanted, 1e-4, first=3)


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_every_stage_trains_what_one_rank_trains(tmp_path: Path) -> None:
    """Ten steps of the embedded model's shape, a pack a rank. The steps are short: what a longer one turns at MXFP4's
    rounding grows from the last bits of a sum to 2e-4 of a loss, whatever the ranks."""
    model = checkpoint("tiny", tmp_path)

    def job(mode: Mode, number: int | None = None) -> Job:
        whole = make_job(model, mode, None if number is None else stage(number))
        recipe = dataclasses.replace(whole.recipe, learning_rate=2e-4)
        return dataclasses.replace(whole, packs_per_step=2, recipe=recipe)

    wanted = {mode: take_steps(job(mode), tmp_path / mode, ALONE)[0] for mode in MODES}
    cases: dict[str, tuple[Job, str | None]] = {
        f"{mode} {number}": (job(mode, number), None) for mode in MODES for number in range(4)
    }
    cases["lora both"] = (job("lora"), None)
    for name, taken in run_cases(tmp_path, cases, ranks=2).items():
        mode = name.split()[0]
        worst = max(abs(one.loss - other.loss) for one, other in zip(taken, wanted[mode], strict=True))
        print(f"{name}: largest difference of a loss {worst:.1e}")
        assert taken[-1].loss < taken[0].loss
        assert_near(taken, wanted[mode], 1e-4)
        assert_same_values(job(mode), tmp_path / name, tmp_path / mode)


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_a_run_goes_on_on_other_ranks_and_in_other_stages(tmp_path: Path) -> None:
    """From its own checkpoint exactly; from those of other stages and numbers of ranks as near as sums can be."""
    model, steps = checkpoint("three_blocks", tmp_path), 6
    middle = f"checkpoint-{steps // 2:08d}"

    def job(mode: Mode, number: int, **more: object) -> Job:
        return make_job(model, mode, stage(number, **more), steps=steps)

    wanted = {mode: take_steps(make_job(model, mode, steps=steps), tmp_path / mode, ALONE)[0] for mode in MODES}
    cases: dict[str, tuple[Job, str | None]] = {}
    for mode, number in (("lora", 3), *(("full", number) for number in range(4))):
        cases[f"{mode} {number}"] = (job(mode, number), None)
        cases[f"{mode} {number} again"] = (job(mode, number), str(tmp_path / f"{mode} {number}" / middle))
    cases["full 2 from one rank"] = (job("full", 2), str(tmp_path / "full" / middle))
    cases["full 3 from one rank"] = (job("full", 3), str(tmp_path / "full" / middle))
    cases["full 1 from 3"] = (job("full", 1), str(tmp_path / "full 3" / middle))
    cases["full 2 on the host"] = (job("full", 2, **ON_HOST), None)
    cases["full 3 on the host"] = (job("full", 3, offload_param={"device": "cpu"}, **ON_HOST), None)
    bf16 = {number: make_job(model, "full", stage(number), "bf16", steps) for number in (1, 2, 3)}
    cases |= {f"full {number} bf16": (one, None) for number, one in bf16.items()}
    cases["full 3 bf16 again"] = (bf16[3], str(tmp_path / "full 3 bf16" / middle))
    found = run_cases(tmp_path, cases, ranks=2)

    for name, taken in found.items():
        first, mode = taken[0].step, name.split()[0]
        alone = wanted[mode][first - 1 :]
        worst = max(abs(one.loss - other.loss) for one, other in zip(taken, alone, strict=True))
        print(f"{name}: largest difference of a loss {worst:.1e}")
        if name.endswith("again"):
            whole = found[name.removesuffix(" again")]
            assert [step.loss for step in taken] == [step.loss for step in whole[first - 1 :]]
        if "bf16" in name:
            assert worst < 0.05 * alone[0].loss
            continue
        assert_near(taken, wanted[mode], 1e-4, first)
    # fp32 values are what bf16 weights are rounded from
    values = read_values(bf16[3], saves(tmp_path / "full 3 bf16")[-1][1])
    assert any((tensor != tensor.to(torch.bfloat16).float()).any() for tensor in values.values())
    fewer, _ = take_steps(make_job(model, "full", steps=steps), tmp_path / "fewer", ALONE, tmp_path / "full 3" / middle)
    assert_near(fewer, wanted["full"], 1e-4, first=steps // 2 + 1)


def assert_same_values(job: Job, ours: Path, wanted: Path) -> None:
    """All that was trained: a tensor that a stage leaves out would show here, if not in the loss."""
    values, others = (read_values(job, saves(folder)[-1][1]) for folder in (ours, wanted))
    begun = read_values(job, saves(wanted)[0][1])
    assert values.keys() == others.keys()
    for name, tensor in values.items():
        # AdamW turns the smallest gradients into whole steps: hold the mean, which no tensor left alone would pass
        moved = (others[name] - begun[name]).abs().mean()
        assert (tensor - others[name]).abs().mean() <= 0.02 * moved, name

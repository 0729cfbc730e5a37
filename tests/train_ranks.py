"""Training runs of tests with several ranks: each case is a job, and how far it goes.

Under torchrun: `python train_ranks.py OUT` runs the cases of OUT/cases.json one after the other on one process group,
as starting DeepSpeed takes longer than training; rank 0 writes OUT/<name>.json, a list of steps, and checkpoints lie in
OUT/<name>/. A case that goes on from another names its checkpoint.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from gptoss_launch.parallel.planning.plan import DType
from gptoss_launch.parallel.training.job import Job, Mode, Recipe
from gptoss_launch.parallel.training.loop import Step, train
from gptoss_launch.parallel.training.place import read_place
from gptoss_launch.parallel.training.samples import sample
from gptoss_launch.parallel.training.saves import saves
from gptoss_launch.parallel.training.trainee import Trainee, load_trainee
from gptoss_launch.parallel.training.world import World, joined
from small_models import SPECS, prompt
from torchrun import torchrun

SAMPLES = [
    sample(prompt(SPECS["tiny"], length, seed=length), [0, *[1.0 if place % 3 else 0.5 for place in range(1, length)]])
    for length in (12, 20, 9, 31, 16, 25, 40, 18, 22, 30, 11)
]


def make_job(
    folder: Path, mode: Mode = "lora", deepspeed: dict[str, Any] | None = None, dtype: DType = "fp32", steps: int = 10
) -> Job:
    """folder: of the checkpoint, by its name in SPECS."""
    return Job(
        model=folder.name,
        checkpoint=str(folder),
        spec=SPECS[folder.name],
        mode=mode,
        attention_rank=4,
        attention_alpha=8,
        expert_rank=2,
        expert_alpha=4,
        dtype=dtype,
        device="cpu",
        sequence_tokens=48,
        packs_per_step=3,  # on two ranks one of them has a blank
        steps=steps,
        recipe=Recipe(5e-3 if mode == "lora" else 1e-3, "cosine", 0.2, 0.1, 0.9, 0.95, 0.01, 1.0),
        seed=1,
        data="",
        weights=(1.0,),
        save_every=steps // 2,
        keep_last=2,
        eval_every=steps // 2,
        check_first_loss=False,
        deepspeed=deepspeed,
    )


def stage(number: int, **more: Any) -> dict[str, Any]:
    """A configuration of DeepSpeed in which even the tensors of a tiny model are cut."""
    cut = {"stage3_param_persistence_threshold": 0, "sub_group_size": 20_000} if number == 3 else {}
    return {"zero_optimization": {"stage": number, **cut, **more}}


def take_steps(job: Job, folder: Path, world: World, go_on_from: Path | None = None) -> tuple[list[Step], Trainee]:
    """Every step from a checkpoint, or from the beginning, to the end."""
    folder.mkdir(exist_ok=True)
    trainee = load_trainee(job, world, go_on_from, lambda done, total: None)
    taken: list[Step] = []
    finished = train(job, folder, world, trainee, SAMPLES, SAMPLES[:3], lambda: False, taken.append, lambda line: None)
    assert finished and [step for step, _ in saves(folder)][-1] == job.steps
    return taken, trainee


def run_cases(out: Path, cases: dict[str, tuple[Job, str | None]], ranks: int) -> dict[str, list[Step]]:
    """Steps of each case. A case: a job, and the folder of a checkpoint to go on from."""
    listed = {name: [job.to_json(), start] for name, (job, start) in cases.items()}
    (out / "cases.json").write_text(json.dumps(listed))
    torchrun(ranks, __file__, out, timeout_s=1500)
    return {name: [Step(**step) for step in json.loads((out / f"{name}.json").read_text())] for name in cases}


def assert_near(ours: list[Step], wanted: list[Step], tolerance: float, first: int = 1) -> None:
    """Losses, held-out losses and gradient norms of the steps from `first` on."""
    wanted = wanted[first - 1 :]
    assert [step.step for step in ours] == [step.step for step in wanted]
    for one, other in zip(ours, wanted, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=tolerance), one.step
        assert one.eval_loss == pytest.approx(other.eval_loss, abs=tolerance), one.step
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=tolerance), one.step
        assert (one.tokens, one.trained_tokens, one.epoch) == (other.tokens, other.trained_tokens, other.epoch)
        assert one.expert_load_mean == pytest.approx(other.expert_load_mean, rel=2e-2)  # of a token on the brink


def main(out: Path) -> None:
    with joined(read_place(os.environ), "cpu", group=True) as world:
        for name, (fields, start) in json.loads((out / "cases.json").read_text()).items():
            steps, _ = take_steps(Job.from_json(fields), out / name, world, Path(start) if start else None)
            if world.first:
                (out / f"{name}.json").write_text(json.dumps([dataclasses.asdict(step) for step in steps]))
            world.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The loop: it learns, it stops and goes on exactly, it keeps what is good and says what is not."""

import dataclasses
import json
import math
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from gptoss_launch.parallel.errors import CheckError, UserError
from gptoss_launch.parallel.training import gate
from gptoss_launch.parallel.training.checkpoints import read_values
from gptoss_launch.parallel.training.job import Job, Recipe, check_resumable, read_job, write_job
from gptoss_launch.parallel.training.loop import Step, train
from gptoss_launch.parallel.training.samples import Sample, sample
from gptoss_launch.parallel.training.saves import save, saves
from gptoss_launch.parallel.training.trainee import Trainee, load_trainee
from gptoss_launch.parallel.training.world import ALONE
from safetensors.torch import load_file, save_file
from small_models import SPECS, checkpoint, prompt

NAME = "three_blocks"
RECIPE = Recipe(2e-2, "cosine", 0.1, 0.1, 0.9, 0.95, 0.0, 1.0)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(
        model="small",
        checkpoint=str(checkpoint(NAME, tmp_path_factory.mktemp("checkpoints"))),
        spec=SPECS[NAME],
        mode="lora",
        attention_rank=4,
        attention_alpha=8,
        expert_rank=2,
        expert_alpha=4,
        dtype="fp32",
        device="cpu",
        sequence_tokens=64,
        packs_per_step=2,
        steps=6,
        recipe=RECIPE,
        seed=1,
        data="",
        weights=(1.0,),
        save_every=2,
        keep_last=2,
        eval_every=3,
        check_first_loss=False,
    )


SAMPLES = [
    sample(prompt(SPECS[NAME], length, seed=9), [0, *[1.0] * (length - 1)]) for length in (12, 20, 9, 31, 16, 25)
]


def begun(job: Job, folder: Path) -> Trainee:
    found = saves(folder)
    return load_trainee(job, ALONE, found[-1][1] if found else None, lambda done, total: None)


def run(job: Job, folder: Path, stop_after: int | None = None, samples: list[Sample] = SAMPLES) -> list[Step]:
    """Steps that were taken; `stop_after` ends the run as a signal would."""
    folder.mkdir(exist_ok=True)
    taken: list[Step] = []
    finished = train(
        job,
        folder,
        ALONE,
        begun(job, folder),
        samples,
        samples[:2],
        lambda: stop_after is not None and len(taken) + 1 == stop_after,
        taken.append,
        lambda line: None,
    )
    assert finished == (stop_after is None)
    return taken


def same(a: Step, b: Step) -> bool:
    """Equal in all that is no measurement of this machine."""
    blank = dict.fromkeys(("step_s", "tokens_per_s", "memory_bytes"), 0)
    return dataclasses.replace(a, **blank) == dataclasses.replace(b, **blank)


def killed_run(job: Job, folder: Path, at: int) -> None:
    """Dies while it reports step `at`, before that is saved."""

    def die(step: Step) -> None:
        if step.step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job, folder, ALONE, begun(job, folder), SAMPLES, SAMPLES[:2], lambda: False, die, print)


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_run_without_a_stop_bit_for_bit(job: Job, mode: str, tmp_path: Path) -> None:
    job = dataclasses.replace(job, mode=mode)
    whole = run(job, tmp_path / "whole")
    parts = run(job, tmp_path / "parts", stop_after=3)
    killed_run(job, tmp_path / "parts", at=4)
    parts += run(job, tmp_path / "parts")
    assert [step.step for step in whole] == [1, 2, 3, 4, 5, 6] and all(map(same, whole, parts))
    assert whole[-1].loss < 0.8 * whole[0].loss
    assert [step.eval_loss is not None for step in whole] == [False, False, True, False, False, True]
    ends = [saves(tmp_path / name)[-1][1] for name in ("whole", "parts")]
    values, others = (read_values(job, end) for end in ends)
    assert all(torch.equal(values[name], others[name]) for name in values)
    files = [path.name for path in ends[0].iterdir()]
    assert "optimizer-layers.0.safetensors" in files and sorted(files) == sorted(
        path.name for path in ends[1].iterdir()
    )
    for file in files:
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes()


def test_the_last_checkpoints_are_kept_whole(job: Job, tmp_path: Path) -> None:
    (tmp_path / ".half-00000002").mkdir(parents=True)  # of a run that was killed while it wrote
    run(job, tmp_path)
    assert [step for step, _ in saves(tmp_path)] == [4, 6]
    assert not list(tmp_path.glob(".half*"))


@pytest.mark.parametrize(
    ("mode", "files"),
    [
        ("lora", ("state.json", "adapter_config.json", "adapter_model.safetensors", "optimizer-layers.1.safetensors")),
        ("full", ("state.json", "parameters-embed.safetensors", "optimizer-head.safetensors")),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named_and_the_one_before(
    job: Job, mode: str, files: tuple[str, ...], tmp_path: Path
) -> None:
    job = dataclasses.replace(job, mode=mode, steps=2, save_every=1, packs_per_step=1)
    run(job, tmp_path)
    (_, before), (_, last) = saves(tmp_path)
    for file in files:
        data = (last / file).read_bytes()
        for spoilt in (None, b"", data[: len(data) // 2]):
            (last / file).unlink() if spoilt is None else (last / file).write_bytes(spoilt)
            with pytest.raises(UserError, match="is not whole") as caught:
                begun(job, tmp_path)
            assert str(last) in caught.value.message and f"{before} is the one before" in caught.value.hint
            (last / file).write_bytes(data)
    moments = load_file(last / "optimizer-layers.0.safetensors")
    of_another = {name: tensor.flatten()[:3].clone() for name, tensor in moments.items()}
    save_file(of_another, last / "optimizer-layers.0.safetensors")
    with pytest.raises(UserError, match=r"is not whole: moments of layers.0.* are \[3\], wanted"):
        begun(job, tmp_path)


def test_packs_of_a_step_count_by_their_tokens(job: Job, tmp_path: Path) -> None:
    """One pack with all samples, or several with few of them: the same loss and gradient."""
    one_step = dataclasses.replace(job, steps=1, save_every=0, packs_per_step=8)
    first = run(dataclasses.replace(one_step, sequence_tokens=128), tmp_path / "one")
    second = run(dataclasses.replace(one_step, sequence_tokens=32), tmp_path / "many")
    assert first[0].tokens == second[0].tokens == sum(map(len, SAMPLES))
    assert first[0].loss == pytest.approx(second[0].loss, rel=1e-6)
    assert first[0].grad_norm == pytest.approx(second[0].grad_norm, rel=1e-5)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(job: Job, tmp_path: Path) -> None:
    run(job, tmp_path, stop_after=2)
    trainee = begun(job, tmp_path)
    kept = saves(tmp_path)[-1][1]
    before = (kept / "adapter_model.safetensors").read_bytes()
    broken = dataclasses.replace(trainee.model, norm_H=trainee.model.norm_H * float("nan"))
    with pytest.raises(CheckError, match="step 3: loss nan") as caught:
        train(
            job,
            tmp_path,
            ALONE,
            dataclasses.replace(trainee, model=broken),
            SAMPLES,
            [],
            lambda: False,
            lambda step: None,
            lambda line: None,
        )
    assert str(kept) in caught.value.hint and caught.value.exit_code == 4
    assert saves(tmp_path)[-1][1] == kept and (kept / "adapter_model.safetensors").read_bytes() == before


def test_a_held_out_loss_that_is_no_number_stops_before_a_checkpoint_is_written(job: Job, tmp_path: Path) -> None:
    """The update of a step may be what spoils the weights."""
    job = dataclasses.replace(job, steps=2, save_every=1, eval_every=2)
    taken: list[Step] = []
    spoilt = [sample(SAMPLES[0].tokens, [0, *[math.inf] * (len(SAMPLES[0]) - 1)])]
    with pytest.raises(CheckError, match="step 2: loss nan on held-out data") as caught:
        train(job, tmp_path, ALONE, begun(job, tmp_path), SAMPLES, spoilt, lambda: False, taken.append, print)
    ((step, kept),) = saves(tmp_path)
    assert step == 1 and str(kept) in caught.value.hint and [one.step for one in taken] == [1]


def test_the_first_loss_of_random_weights_stops(job: Job, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"near ln\(vocabulary\) 6.93"):
        run(dataclasses.replace(job, check_first_loss=True), tmp_path)
    assert not saves(tmp_path)


def test_the_first_loss_is_compared_with_the_pass_that_serves(job: Job) -> None:
    gate.check_first_loss(2.0, 1.9, 1024)
    gate.check_first_loss(2.0, None, 1024)
    with pytest.raises(CheckError, match="over 2 x the 0.90 of the pass that serves"):
        gate.check_first_loss(2.0, 0.9, 1024)


def test_the_first_loss_is_of_something_that_is_learnt() -> None:
    short = sample(range(600), [0.0] * 511 + [0.5] + [0.0] * 88)
    long = sample(range(2000), [0.0] * 1500 + [1.0] * 500)
    for samples, first, learnt, weight in (([long, short], 0, 510, 0.5), ([long], 1244, 255, 256.0)):
        document = gate.first_document(samples, torch.device("cpu"))
        assert (document.tokens_T[0], len(document.tokens_T), document.learnt_R[0]) == (first, gate.TOKENS, learnt)
        assert document.weight == weight


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, lambda folder: ["a"] if (folder / "a").write_text("x") else [], 10, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(9, 0, 9))
    with pytest.raises(UserError, match="a checkpoint takes 10 B, 9 B are free"):
        save(tmp_path, 2, lambda folder: pytest.fail("written"), 10, 1)
    assert [step for step, _ in saves(tmp_path)] == [1]


def test_a_run_goes_on_only_as_it_was(job: Job, tmp_path: Path) -> None:
    write_job(tmp_path, job)
    assert read_job(tmp_path) == job
    check_resumable(read_job(tmp_path), dataclasses.replace(job, save_every=7, keep_last=1), tmp_path)
    hotter = dataclasses.replace(job, recipe=dataclasses.replace(RECIPE, learning_rate=1.0))
    with pytest.raises(UserError, match="learning_rate=0.02, not 1.0"):
        check_resumable(read_job(tmp_path), hotter, tmp_path)
    (tmp_path / "job.json").write_text(json.dumps({"model": "x"}))
    with pytest.raises(UserError, match="no readable job.json"):
        read_job(tmp_path)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_and_falls(schedule: str) -> None:
    recipe = dataclasses.replace(RECIPE, schedule=schedule, learning_rate=1.0, warmup_fraction=0.1)
    rates = [recipe.rate(step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    middle = {"cosine": 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2, "linear": 0.55, "constant": 1.0}[schedule]
    assert recipe.rate(55, 100) == pytest.approx(middle)

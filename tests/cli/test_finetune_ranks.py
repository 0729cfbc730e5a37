"""`finetune` with several ranks: who says what, how it ends, and that the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gptoss_launch.launch.cli import run as run_command
from gptoss_launch.launch.commands import finetune
from gptoss_launch.launch.finetune_settings import DEEPSPEED, FinetuneSettings, load_finetune_settings, read_deepspeed
from gptoss_launch.launch.finetune_torchrun import ended, torchrun_line
from gptoss_launch.parallel.errors import RankDiedError, UserError
from gptoss_launch.parallel.planning.zero import Zero, read_zero
from gptoss_launch.parallel.training.place import Place, read_place
from small_models import TINY, checkpoint


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ({1: 75}, 75),
        ({0: 7, 1: 2}, 2),  # rank 0 only lost the other
        ({0: 75, 1: 75}, 75),
        ({0: -15, 1: 75}, 75),  # torchrun ends the others when the first has stopped
        ({0: -15, 1: 4}, 4),
        ({0: 4}, 4),
    ],
)
def test_a_run_ends_as_the_rank_that_ended_it(codes: dict[int, int], wanted: int) -> None:
    assert ended(codes) == wanted


@pytest.mark.parametrize(
    ("codes", "said"),
    [({0: 7, 1: -9}, "rank 1 was ended by SIGKILL"), ({2: 3}, "rank 2 ended with exit code 3"), ({0: 7}, "rank 0")],
)
def test_a_rank_that_died_is_named(codes: dict[int, int], said: str) -> None:
    with pytest.raises(RankDiedError, match=said):
        ended(codes)


def test_a_rank_is_what_torchrun_says() -> None:
    assert read_place({}) is None
    assert read_place({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}) == Place(9, 16, 1)
    settings = load_finetune_settings(None, ["mode=full"])
    assert (settings.with_ranks(16).world_size, settings.with_ranks(16).deepspeed) == (16, "zero3")
    assert settings.with_ranks(None) == load_finetune_settings(None, ["mode=full", "ranks=1"])
    with pytest.raises(UserError, match="ranks=8, and torchrun started 16"):
        load_finetune_settings(None, ["ranks=8"]).with_ranks(16)
    with pytest.raises(UserError, match="optimizer=adamw8bit with deepspeed=zero2"):
        load_finetune_settings(None, ["deepspeed=zero2", "optimizer=adamw8bit"]).with_ranks(None)
    assert torchrun_line(8, ["finetune", "run=a b"]).startswith("torchrun --nnodes 1 --nproc-per-node 8 ")
    assert torchrun_line(8, ["finetune", "run=a b"]).endswith(" -m gptoss_launch.launch finetune 'run=a b'")


def test_every_configuration_of_deepspeed_is_one_that_is_honoured() -> None:
    found = {
        path.stem: read_zero(read_deepspeed(path.stem, "fp32"), "fp32") for path in (TINY.parent / DEEPSPEED).iterdir()
    }
    assert found == {
        "zero0": Zero(0, 0.0, False),
        "zero1": Zero(1, 0.0, False),
        "zero1-offload": Zero(1, 1.0, False, pinned=True),
        "zero2": Zero(2, 0.0, False),
        "zero2-offload": Zero(2, 1.0, False, pinned=True),
        "zero3": Zero(3, 0.0, False),
        "zero3-offload": Zero(3, 1.0, False, pinned=True),
        "zero3-offload-part": Zero(3, 0.4, False),
        "zero3-offload-all": Zero(3, 1.0, True, pinned=True),
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"optimizer": {"type": "Lion"}}, "optimizer is not taken from it"),
        ({"train_batch_size": 8}, "train_batch_size is not taken from it"),
        ({"fp16": {"enabled": True}}, "fp16 cannot be used"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, and dtype=fp32"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel cannot be used"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4"),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["GptOssMLP"]}}}, "leaf_module cannot be used"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size cannot be used"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights cannot be used"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param with stage 2"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer with stage 0"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "device is 'nvme'"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "ratio with stage 2",
        ),
    ],
)
def test_what_a_configuration_cannot_have_is_named(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        read_deepspeed(str(path), "fp32")
    assert said in caught.value.message and caught.value.hint


def test_what_is_off_or_automatic_is_no_wish() -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": 1, "mics_shard_size": -1, "zero_quantized_weights": False}
    config = {"fp16": {"enabled": False}, "bf16": {"enabled": "auto"}, "optimizer": "auto", "zero_optimization": zero}
    assert read_zero(config, "bf16") == Zero(3, 0.0, False)
    with pytest.raises(UserError, match="stage 0 with dtype=bf16"):
        read_zero({}, "bf16")
    with pytest.raises(UserError, match="did you mean zero3"):
        read_deepspeed("zero33", "fp32")


# --- real ranks


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()  # and its ranks end with it
        process.wait()


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        for one in environ:
            if one.startswith(b"RANK="):
                found[int(one[5:])] = int(pid)
    return found


def wait_until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    begun_s = time.monotonic()
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begun_s < 200
        time.sleep(0.05)


@pytest.mark.slow
def test_two_ranks_stop_die_and_go_on(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    model, folder = checkpoint("three_blocks", tmp_path), tmp_path / "run"
    steps = 40

    def start(run: Path) -> subprocess.Popen[str]:
        words = [f"model={model}", f"run={run}", f"steps={steps}", "packs_per_step=2", "sequence_tokens=256"]
        words += ["skip_bad_records=true", "save_every=4", "trackers=tensorboard", "first_loss=ignore"]
        command = [sys.executable, "-m", "gptoss_launch.launch", "finetune", "--config", "tiny-2ranks", *words]
        environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
        )
        return started[-1]

    def losses(run: Path) -> list[tuple[int, float]]:
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(step["step"], step["loss"]) for step in map(json.loads, lines)]

    # killed: the rank is named, the other ends, and what was saved stands
    process = start(folder)
    wait_until(lambda: len(losses(folder)) >= 5, process)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 7 and "error: rank 1 was ended by SIGKILL" in err and out == ""
    assert err.count("data: ") == 1 and not Path(f"/proc/{ranks[0]}").exists()

    # one rank gets a signal: all save once
    process = start(folder)
    wait_until(lambda: len(losses(folder)) >= 10, process)
    os.kill(ranks_of(process)[1], signal.SIGUSR1)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 75, err
    assert err.count("the same command goes on") == 1
    stopped = len(losses(folder))
    assert (folder / f"checkpoint-{stopped:08d}").exists() and stopped < steps

    # the command gets it: it passes it on by the stop file, which is gone afterwards
    process = start(folder)
    wait_until(lambda: len(losses(folder)) >= stopped + 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 75 and f"going on after step {stopped} of {steps}" in err
    assert not (folder / "stop").exists()

    # without a stop the losses are the same to the last bit
    for run in (folder, tmp_path / "whole"):
        process = start(run)
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        assert out.strip() == str(run / f"checkpoint-{steps:08d}")
        assert (run / "metrics.png").stat().st_size > 10_000
    assert losses(folder) == losses(tmp_path / "whole") and len(losses(folder)) == steps
    assert logged(folder / "tensorboard")["loss"][steps] == pytest.approx(losses(folder)[-1][1])


def logged(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: {one.step: one.value for one in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    """Data that only rank 0 reads."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    words = [f"run={tmp_path / 'run'}", f"data={broken}"]
    command = [sys.executable, "-m", "gptoss_launch.launch", "finetune", "--config", "tiny-2ranks", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2 and f"error: {broken}:1: no JSON" in done.stderr
    assert "rank 0 ended with exit code 2, and with it the run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("ranks=100000", "does not fit"),
        ("deepspeed=zero9", "did you mean zero3?"),
        ("dtype=fp16", "deepspeed with dtype=fp16"),
        ("model=nowhere", "no model 'nowhere'"),
        ("machine=h100", "machine=h100 is for --dry-run"),
        ("device=cuda", "has no GPU"),
    ],
)
def test_no_rank_is_started_for_what_cannot_be(
    word: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if word == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(finetune, "start_ranks", lambda *_: pytest.fail("started"))
    words = ["--config", "tiny-2ranks", f"run={tmp_path / 'run'}", "deepspeed=zero1", word]
    assert run_command(["finetune", *words]) in (2, 6)
    out, err = capsys.readouterr()
    assert said in err and out == "" and not (tmp_path / "run").exists()


def test_settings_that_need_torchrun() -> None:
    assert not FinetuneSettings().with_ranks(None).needs_torchrun
    assert load_finetune_settings(None, ["deepspeed=zero1"]).with_ranks(None).needs_torchrun

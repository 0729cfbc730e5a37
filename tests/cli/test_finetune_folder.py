"""The folder of a run: who may write to it, and what happens where it cannot be written or read."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from gptoss_launch.launch import finetune_rank
from gptoss_launch.launch.cli import run
from gptoss_launch.launch.finetune_folder import held, is_new, keep_metrics, make_folder
from gptoss_launch.launch.finetune_metrics import open_metrics
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.training import samples
from gptoss_launch.parallel.training.job import EVAL_FILE, METRICS_FILE, TRAIN_FILE, read_job, write_job
from gptoss_launch.parallel.training.saves import check_room
from safetensors import SafetensorError
from small_models import checkpoint


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A short run in tmp_path/run."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Yo"}) + "\n")
    model, data, folder = checkpoint("three_blocks", tmp_path), tmp_path / "data.jsonl", tmp_path / "run"
    words = [f"model={model}", f"data={data}", f"run={folder}", "device=cpu", "first_loss=ignore"]
    return ["finetune", *words, "steps=2", "packs_per_step=1", "sequence_tokens=128", "save_every=1"]


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_folder_that_cannot_be_written_is_named(
    ranks: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run([*command, f"run={tmp_path / 'file' / 'run'}", f"ranks={ranks}"]) == 2
    assert f"error: run={tmp_path / 'file' / 'run'}: Not a directory\nhint: " in capsys.readouterr().err


def test_one_run_at_a_time_writes_to_a_folder(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with held(folder):
        assert run(command) == 2
        assert f"run={folder}: another run writes to it" in capsys.readouterr().err
        assert is_new(folder)
    assert run([*command, "resume=never"]) == 0
    assert not is_new(folder)


def test_lines_of_steps_that_will_be_taken_again_and_a_cut_one_go(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6)]
    (tmp_path / METRICS_FILE).write_text("".join(lines)[:-9])
    keep_metrics(tmp_path, 5)
    assert (tmp_path / METRICS_FILE).read_text() == "".join(lines[:4])
    keep_metrics(tmp_path, 2)
    assert (tmp_path / METRICS_FILE).read_text() == "".join(lines[:2])
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_job_is_there_whole_or_as_it_was(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(command) == 0
    job = read_job(tmp_path / "run")

    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        with path.open("w") as file:
            file.write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_job(tmp_path / "run", job)
    assert read_job(tmp_path / "run") == job


@pytest.mark.parametrize("file", [TRAIN_FILE, EVAL_FILE])
def test_samples_that_cannot_be_read_are_named(
    file: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command) == 0
    path = tmp_path / "run" / file
    path.write_bytes(path.read_bytes()[:40])
    assert run(command) == 2
    path.unlink()
    assert run(command) == 2
    assert capsys.readouterr().err.count(f"{tmp_path / 'run'}: its samples cannot be read: ") == 2


def test_a_disk_without_room_for_a_checkpoint_is_said_before_the_first_step(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(9, 0, 9))
    assert run(command) == 2
    assert "a checkpoint takes 1.7 MiB, 9 B are free" in capsys.readouterr().err
    assert is_new(tmp_path / "run")


def test_what_an_earlier_process_left_makes_room_first(tmp_path: Path) -> None:
    (tmp_path / ".half-00000003").mkdir()
    (tmp_path / ".half-job.json").touch()  # not of a checkpoint
    with pytest.raises(UserError, match="a checkpoint takes"):
        check_room(tmp_path, 1 << 60)
    assert [path.name for path in tmp_path.iterdir()] == [".half-job.json"]


def test_a_disk_that_is_full_is_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(samples, "write_samples", full)
    assert run(command) == 2
    assert f"error: {tmp_path / 'run'}: no space is left on its disk\nhint: " in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(finetune_rank, "make_job", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # any other mistake keeps its traceback
        run(command)


def test_data_to_measure_on_that_holds_nothing_is_named(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert run([*command, f"eval_data={tmp_path / 'empty.jsonl'}"]) == 2
    assert f"eval_data {tmp_path / 'empty.jsonl'}: nothing in it to measure on\nhint: " in capsys.readouterr().err


def test_tensorboard_shows_a_step_that_is_taken_again_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # killed after step 3, when 2 was saved
        with open_metrics(tmp_path, ["tensorboard"], {"device": "cpu"}, done) as metrics:
            for step in steps:
                metrics.log({"step": step, "loss": 1.0 / step})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [one.step for one in events.Scalars("loss")] == [1, 2, 3, 4]


def test_stdout_is_the_checkpoint_alone(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever libraries print."""
    monkeypatch.setattr(finetune_rank, "plot", lambda run: print("built successfully"))
    assert run(command) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'run' / 'checkpoint-00000002'}\n" and "built successfully" in err


def test_a_folder_is_made(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    assert is_new(tmp_path / "a" / "b") and is_new(tmp_path / "c")

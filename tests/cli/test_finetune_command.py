"""`finetune`: settings, plan, preview, and a whole run that a signal stops and the same command finishes."""

import json
import os
import shutil
import signal
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from gptoss_launch.launch import extras
from gptoss_launch.launch.cli import run
from gptoss_launch.launch.finetune_rank import stop_signals
from gptoss_launch.launch.finetune_settings import PRESETS, FinetuneSettings, load_finetune_settings, read_deepspeed
from gptoss_launch.launch.records import Source
from gptoss_launch.launch.resolve import tiny_folder
from gptoss_launch.launch.settings import preset_names
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning.memory import Device
from gptoss_launch.parallel.planning.spec import PUBLISHED
from gptoss_launch.parallel.planning.training import (
    ZERO_SLACK,
    Share,
    TrainingMemory,
    all_values,
    lora_values,
    training_memory,
)
from gptoss_launch.parallel.planning.zero import Zero, read_zero
from small_models import checkpoint

MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "training_H200_2026-11-28.json"


def test_words_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    (tmp_path / "beside.jsonl").write_text("")
    path.write_text("model: tiny\ndata: [beside.jsonl, {source: hub/name, weight: 2}]\nlearning_rate: 1e-3\nsteps: 5\n")
    settings = load_finetune_settings(str(path), ["steps=7", "loss={analysis: 0}", "targets=attention", "date=none"])
    assert settings.data == (Source(str(tmp_path / "beside.jsonl")), Source("hub/name", weight=2.0))
    assert (settings.learning_rate, settings.steps, settings.targets) == (1e-3, 7, ("attention",))
    assert settings.loss == {"analysis": 0, "commentary": 1, "final": 1} and settings.date is None
    assert load_finetune_settings(None, []) == FinetuneSettings()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["lerning_rate=1"], "unknown key 'lerning_rate'; did you mean learning_rate?"),
        (["steps"], "'steps' is no setting; write key=value"),
        (["steps=0"], "steps: 0 is no whole number from 1"),
        (["steps=1.5"], "steps: 1.5 is no whole number"),
        (["learning_rate=fast"], "learning_rate: 'fast' is no number"),
        (["learning_rate=.nan"], "learning_rate: nan is no number"),
        (["loss={anlysis: 1}"], "loss: unknown channel 'anlysis'; did you mean analysis?"),
        (["loss={analysis: 0, commentary: 0, final: 0}"], "loss: no channel counts"),
        (["targets=[router]"], "targets: 'router' is none of attention, experts"),
        (["skip_bad_records=1"], "skip_bad_records: 1 is neither true nor false"),
        (["data={sorce: x}"], "data: {'sorce': 'x'} names no data"),
        (["date=tomorrow"], "date: 'tomorrow' is no date"),
        (["date=2025-08-05 10:00:00"], "is no date such as"),
        (["beta1=1"], "beta1: 1 is no number from 0 to 0.999999999"),
        (["beta2=1.0"], "beta2: 1.0 is no number"),
        (["expert_alpha=0"], "expert_alpha: 0 is no number from 1e-06"),
        (["seed=99999999999999999999"], "seed: 99999999999999999999 is no whole number up to 9223372036854775807"),
        (["steps=["], "no YAML"),
    ],
)
def test_wrong_words_name_the_key_and_the_near_match(words: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        load_finetune_settings(None, words)
    assert all(part in str(caught.value) for part in named.split("; "))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("preset", "machine"),
    [
        ("tiny", "laptop-8gb"),
        ("tiny-full", "h100"),
        ("20b-12gb", "rtx3060"),
        ("20b-16gb", "rtx4080"),
        ("20b-24gb", "rtx3090"),
        ("20b-80gb", "h100"),
        ("120b-80gb", "h100"),
        ("tiny-2ranks", "laptop-8gb"),
        ("20b-h200x2", "h200x2"),
        ("20b-h100x8", "h100x8"),
        ("20b-full-h200x2", "h200x2"),
        ("20b-full-h100x8", "h100x8"),
        ("120b-h200x2", "h200x2"),
        ("120b-h100x8", "h100x8"),
    ],
)
def test_every_preset_fits_its_machine(preset: str, machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["model=tiny"] if preset == "tiny-full" else []  # it begins with random weights, which do not ship
    assert run(["finetune", "--config", preset, "--dry-run", f"machine={machine}", *model]) == 0
    out, err = capsys.readouterr()
    assert err == "" and f"finetune --config {preset}" in " ".join(out.split())
    ranks = {"2ranks": 2, "h200x2": 2, "h100x8": 8}.get(preset.rpartition("-")[2])
    assert (f"torchrun --nnodes 1 --nproc-per-node {ranks} " in " ".join(out.split())) == (ranks is not None)
    for part in ("weights", "trained values", "gradients", "AdamW", "host memory", "a checkpoint", "a step", "time"):
        assert part in out


def test_hours_follow_from_steps_and_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """989 TFLOP/s, of which 17 % are 168; a token of 20b's adapters in a context of 8,192 takes some 16.1 GFLOP."""
    command = ["finetune", "--config", "20b-80gb", "--dry-run", "machine=h100", "sequence_tokens=8192"]
    assert run([*command, "steps=1000", "packs_per_step=4"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("time"))
    hours, tokens_per_s = (
        float(line.split("at most ")[1].split()[0]),
        float(line.split("(")[1].split()[0].replace(",", "")),
    )
    assert hours == pytest.approx(1000 * 4 * 8192 / tokens_per_s / 3600, rel=0.05)
    assert tokens_per_s == pytest.approx(0.17 * 989e12 / 16.1e9, rel=0.02)
    assert run(command) == 0
    assert "hours a million tokens" in capsys.readouterr().out
    assert run(["finetune", "--config", "tiny", "--dry-run", "machine=laptop-8gb"]) == 0
    assert "not known: no peak of" in capsys.readouterr().out


def test_brackets_of_a_command_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A list of files begins like a closing tag of rich's markup, and `:x:` like the name of an emoji."""
    words = ["data=[/a:x:/one.jsonl,/a/two.jsonl]", "targets=[experts]"]
    assert run(["finetune", "--config", "tiny", "--dry-run", "machine=laptop-8gb", *words]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert all(word in shown for word in words)


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["finetune", "--help"]) == 0
    lines = capsys.readouterr().out.split("Settings:")[1].splitlines()
    assert {line.split()[0] for line in lines if line.strip()} >= {one.name for one in fields(FinetuneSettings)}
    assert any("learning_rate" in line and "[0.0001]" in line for line in lines)


def test_presets_are_those_that_are_tested() -> None:
    marks = test_every_preset_fits_its_machine.pytestmark
    assert set(preset_names(PRESETS)) == {preset for preset, _ in marks[0].args[1]}


def test_what_does_not_fit_says_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["finetune", "--config", "20b-80gb", "--dry-run", "machine=h100", "mode=full"]) == 6
    err = capsys.readouterr().err
    assert "does not fit cuda of h100: short by " in err and "\ntried: ranks 1\n" in err
    words = ["ranks=2", "machine=h200x2", "mode=full"]
    assert run(["finetune", "--config", "20b-80gb", "--dry-run", *words, "deepspeed=zero3-offload-all"]) == 6
    assert "does not fit the host memory of h200x2: short by " in capsys.readouterr().err
    assert run(["finetune", "--config", "20b-80gb", "--dry-run", "ranks=9", "machine=h100x8"]) == 2
    assert "ranks=9, and h100x8 has 8 GPUs" in capsys.readouterr().err


def test_a_gpu_too_old_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["finetune", "--config", "20b-12gb", "--dry-run", "machine=gtx1080ti", "host_layers=13"]) == 2
    assert "device=cuda, and NVIDIA GeForce GTX 1080 Ti is sm_61" in capsys.readouterr().err


def test_a_small_gpu_is_told_how_many_layers_may_wait_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", "--config", "20b-12gb", "--dry-run", "machine=rtx3060"]
    assert run([*command, "host_layers=0"]) == 6
    hint = capsys.readouterr().err.split("hint: host_layers=")[1]
    enough = int(hint.split()[0])
    assert run([*command, f"host_layers={enough - 1}"]) == 6
    assert run([*command, f"host_layers={enough}"]) == 0
    assert f"the experts of {enough} layers" in " ".join(capsys.readouterr().out.split())
    assert run([*command, "sequence_tokens=131072"]) == 6
    assert "hint: lower sequence_tokens" in capsys.readouterr().err
    assert run([*command, "host_layers=24", "machine=laptop-8gb"]) == 6
    assert (
        "host memory of laptop-8gb: short" in (error := capsys.readouterr().err)
        and "hint: host_layers below 24" in error
    )
    assert run([*command, "host_layers=25"]) == 2
    assert "host_layers=25" in capsys.readouterr().err


def test_published_memory_targets_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """Of one pack of 2,048 tokens: adapters of rank 32 in 24 GB, of which half are saved by 8 bits and bf16; of rank 16
    on attention alone in 16 GB."""
    small = PUBLISHED["openai/gpt-oss-20b"]
    values = lora_values(small, 32, 32)
    plain = training_memory(small, values, False, "bf16", "cuda", 2048, Share(), 32)
    less = training_memory(
        small, values, False, "bf16", "cuda", 2048, Share(optimizer="adamw8bit", adapter_dtype="bf16"), 32
    )
    attention = training_memory(small, lora_values(small, 16, 0), False, "bf16", "cuda", 2048, Share(), 0)
    assert attention.device_bytes <= 16e9
    assert plain.device_bytes <= 24e9 and less.device_bytes <= 20e9
    assert plain.device_bytes - less.device_bytes == values * (16 - 6)


def test_no_run_took_more_than_is_planned() -> None:
    """Of those that were measured on H200s, all of the device that was in use."""
    rows = json.loads(MEASURED.read_text("utf-8"))
    ranks = {"train-attention": (16, 0), "train-lora": (32, 32), "train-lora-120b": (32, 8)}
    assert len(rows) > 3
    for row in rows:
        spec = PUBLISHED[f"openai/gpt-oss-{row['model']}"]
        spec = replace(spec, layers=row["layers"], layer_kinds=spec.layer_kinds[: row["layers"]])
        full = row["bench"] == "train-full"
        attention, experts = (0, 0) if full else ranks[row["bench"]]
        values = all_values(spec) if full else lora_values(spec, attention, experts)
        assert values == row["trained_values"]
        zero = read_zero(read_deepspeed(row["deepspeed"], "bf16"), "bf16") if row["deepspeed"] else None
        share = Share(row["ranks"], zero, row["optimizer"], row["adapter_dtype"], row["host_layers"])
        planned = training_memory(spec, values, full, "bf16", "cuda", row["pack_tokens"], share, experts)
        assert 0.96 * planned.device_bytes < row["used_bytes"] <= planned.device_bytes, row["bench"]
        # resident pages of the checkpoint's files count in what was measured: more than all else where nothing waits
        assert (zero is not None and not zero.on_host) or row.get("host_bytes", 0) <= planned.host_bytes


def test_what_deepspeed_takes_besides_is_planned() -> None:
    """Buckets of 500 million gradients that no offload takes from a GPU, and the rounding of pinned memory."""

    def of(zero: Zero, device: Device = "cuda") -> TrainingMemory:
        spec = PUBLISHED["openai/gpt-oss-20b"]
        return training_memory(spec, lora_values(spec, 8, 0), False, "bf16", device, 2048, Share(2, zero))

    cases = ((Zero(1, 0.0, False), 4e9), (Zero(2, 0.0, False), 2e9), (Zero(3, 0.0, False), 1e9))
    for zero, buckets_bytes in cases:
        for one in (zero, replace(zero, on_host=1.0)):
            here = of(one)
            held_bytes = here.trained_bytes + here.gradients_bytes + here.moments_bytes
            slack_bytes = (ZERO_SLACK - 1) * held_bytes if zero.stage == 3 else 0
            more_bytes = here.gradients_bytes - of(one, "cpu").gradients_bytes
            assert buckets_bytes + 0.9 * slack_bytes <= more_bytes <= buckets_bytes + slack_bytes, zero
    values = lora_values(PUBLISHED["openai/gpt-oss-20b"], 8, 0) // 2
    unpinned, pinned = Zero(2, 1.0, False), Zero(2, 1.0, False, pinned=True)
    assert of(pinned).host_bytes - of(unpinned).host_bytes == 4 * values
    # sums of packs in fp32: of stages 1 and 2 on the device, of stage 3 where AdamW is
    first, second, third = (of(Zero(stage, 1.0, False), "cpu").gradients_bytes for stage in (1, 2, 3))
    assert first - second == 2 * 4 * values and 4 * values < second - third < 4.5 * values
    assert of(pinned, "cpu").host_bytes == of(unpinned, "cpu").host_bytes


def test_values_are_those_of_the_published_models() -> None:
    """facts of the architecture: parameters in all, and trained per unit of rank."""
    small, large = (PUBLISHED[f"openai/gpt-oss-{size}"] for size in ("20b", "120b"))
    assert (all_values(small), all_values(large)) == (20_914_757_184, 116_829_156_672)
    assert lora_values(small, 64, 64) == 739_639_296  # as printed by others for rank 64
    assert (lora_values(large, 1, 0), lora_values(large, 0, 1)) == (36 * 20_736, 36 * 128 * 14_400)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model"),
        (["model=tiny"], "no data"),
        (["model=tiny", "data=nowhere.jsonl"], "no run"),
        (["model=tiny", "data=nowhere.jsonl", "run=RUN", "device=cpu"], "nowhere.jsonl: not readable"),
        (
            ["model=tiny", "data={source: DATA, weight: 0.001}", "run=RUN", "device=cpu"],
            "1 epochs of the data take no sample: 1 samples, by weights 0.001",
        ),
        (["--config", "tiny", "run=RUN", "machine=h100"], "machine=h100 is for --dry-run"),
        (["--config", "tinny"], "--config tinny: not readable"),
        (["--config", "tiny", "run=/proc/run", "device=cpu"], "run=/proc/run: No such file or directory"),
        (["--config", "tiny", "run=/proc/run", "ranks=2", "device=cpu"], "run=/proc/run: No such file or directory"),
        (["--config", "tiny", f"run={__file__}/run", "device=cpu"], "run: Not a directory"),
    ],
)
def test_what_is_missing_is_said(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Yo"}) + "\n")
    places = {"RUN": tmp_path / "run", "DATA": tmp_path / "data.jsonl"}
    for name, place in places.items():
        arguments = [word.replace(name, str(place)) for word in arguments]
    assert run(["finetune", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data=nowhere.jsonl", "nowhere.jsonl: not readable"),
        ("deepspeed=zero9", "deepspeed=zero9: no such configuration"),
        ("model=nowhere", "no model 'nowhere'"),
    ],
)
def test_what_no_rank_could_do_starts_none(
    word: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: object())
    assert run(["finetune", "--config", "tiny", f"run={tmp_path / 'run'}", "ranks=2", "device=cpu", word]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {message}") and len(err.splitlines()) == 2  # once, with its hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "module"),
    [("trackers=wandb", "wandb"), ("trackers=[tensorboard]", "tensorboard"), ("optimizer=adamw8bit", "torchao")],
)
def test_what_is_not_installed_is_named(
    word: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == module else object())
    assert run(["finetune", "--config", "tiny", "run=nowhere", word]) == 2
    assert f"needs {module}" in capsys.readouterr().err and not Path("nowhere").exists()


def test_preview_prints_samples_with_their_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["finetune", "--config", "tiny", "--preview", "3"]) == 0
    out = capsys.readouterr().out
    data = tmp_path / "empty.jsonl"
    data.touch()
    assert run(["finetune", "--config", "tiny", f"data={data}", "--preview", "3"]) == 2
    assert f"data {data}: nothing in it to train on" in capsys.readouterr().err
    assert out.count("tokens,") == 3 and "assistant⟦<|channel|>analysis<|message|>" in out and "<|return|>⟧" in out


def test_preview_needs_the_tokenizer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder, and of the hub, whose cache has something else of the model: no weights are downloaded for it."""
    folder, cache = tmp_path / "folder", tmp_path / "cache"
    cache.mkdir()
    asked = []

    def download(model: str, **wanted: Any) -> str:
        asked.append((model, wanted))
        if wanted.get("local_files_only"):
            return str(cache)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder.mkdir()
    shutil.copy(tiny_folder() / "tokenizer.json", folder)
    shown = []
    for model in ("tiny", str(folder), "somebody/model"):
        assert run(["finetune", "--config", "tiny", f"model={model}", "--preview", "2"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] and shown == shown[:1] * 3
    only = {"allow_patterns": ["tokenizer.json"]}
    assert asked == [("somebody/model", {"local_files_only": True} | only), ("somebody/model", only)]
    assert run(["finetune", "--config", "tiny", "model=nobody", "--preview", "2"]) == 2
    assert "no model 'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_for_an_end(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with stop_signals() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
        assert ("Ctrl-C once more ends it at once" in capfd.readouterr().err) == (number == signal.SIGINT)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    model = checkpoint("three_blocks", tmp_path)
    words = [f"model={model}", f"run={folder}", "steps=8", "packs_per_step=1", "first_loss=ignore"]
    command = ["finetune", "--config", "tiny", *words]
    metrics = folder / "metrics.jsonl"

    over = threading.Event()

    def interrupt() -> None:
        while not over.wait(0.01):
            if metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert run(command) == 75
    finally:
        over.set()
        thread.join()
    assert "the same command goes on" in capsys.readouterr().err
    stopped = len(metrics.read_text().splitlines())
    assert 2 <= stopped < 8
    metrics.write_text(metrics.read_text() + json.dumps({"step": stopped + 1}) + "\n")  # of a step that was not saved
    assert run(command) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(folder / "checkpoint-00000008") and f"going on after step {stopped} of 8" in err
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert steps[-1]["eval_loss"] < steps[0]["loss"]
    assert run([*command, "steps=9"]) == 2
    assert "was begun with steps=8, not 9" in capsys.readouterr().err
    assert run([*command, "loss={final: 2}"]) == 2
    wanted = {"analysis": 1.0, "commentary": 1.0, "final": 1.0}
    assert f"was begun with loss={wanted}, not {wanted | {'final': 2.0}}\n" in capsys.readouterr().err
    assert run([*command, "resume=never"]) == 2

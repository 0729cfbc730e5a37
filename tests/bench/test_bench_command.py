"""`bench` as it is called: what goes to stdout and to files, what is refused, and tiny measured end to end."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gptoss_launch.launch import extras
from gptoss_launch.launch.bench.rows import About, make_row
from gptoss_launch.launch.bench.target import Room
from gptoss_launch.launch.cli import run
from gptoss_launch.launch.commands.bench import Asked, _check_room, floor_of, spec_of
from gptoss_launch.launch.resolve import make_plan
from gptoss_launch.launch.settings import Settings
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning.spec import PUBLISHED
from stub_server import Script, stub

CONTRACT = {
    *("engine", "version", "device", "model", "ranks", "ep", "batch", "prompt", "new", "prefill_tok_s", "decode_ms"),
    *("decode_tok_s", "ttft_ms", "roofline", "date"),
}
SMALL = ("--prompt", "12", "--new", "6", "--repeats", "1")


@pytest.fixture
def server() -> Iterator[str]:
    with stub(Script()) as url:
        yield url


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_server_is_measured(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert run(["bench", "decode", f"{server}/v1", "--batch", "1,3", *SMALL, "--ranks", "2", "--out", str(out)]) == 0
    stdout, stderr = capsys.readouterr()
    *cases, last = lines(stdout)
    assert last["rows"] == cases and last["ratios"] == [] and out.read_text() == stdout
    assert [(one["batch"], one["prompt"], one["new"], one["ranks"]) for one in cases] == [(1, 12, 6, 2), (3, 12, 6, 2)]
    for one in cases:
        assert set(one) >= CONTRACT and one["engine"] == "vllm" and one["version"] == "9.8.7"
        assert one["decode_ms"] > 0 and one["prefill_tok_s"] > 0 and one["ttft_ms"] > 0
        assert one["roofline"] is None and one["notes"] == [
            "no roofline: the architecture of 'some-model' is not known here"
        ]
    assert "vllm 9.8.7" in stderr and "note: vllm: no roofline" in stderr


def test_a_bar_in_the_terminal_and_lines_in_a_pipe(server: str) -> None:
    """What is drawn stays out of what programs read."""
    screen, inner = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "gptoss_launch.launch",
        "bench",
        "decode",
        server,
        "--batch",
        "2",
        "--prompt",
        "12",
    ]
    environment = os.environ | {"TERM": "xterm-256color"}
    process = subprocess.Popen([*command, "--new", "40"], stdout=subprocess.PIPE, stderr=inner, env=environment)
    os.close(inner)
    drawn = b""
    with contextlib.suppress(OSError):  # Linux's way to say that nobody writes any more
        while data := os.read(screen, 1 << 16):
            drawn += data
    os.close(screen)
    stdout, _ = process.communicate(timeout=60)
    row, last = lines(stdout.decode())
    assert process.returncode == 0 and last["rows"] == [row]
    assert b"vllm, decode, batch 2" in drawn and b'"rows"' not in drawn


def test_two_servers_in_turn(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "x.png"
    with stub(Script(owner="sglang")) as other:
        arguments = [
            "bench",
            "decode",
            server,
            "--compare",
            other,
            "--batch",
            "1,2",
            *SMALL,
            "--repeats",
            "3",
            "--plot",
            str(picture),
        ]
        assert run(arguments) == 0
    stdout, stderr = capsys.readouterr()
    *cases, last = lines(stdout)
    assert [(one["engine"], one["batch"]) for one in cases] == [("vllm", 1), ("sglang", 1), ("vllm", 2), ("sglang", 2)]
    first, second = last["ratios"]
    assert (first["batch"], first["engine"], first["against"]) == (1, "vllm", "sglang 9.8.7")
    wanted = cases[2]["decode_tok_s"] / cases[3]["decode_tok_s"]
    assert second["decode"] == pytest.approx(wanted, rel=1e-4)
    assert "batch 1: vllm against sglang 9.8.7: decode " in stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("load", "batch", "rate"), [(["--rate", "200"], None, 200.0), (["--batch", "4"], 4, None)], ids=["rate", "batch"]
)
def test_a_server_is_loaded(
    load: list[str], batch: int | None, rate: float | None, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--prompt", "12", "--new", "6", "--requests", "10", "--seed", "7"]
    assert run(["bench", "serve", server, *load, *sizes, "--json"]) == 0
    stdout, stderr = capsys.readouterr()
    row, last = lines(stdout)
    assert stderr == "" and last["rows"] == [row]
    assert (row["batch"], row["rate"], row["requests"], row["seed"]) == (batch, rate, 10, 7)
    assert set(row) >= CONTRACT and row["decode_tok_s"] > 0 and row["request_ms"] > row["ttft_ms"] and not row["failed"]


def test_prompts_of_a_server(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "prefill", server, "--batch", "2", "--prompt", "30", "--json"]) == 0
    row, _ = lines(capsys.readouterr().out)
    assert row["bench"] == "prefill" and row["prefill_tok_s"] > 0 and row["decode_ms"] is None


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["decode", "URL", "--profile"], "--profile looks into an engine that is started here", "name a checkpoint"),
        (["decode", "URL", "--dtype", "fp32"], "--dtype is for a checkpoint", "leave it out"),
        (["decode", "URL", "--batch", "0"], "'0' is no list of numbers from 1 to 4096, with commas", "--help"),
        (["decode", "URL", "--batch", "1,x"], "'1,x' is no list of numbers", "--help"),
        (["decode", "URL", "--prompt", "4090"], "4219 tokens a stream is more than the 4096", "a shorter --prompt"),
        (["decode", "URL", "--compare", "here"], "--compare 'here' is no URL", "start that server first"),
        (["decode", "URL", "--out", "/no/such/x"], "--out /no/such/x: no such folder", "existing folder"),
        (["serve", "URL", "--rate", "1", "--batch", "1"], "--rate and --batch are two ways", "leave one of them out"),
        (["serve", "URL", "--rate", "0"], "'0' is no list of numbers", "--help"),
        (["decode", "tinny"], "no model 'tinny'", "did you mean tiny?"),
        (["decode", "http://127.0.0.1:1"], "http://127.0.0.1:1/v1/models: ", "is it the URL of a running server?"),
        (["decode"], "Missing argument 'TARGET'", "--help"),
        (["decod", "URL"], "decod", "--help"),
    ],
)
def test_wrong_input(
    arguments: list[str], message: str, hint: str, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *(server if one == "URL" else one for one in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and hint in err and "Traceback" not in err
    assert err.startswith("error: ")


def test_a_missing_matplotlib_is_said_before_anything_is_measured(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert run(["bench", "decode", server, *SMALL, "--plot", str(tmp_path / "x.png")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == ("error: bench --plot needs matplotlib\nhint: pip install 'gptoss-launch[plot]'\n")


def test_a_plan_that_runs_fewer_streams_is_said() -> None:
    class Target:
        room = Room(4096, 8)
        about = About("ours", "1", "m", "r")

    asked = Asked("decode", (1, 32), (), 10, 10, 1, 1, 0)
    with pytest.raises(UserError, match="--batch 32 is more than the 8 sequences.*\nhint: --sequences 32"):
        _check_room(asked, Target())  # type: ignore[arg-type]


def test_the_floor_of_a_row() -> None:
    """Ours by the plan; a server's by the model's name, in bf16 over the ranks that were told."""
    plan = make_plan("openai/gpt-oss-20b", Settings(machine="h200", ranks=1, dp=1), need_weights=False)
    figures = {"prompt": 1024, "new": 127, "batch": 1, "decode_ms": 1.66}
    ours = make_row("decode", About("gptoss-launch", "1", "20b", "r", device="NVIDIA H200", ranks=1), **figures)
    floor = floor_of(ours, plan, "", ours=True)
    assert not isinstance(floor, str) and floor.kv_bytes == (12 * 1088 + 12 * 128) * 2048
    assert floor.share(1.66e-3) == pytest.approx(0.5, abs=0.01)
    peer = make_row("decode", About("vllm", "1", "ckpt", "r", device="NVIDIA H200", ranks=2), **figures)
    assert floor_of(peer, None, "/ckpt", ours=False) == "the architecture of '/ckpt' is not known here"
    beside = floor_of(peer, plan, "/ckpt", ours=False)
    assert not isinstance(beside, str) and beside.read_bytes == pytest.approx(floor.read_bytes / 2, rel=0.01)
    assert spec_of("openai/gpt-oss-120b") == PUBLISHED["openai/gpt-oss-120b"]
    assert spec_of("tiny").layers == 4 and spec_of("somebody/elses") is None


def test_help_says_what_is_measured_and_loads_no_torch() -> None:
    program = (
        "import sys; from gptoss_launch.launch.cli import run; code = run(['bench', 'decode', '--help']);"
        "print(code, *{'torch', 'matplotlib', 'msgpack'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    for word in ("--batch", "--compare", "--profile", "--plot", "--out", "t(1 + n)"):
        assert word in " ".join(done.stdout.split())


# --- the embedded model, end to end


def bench(*arguments: str, folder: Path) -> tuple[list[dict], str]:
    command = [sys.executable, "-m", "gptoss_launch.launch", "bench", *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("gptoss-*")), "the run folder is left"
    return lines(done.stdout), done.stderr


@pytest.mark.slow
def test_tiny_is_decoded_and_profiled(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    sizes = ("--batch", "2", "--prompt", "8", "--new", "6", "--repeats", "1", "--context", "256")
    (row, last), said = bench("decode", "tiny", *sizes, "--profile", "--out", str(out), folder=tmp_path)
    assert last["rows"] == [row] == lines(out.read_text())[:1]
    assert (row["engine"], row["model"], row["device"], row["ranks"], row["ep"]) == (
        "gptoss-launch",
        "tiny",
        "cpu",
        1,
        1,
    )
    assert (row["batch"], row["prompt"], row["new"]) == (2, 8, 6)
    assert row["decode_ms"] > 0 and row["ttft_ms"] > 0 and row["packages"]["torch"] and row["start_s"] > 0
    assert row["roofline"] is None and "no roofline: the bandwidth of cpu is unknown" in row["notes"]
    assert row["kernels"]["products"] > 0
    assert "us of kernels a step" in said and "note: gptoss-launch: no roofline" in said


@pytest.mark.slow
def test_tiny_is_served_under_load(tmp_path: Path) -> None:
    (row, _), _ = bench(
        *("serve", "tiny", "--rate", "4", "--requests", "4", "--prompt", "100", "--new", "4", "--context", "512"),
        folder=tmp_path,
    )
    assert (row["engine"], row["requests"], row["rate"], row["failed"]) == ("gptoss-launch", 4, 4.0, {})
    assert row["model"] == "tiny" and 90 <= row["prompt"] <= 110 and row["decode_tok_s"] > 0

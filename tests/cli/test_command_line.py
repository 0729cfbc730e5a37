"""The command line itself: fast, light, and wrong input answered with one line, a hint and an exit code."""

import os
import shlex
import subprocess
import sys
import time

import pytest
from gptoss_launch.launch.cli import COMMANDS, run

HEAVY = ("torch", "transformers", "safetensors", "triton", "huggingface_hub")
HELP_LIMIT_S = 0.4


def gptoss_launch(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "gptoss_launch.launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def loaded_by(*arguments: str) -> set[str]:
    """Top-level modules in memory after a command has run."""
    program = (
        "import sys; from gptoss_launch.launch.cli import run; code = run(sys.argv[1:]); "
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in (0, 3, 4, 5), done.stderr  # no controller answers; lint found something; no such job
    return set(done.stderr.split())


def test_help_is_fast() -> None:
    took_s = []
    for _ in range(5):  # the best of five: other work on this machine is not what is measured
        start = time.perf_counter()
        assert gptoss_launch("--help").returncode == 0
        took_s.append(time.perf_counter() - start)
    assert min(took_s) < HELP_LIMIT_S, took_s


def test_help_loads_nothing_and_lists_every_command() -> None:
    assert not loaded_by("--help") & {*HEAVY, "rich", "yaml", "pynvml"}
    listed = gptoss_launch("--help").stdout
    assert all(f"\n  {name} " in listed for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_no_torch(command: str) -> None:
    assert not loaded_by(command, "--help") & {*HEAVY, "rich", "yaml", "pynvml"}


@pytest.mark.parametrize("more", [(), ("--json",), ("--machine", "h100")])
def test_plan_loads_no_torch(more: tuple[str, ...]) -> None:
    assert not loaded_by("plan", "openai/gpt-oss-20b", "--host-memory", "40GiB", *more) & set(HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [
        ("submit", "serve", "--set", "run.model=tiny", "--render"),
        ("submit", "serve", "--set", "run.model=tiny", "--set", "run.machine=h100", "--render"),
        ("lint", "/dev/null"),
        ("jobs", "status", "1"),
    ],
)
def test_the_login_node_needs_no_torch(arguments: tuple[str, ...]) -> None:
    assert not loaded_by(*arguments) & set(HEAVY)


def test_version() -> None:
    done = gptoss_launch("--version")
    assert done.returncode == 0 and done.stdout.startswith("gptoss-launch ")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["plna"], "no command 'plna'", "did you mean plan? known: "),
        (["--verzion"], "no option --verzion", "did you mean --version?"),
        (["plan", "tiny", "--contxt", "8"], "no option --contxt", "did you mean --context?"),
        (["finetune", "--dry-rum"], "no option --dry-rum", "did you mean --dry-run?"),
        (["finetune", "--expert-rank", "8"], "no option --expert-rank", "a setting has no dashes: expert_rank=VALUE"),
        (["plan"], "Missing argument 'MODEL'", "gptoss-launch plan --help"),
        (["plan", "tiny", "--context"], "Option '--context' requires an argument", "gptoss-launch COMMAND --help"),
        (["plan", "tiny", "--context", "many"], "'--context': 'many' is no whole number", "gptoss-launch plan --help"),
        (["plan", "tiny", "--dtype", "int8"], "'int8' is none of bf16, fp16, fp32", "gptoss-launch plan --help"),
        (["plan", "tiny", "--gpu-memory", "lots"], "'lots' is no size", "gptoss-launch plan --help"),
        (["plan", "tiny", "twice"], "Got unexpected extra argument (twice)", "gptoss-launch plan --help"),
        (["plan", "tiny", "--machine", "h10"], "no machine 'h10'", "did you mean h100?"),
        (["plan", "tiny", "--config", "tinny"], "--config tinny: not readable", "did you mean tiny?"),
        (["plan", "tiyn"], "no model 'tiyn'", "did you mean tiny?"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    first, second, *rest = err.splitlines()
    assert out == "" and rest == []
    assert first.startswith("error: ") and message in first
    assert second.startswith("hint: ") and hint in second


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Usage: gptoss-launch")


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("gptoss_launch.launch.resolve.make_plan", fail)
    with pytest.raises(ZeroDivisionError):
        run(["plan", "openai/gpt-oss-20b"])


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m gptoss_launch.launch plan openai/gpt-oss-20b --machine h100 --json | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [("--help",), ("plan", "openai/gpt-oss-20b", "--machine", "h100")])
def test_output_that_cannot_be_written_is_one_line(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "gptoss_launch.launch", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert (
        done.stderr == "error: output cannot be written: No space left on device\nhint: make room, or write elsewhere\n"
    )


def test_a_closed_stdout_is_nobodys_fault() -> None:
    program = "exec " + shlex.join([sys.executable, "-m", "gptoss_launch.launch", "plan", "tiny"]) + " >&-"
    done = subprocess.run(["sh", "-c", program], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_locale_without_the_letter_gets_its_number() -> None:
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "gptoss_launch.launch", "finetune", "--config", "tiny", "--preview", "1"]
    done = subprocess.run(command, env=ascii_only, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "") and "\\u27e6" in done.stdout


def test_completion_says_nothing_but_what_completes() -> None:
    for words, wanted in (("gptoss-launch pl", "plan"), ("gptoss-launch plan --mach", "--machine"), ("x zzz --p", "")):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_GPTOSS_LAUNCH_COMPLETE": "bash_complete"}
        command = [sys.executable, "-m", "gptoss_launch.launch"]
        done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "") and wanted in done.stdout

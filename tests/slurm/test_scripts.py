"""Rendered batch scripts: whole files against golden ones, clean for shellcheck, and right for any value at all."""

import re
import subprocess
from pathlib import Path

import pytest
from gptoss_launch.launch.commands.bench import command as bench_command
from gptoss_launch.launch.slurm_lint import lint
from gptoss_launch.launch.slurm_options import read_option, sbatch_line
from gptoss_launch.launch.slurm_script import render_script
from gptoss_launch.launch.slurm_settings import KINDS, PAYLOAD_KEYS, Job, Kind, check_sections, make_job
from gptoss_launch.parallel.errors import UserError
from hypothesis import given, settings
from hypothesis import strategies as st

GOLDEN = Path(__file__).parent / "golden"

SECTIONS = {
    "serve": {
        "slurm": {"partition": "gpu", "gpus-per-node": "8", "time": "8:00:00"},
        "env": {"HF_HOME": "/shared/hf"},
        "run": {"model": "openai/gpt-oss-120b", "context": "32768", "api_key_file": "/home/me/key", "port": "8000"},
    },
    "finetune": {
        "slurm": {"nodes": "4", "gpus-per-node": "h100:8", "cpus-per-task": "96", "account": 'it\'s mine, "really"'},
        "env": {"NCCL_IB_HCA": "mlx5_0,mlx5_1"},
        "run": {
            **{"config": "lora-20b", "set": ["lora.rank=16", "data=/a folder/x.jsonl"], "setup": "/shared/setup.sh"},
            **{"container_image": "/images/gptoss.sif", "container_mounts": "/data:/data", "interface": "ib0"},
        },
    },
    "bench": {"run": {"what": "decode", "target": "openai/gpt-oss-20b", "batch": "1,8,32", "profile": "true"}},
    "preflight": {"slurm": {"nodes": "2", "exclude": "bad[1-3]"}},
}


def job_of(kind: Kind) -> Job:
    sections = {name: dict(section) for name, section in SECTIONS[kind].items()}
    sections.setdefault("run", {})["python"] = "/shared/venv/bin/python"
    check_sections(sections, kind, "test")
    return make_job(kind, [sections])


def script_of(kind: Kind) -> str:
    return render_script(job_of(kind), "/shared/runs/one", "0.0")


@pytest.mark.parametrize("kind", KINDS)
def test_golden(kind: Kind) -> None:
    """The whole file. Written anew by: python tests/slurm/write_golden.py"""
    assert script_of(kind) == (GOLDEN / f"{kind}.sbatch").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_shellcheck(kind: Kind) -> None:
    command = ["shellcheck", "--shell=bash", "-"]
    done = subprocess.run(command, input=script_of(kind), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_linter(kind: Kind) -> None:
    assert lint(script_of(kind), Path("/")) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_place_is_filled(kind: Kind) -> None:
    text = script_of(kind)
    assert not re.search(r"@[A-Z0-9_]+@", text)
    assert text.count("#SBATCH --signal=B:USR1@180\n") == 1 and "#SBATCH --open-mode=append\n" in text
    assert "--kill-on-bad-exit=1 --wait=60 --label" in text


# every key of run: that each bench takes
BENCHES = {
    "decode": {"batch": "1,8", "prompt": "16", "new": "8", "repeats": "2", "profile": "true"},
    "prefill": {"batch": "1,8", "prompt": "16", "repeats": "2"},
    "serve": {"rate": "0.5,4", "prompt": "16", "new": "8", "requests": "10"},
}
EVERY_BENCH = {"seed": "0", "ranks": "2", "compare": "http://127.0.0.1:1", "out": "/x.jsonl", "plot": "/x.png"}


@pytest.mark.parametrize("what", BENCHES)
def test_the_command_line_of_a_bench_is_what_bench_takes(what: str) -> None:
    """Parsed by the command itself; and no key is left out above."""
    payload = {"what": what, "target": "tiny"} | BENCHES[what] | EVERY_BENCH
    name, *words = make_job("bench", [{"run": payload}]).command
    assert name == "bench"
    context = bench_command.make_context("bench", words)
    sub = bench_command.get_command(context, what)
    assert sub is not None
    given = sub.make_context(what, words[1:]).params
    assert given["target"] == "tiny" and given["ranks"] == 2 and given["out"] == Path("/x.jsonl")
    assert given.get("profile", True) and (
        given["rates"] == (0.5, 4.0) if what == "serve" else given["batches"] == (1, 8)
    )
    taken = {"what", "target"} | set(EVERY_BENCH).union(*BENCHES.values())
    assert taken == set(PAYLOAD_KEYS["bench"])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"what": "serve", "repeats": "2"}, "run.repeats is not for bench serve"),
        ({"what": "prefill", "profile": "true"}, "run.profile is not for bench prefill"),
        ({"what": "decode", "rate": "2"}, "run.rate is not for bench decode"),
        ({"what": "decode", "batch": "1,x"}, "'1,x' is no list of numbers from 1 on"),
        ({"what": "serve", "rate": "0"}, "'0' is no list of numbers from 0.001 on"),
        ({"what": "decode", "new": "0"}, "'0' is no whole number from 1 on"),
    ],
)
def test_what_no_bench_takes_is_said_before_the_job_waits(run: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        sections = {"run": run | {"target": "tiny"}}
        check_sections(sections, "bench", "test")
        make_job("bench", [sections])


TEXTS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=30)
HOSTILE = st.one_of(TEXTS, st.text("'\"\\$`(){}[];&|<>#!~*?@ \n\t,=%aA", min_size=1, max_size=20))


@settings(max_examples=40, deadline=None)
@given(variable=HOSTILE, word=HOSTILE, image=HOSTILE, python=HOSTILE, config=HOSTILE)
def test_any_value_reaches_the_script_as_it_was(variable: str, word: str, image: str, python: str, config: str) -> None:
    """bash itself reads the values back."""
    run = {"config": config, "set": [f"k={word}"], "container_image": image, "python": python}
    script = render_script(make_job("finetune", [{"env": {"VALUE": variable}, "run": run}]), "/r", "0")
    assert subprocess.run(["bash", "-n"], input=script.encode(), check=False).returncode == 0
    head, mark, _ = script.partition("# --- the attempt")
    assert mark
    head += 'printf "%s\\0" "$VALUE" "$container_image" "$python" "${payload[@]}"\n'
    done = subprocess.run(["bash"], input=head.encode(), capture_output=True, check=True)
    read = done.stdout.decode().split("\0")[:-1]
    assert done.stderr == b""
    assert read == [variable, image, python, "finetune", "--config", config, f"k={word}"]


def sbatch_reads(line: str) -> list[str]:
    """The words of an #SBATCH line, as Slurm's _get_argument (src/sbatch/opt.c) takes them apart."""
    words: list[str] = []
    at = len("#SBATCH")
    while at < len(line):
        while at < len(line) and line[at].isspace():
            at += 1
        word, quote, escaped = "", "", False
        while at < len(line) and (quote or escaped or not line[at].isspace()):
            letter, at = line[at], at + 1
            if escaped:
                word, escaped = word + letter, False
            elif letter == "\\":
                escaped = True
            elif quote and letter == quote:
                quote = ""
            elif not quote and letter in "'\"":
                quote = letter
            elif not quote and letter == "#":
                return words
            else:
                word += letter
        words.append(word)
    return words


@given(HOSTILE)
def test_any_option_value_is_read_back_or_refused(value: str) -> None:
    try:
        text = read_option("job-name", value)
    except UserError:
        assert not value.isprintable()
        return
    line = sbatch_line("job-name", text)
    assert "\n" not in line and sbatch_reads(line) == [f"--job-name={value}"]


def test_a_value_that_looks_like_a_place_stays() -> None:
    script = render_script(make_job("preflight", [{"env": {"A": "@PYTHON@"}}]), "/r", "0")
    assert "\nexport A=@PYTHON@\n" in script

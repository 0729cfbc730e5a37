"""`submit` where there is no Slurm, or a fake one: what wins over what, what is refused, and what is written first."""

import json
import stat
from pathlib import Path

import pytest
import yaml

from .conftest import CommandLine

YAML = """\
slurm:
  partition: gpu
  time: 4:00:00
  exclusive: true
env:
  NCCL_IB_HCA: mlx5_0,mlx5_1
run:
  model: tiny
  port: 8000
"""


def program(folder: Path, name: str, text: str) -> None:
    """A program of Slurm's, in bash."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(YAML)
    return path


def sbatch_lines(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]


def test_render_without_slurm(command_line: CommandLine, config: Path, tmp_path: Path) -> None:
    done = command_line("submit", "serve", "--config", config, "--render")
    lines = sbatch_lines(done.stdout)
    assert {"partition=gpu", "time=4:00:00", "exclusive", "nodes=1", "requeue", "job-name=gptoss-serve"} <= set(lines)
    assert "\nexport NCCL_IB_HCA=mlx5_0,mlx5_1\n" in done.stdout and "\nserve_port=8000\n" in done.stdout
    assert "no sbatch on the PATH" in done.stderr and not (tmp_path / "runs").exists()
    assert "no api_key_file: whoever reaches" in done.stderr and "asks for no GPU" in done.stderr


def test_what_wins(command_line: CommandLine, config: Path, tmp_path: Path) -> None:
    """Command line > YAML > site file > defaults, key by key."""
    site = tmp_path / "config" / "gptoss-launch" / "site.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("slurm: {account: physics, partition: old, time: 9}\nenv: {A: site, B: site}\nrun: {python: /py}\n")
    flags = ["--time", "1:00", "-A", "chemistry", "--no-requeue", "--set", "env.B=flag", "--set", "run.port=8001"]
    script = command_line("submit", "serve", "--config", config, *flags, "--render").stdout
    lines = sbatch_lines(script)
    assert {"partition=gpu", "time=1:00", "account=chemistry", "no-requeue"} <= set(lines) and "requeue" not in lines
    assert "\nexport A=site\nexport B=flag\n" in script.replace("export NCCL_IB_HCA=mlx5_0,mlx5_1\n", "")
    assert "\npython=/py\n" in script and "\nserve_port=8001\n" in script and "\nmax_requeues=0\n" in script


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("slurn: {}", "unknown section 'slurn'", "did you mean slurm?"),
        ("slurm: {partion: gpu}", "slurm.partion: no sbatch option 'partion'", "did you mean partition?"),
        ("slurm: {gpus-per-task: 1}", "option gpus-per-task is not taken", "give gpus-per-node"),
        ("slurm: {array: 0-3}", "option array is not taken", "submit once for each"),
        ("slurm: {signal: USR1@60}", "option signal is not taken", "run.lead_s"),
        ("slurm: {requeue: perhaps}", "takes no value, not 'perhaps'", "requeue: true"),
        ('slurm: {job-name: "a\\nb"}', "cannot stand on an #SBATCH line", "printable"),
        ("slurm: {nodes: [1]}", "neither text nor a number", ""),
        ("slurm: {nodes: 2}\nrun: {model: tiny, engine: vllm}", "engine vllm serves on one node, not 2", "--nodes=1"),
        ("run: {model: tiny, nnodes: 2}", "unknown key 'nnodes'", "known:"),
        ("env: {HF_TOKEN: abc}", "env.HF_TOKEN: looks like a secret", "sbatch passes its environment on"),
        ("env: {A B: abc}", "no environment variable", ""),
        ("run: {modle: tiny}", "run.modle: unknown key 'modle'", "did you mean model?"),
        ("run: {model: tiny, port: many}", "run.port: 'many' is no whole number", ""),
        ("run: {model: tiny, host: a b}", "run.host: 'a b' is none", ""),
        ("run: {model: tiny, folder: 'a%j'}", "run.folder: 'a%j' has a line break, a backslash or a percent", ""),
        ("run: {model: tiny, rendezvous: etcd}", "'etcd' is none of static, c10d", ""),
        ("run: {model: --help}", "'--help' looks like an option", "./"),
        ("run: {}", "run.model is missing", "--set run.model="),
        ("run: [model]", "run: no mapping", ""),
        ("a: b: c", "no YAML", ""),
        (
            "{slurm: {nodes: 0}, run: {model: openai/gpt-oss-20b, machine: h100x8}}",
            "--nodes 0 leaves no node",
            "--nodes=1",
        ),
        ("slurm: {time: 1, nodes: 2, time: 3}", "key 'time' twice", ""),
    ],
)
def test_wrong_settings(command_line: CommandLine, tmp_path: Path, text: str, message: str, hint: str) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(text)
    done = command_line("submit", "serve", "--config", config, "--render", code=2)
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], lines
    assert hint in lines[-1] and done.stdout == ""


@pytest.mark.parametrize(
    ("run", "message", "hint"),
    [
        ("{config: nope}", "--config nope: not readable", "known: 120b-80gb"),
        ("{config: tiny, set: {stesp: 3}}", "unknown key 'stesp'", "did you mean steps?"),
        ("{config: tiny, set: {steps: -1}}", "steps: -1 is no whole number", "Steps of the optimizer"),
        ("{config: tiny}", "finetune: no run", "run=..."),
        ("{config: 20b-80gb, set: {run: /shared/a}}", "finetune: no data", "data=..."),
        ("{config: tiny, set: steps}", "'steps' is no list of key=value", "set: [steps=100]"),
    ],
)
def test_training_that_no_rank_would_begin(
    command_line: CommandLine, tmp_path: Path, run: str, message: str, hint: str
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(f"run: {run}\n")
    lines = command_line("submit", "finetune", "--config", config, "--render", code=2).stderr.splitlines()
    assert message in lines[-2] and hint in lines[-1]


def test_training_by_another_interpreter_is_its_own(command_line: CommandLine, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("run: {config: theirs, python: /opt/python}\n")
    assert "--config theirs" in command_line("submit", "finetune", "--config", config, "--render").stdout


def test_a_site_file_holds_no_keys_of_a_command(command_line: CommandLine, tmp_path: Path) -> None:
    site = tmp_path / "config" / "gptoss-launch" / "site.yaml"
    site.parent.mkdir(parents=True)
    site.write_text("run: {model: tiny}")
    assert "unknown key 'model'" in command_line("submit", "serve", "--render", code=2).stderr


def test_an_option_is_misspelt(command_line: CommandLine) -> None:
    done = command_line("submit", "serve", "--exlude", "x", code=2)
    assert "did you mean --exclude?" in done.stderr and "--acctg-freq" not in done.stderr
    assert "give gpus-per-node" in command_line("submit", "serve", "--gpus-per-task", "1", code=2).stderr


def test_no_sbatch(command_line: CommandLine, config: Path, tmp_path: Path) -> None:
    done = command_line("submit", "serve", "--config", config, code=2)
    assert "no sbatch on the PATH" in done.stderr and "--render" in done.stderr and not (tmp_path / "runs").exists()


def test_gpus_are_asked_for_by_the_node(command_line: CommandLine) -> None:
    """What the fullest of them needs, of the plan for all."""
    given = ["run.model=openai/gpt-oss-120b", "run.machine=h100x8", "run.ranks=4", "run.dp=3", "slurm.nodes=2"]
    words = [word for one in given for word in ("--set", one)]
    assert "gpus-per-node=8" in sbatch_lines(command_line("submit", "serve", *words, "--render").stdout)
    done = command_line("submit", "serve", *words, "--gpus-per-node", "4", "--render", code=2)
    assert "needs 8 GPUs a node, gpus-per-node is 4" in done.stderr


def test_nodes_that_would_idle_are_said_before_the_job_waits(command_line: CommandLine) -> None:
    run = ("run.model=openai/gpt-oss-120b", "run.machine=a100-40-2nodes", "run.ranks=2")
    words = ("submit", "serve", "--render", *(word for one in run for word in ("--set", one)))
    done = command_line(*words, "--nodes", "3", code=2)
    assert "gives work to 2 of 3 nodes" in done.stderr and "--nodes=2" in done.stderr
    script = command_line(*words, "--nodes", "2").stdout
    assert "#SBATCH --gpus-per-node=1\n" in script and "#SBATCH --nodes=2\n" in script


def test_the_run_folder_is_there_before_the_job(command_line: CommandLine, config: Path, tmp_path: Path) -> None:
    """A fake sbatch looks at it. The plan is in it, because the machine is named."""
    program(
        tmp_path, "sbatch", '/bin/ls "${@: -1:1}" "$(/usr/bin/dirname "${@: -1}")" >seen; echo "$@" >words; echo "41;c"'
    )
    flags = ["--set", "run.machine=h100x8", "--set", "run.model=openai/gpt-oss-20b", "--set", "run.folder=my run"]
    done = command_line("submit", "serve", "--config", config, *flags)
    folder = tmp_path / "my run"
    assert done.stdout == "41\n" and str(folder) in done.stderr
    assert {"script.sbatch", "resolved.yaml", "plan.json", "state.jsonl", "logs"} <= set(
        (tmp_path / "seen").read_text().split()
    )
    assert f"--parsable --output={folder}/slurm-%j.out {folder}/script.sbatch" in (tmp_path / "words").read_text()
    plan = json.loads((folder / "plan.json").read_text())
    assert f"#SBATCH --gpus-per-node={plan['world_size']}\n" in (folder / "script.sbatch").read_text()
    # What is written down gives the same job again.
    again = command_line("submit", "serve", "--config", folder / "resolved.yaml", "--render").stdout
    assert again == (folder / "script.sbatch").read_text()
    assert yaml.safe_load((folder / "resolved.yaml").read_text())["slurm"]["time"] == "4:00:00"
    assert "holds a job already" in command_line("submit", "serve", "--config", config, *flags, code=2).stderr
    few = command_line("submit", "serve", "--config", config, *flags, "--gpus-per-node", "0", "--render", code=2)
    assert "gpus-per-node is 0" in few.stderr


def test_a_folder_that_cannot_be_written(command_line: CommandLine, config: Path, tmp_path: Path) -> None:
    program(tmp_path, "sbatch", "echo 41")
    (tmp_path / "file").touch()
    done = command_line("submit", "serve", "--config", config, "--set", "run.folder=file/run", code=2)
    assert f"run folder {tmp_path}/file/run: Not a directory" in done.stderr


def test_slurm_refuses(command_line: CommandLine, config: Path, tmp_path: Path) -> None:
    program(tmp_path, "sbatch", "echo 'sbatch: error: no such partition' >&2; exit 1")
    done = command_line("submit", "serve", "--config", config, code=3)
    assert "error: sbatch: error: no such partition" in done.stderr and done.stdout == ""
    assert not list((tmp_path / "runs").iterdir())

"""`jobs` against fake programs of Slurm: who is asked in which order, and what is said when nobody knows."""

import json
from pathlib import Path

import pytest
from gptoss_launch.launch.job_status import Status, code_of
from gptoss_launch.launch.run_folder import append_state, first_failure, rank_ends
from gptoss_launch.launch.slurm_query import exit_code

from .conftest import CommandLine
from .test_submit import program

UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder whose job 41 has two nodes and began."""
    run = tmp_path / "run"
    for node, host in enumerate(("a", "b")):
        (run / "logs" / "attempt_0" / f"node{node}-{host}").mkdir(parents=True)
    (run / "logs" / "latest").symlink_to("attempt_0")
    append_state(run, 41, "SUBMITTED", "finetune")
    append_state(run, 41, "RUNNING", "on a,b")
    return run


def end_rank(run: Path, node: str, rank: int, at_s: float, code: int) -> None:
    (run / "logs" / "attempt_0" / node / f"rank{rank}.exit").write_text(f"{at_s} {code} {node[-1]}\n")


def say(run: Path, state: str, code: int, reason: str) -> None:
    line = {"job": 41, "attempt": 0, "state": state, "code": code, "reason": reason, "host": "a", "time": ""}
    with (run / "state.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n{cut off")


def test_nobody_knows(command_line: CommandLine, folder: Path, tmp_path: Path) -> None:
    status = command_line.status(folder)
    assert (status["state"], status["ended"]) == ("RUNNING", False), "there is no Slurm to ask: as its script said"
    program(tmp_path, "squeue", UNKNOWN)
    status = command_line.status(folder)
    assert (status["job"], status["state"], status["code"], status["source"]) == (41, "LOST", None, "state.jsonl")


def test_a_controller_that_does_not_answer_says_nothing_of_the_job(
    command_line: CommandLine, folder: Path, tmp_path: Path
) -> None:
    program(tmp_path, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert "Unable to contact slurm controller" in command_line("jobs", "status", folder, code=3).stderr


def test_the_script_has_the_last_word(command_line: CommandLine, folder: Path) -> None:
    say(folder, "FAILED", 17, "rank 3 on b ended with 17")
    end_rank(folder, "node0-a", 0, 100.5, 143)
    end_rank(folder, "node1-b", 3, 101.5, 17)
    end_rank(folder, "node1-b", 2, 99.5, 75)
    status = command_line.status(folder)
    assert (status["state"], status["code"], status["reason"]) == ("FAILED", 17, "rank 3 on b ended with 17")
    assert status["failure"] == {"rank": 3, "node": 1, "host": "b", "code": 17, "at_s": 101.5}
    assert "rank 3 on b (node 1) with 17" in command_line("jobs", "status", folder).stdout


def test_squeue_is_asked_first(command_line: CommandLine, folder: Path, tmp_path: Path) -> None:
    program(tmp_path, "squeue", "echo 'PENDING|Resources||N/A'")
    status = command_line.status(folder)
    assert (status["state"], status["source"], status["reason"]) == (
        "PENDING",
        "squeue",
        "waits for nodes to become free",
    )


def test_scontrol_gives_the_code(command_line: CommandLine, folder: Path, tmp_path: Path) -> None:
    program(tmp_path, "squeue", "echo 'FAILED|NonZeroExitCode|a,b|N/A'")
    program(
        tmp_path,
        "scontrol",
        "echo 'JobId=41 JobState=FAILED Reason=NonZeroExitCode ExitCode=75:0 NodeList=a,b ReqNodeList=c'",
    )
    status = command_line.status(folder)
    assert (status["state"], status["code"], status["source"], status["nodes"]) == ("STOPPED", 75, "scontrol", "a,b")


def test_sacct_where_there_is_accounting(command_line: CommandLine, folder: Path, tmp_path: Path) -> None:
    program(tmp_path, "squeue", UNKNOWN)
    program(tmp_path, "scontrol", UNKNOWN)
    program(tmp_path, "sacct", "echo 'CANCELLED by 1000|0:15|a,b|2026-01-01T00:00:00|None'")
    status = command_line.status(folder)
    assert (status["state"], status["code"], status["source"]) == ("CANCELLED", 143, "sacct")


def test_unknown_jobs(command_line: CommandLine, tmp_path: Path) -> None:
    for target in ("41", str(tmp_path), "nowhere"):
        for verb in (["status"], ["logs"], ["cancel"], ["requeue"], ["endpoint"], ["exec"]):
            more = ["--", "true"] if verb == ["exec"] else []
            done = command_line("jobs", *verb, target, *more, code=5)
            assert done.stderr.startswith("error: ") and done.stdout == ""


def test_requeue_of_a_forgotten_job_says_what_to_do(command_line: CommandLine, folder: Path) -> None:
    assert f"sbatch {folder}/script.sbatch" in command_line("jobs", "requeue", folder, code=5).stderr


def test_logs_of_what_there_is_not(command_line: CommandLine, folder: Path) -> None:
    (folder / "logs" / "attempt_0" / "node1-b" / "rank4.out").write_text("hello\n")
    assert command_line("jobs", "logs", folder, "--rank", "4").stdout == "hello\n"
    assert "known: 4" in command_line("jobs", "logs", folder, "--rank", "9", code=2).stderr
    assert "known: 0 (a), 1 (b)" in command_line("jobs", "logs", folder, "--node", "c", code=2).stderr
    files = command_line.json("jobs", "logs", folder, "--node", "b")["files"]
    assert files == [str(folder / "logs" / "attempt_0" / "node1-b" / "rank4.out")]


def test_the_first_failure_is_not_a_consequence(folder: Path) -> None:
    assert first_failure(rank_ends(folder)) is None
    end_rank(folder, "node0-a", 1, 1.0, 137)
    end_rank(folder, "node0-a", 0, 2.0, 0)
    failure = first_failure(rank_ends(folder))
    assert failure is not None and failure.code == 137, "where nothing else failed, it is the cause"
    end_rank(folder, "node1-b", 2, 3.0, 1)
    failure = first_failure(rank_ends(folder))
    assert failure is not None and (failure.rank, failure.code) == (2, 1)


@pytest.mark.parametrize(("text", "code"), [("17:0", 17), ("0:9", 137), ("0:0", 0), ("1:15", 143), ("", None)])
def test_slurms_exit_codes(text: str, code: int | None) -> None:
    assert exit_code(text) == code


@pytest.mark.parametrize(
    ("state", "code", "wanted"),
    [("COMPLETED", 0, 0), ("FAILED", 17, 17), ("TIMEOUT", 0, 1), ("LOST", None, 1), ("STOPPED", 75, 75)],
)
def test_what_wait_exits_with(state: str, code: int | None, wanted: int) -> None:
    status = Status(1, state, "", code, 0, "", "", "squeue", "", None)
    assert code_of(status) == wanted

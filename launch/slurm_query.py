"""Slurm's own programs: submit a script, and ask how a job is. Says what they say; decides nothing.

A job is asked for in the order squeue, scontrol, sacct: the first two know it for some minutes after its end
(MinJobAge), the last works only where there is accounting.

    SlurmRefusedError   Slurm does not take it, in its own words     exit 3
    UnknownJobError     no such job, or none of ours                 exit 5
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..parallel.errors import UserError

CALL_LIMIT_S = 60.0  # for one call; a controller under load takes seconds

# Of a job that will not run on. All others wait or run.
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)


class SlurmRefusedError(UserError):
    """Slurm refused what it was asked, in its own words."""

    exit_code = 3


class UnknownJobError(UserError):
    """Neither Slurm nor a run folder knows this job as one of ours."""

    exit_code = 5


@dataclass(frozen=True)
class Seen:
    """A job as Slurm has it. code: its own exit code, 128 + n for signal n; None while it has none."""

    source: Literal["squeue", "scontrol", "sacct"]
    state: str
    reason: str
    code: int | None
    nodes: str
    start: str


def has(program: str) -> bool:
    return shutil.which(program) is not None


def submit(script: Path, output: str | None) -> int:
    """The id of the job. output: of the job, in place of what the script has. Raises SlurmRefusedError."""
    _need("sbatch", "submit --render writes the script")
    flags = [] if output is None else [f"--output={output}"]
    done = _call("sbatch", "--parsable", *flags, str(script))
    number = done.stdout.strip().partition(";")[0]
    if done.returncode != 0 or not number.isdigit():
        raise SlurmRefusedError(_words(done), "what --render prints can be edited and given to sbatch")
    return int(number)


def test_only(script: str) -> str:
    """What `sbatch --test-only` says of a script that it would take. Raises SlurmRefusedError."""
    done = _call("sbatch", "--test-only", stdin=script)
    if done.returncode != 0:
        raise SlurmRefusedError(_words(done), "nothing was submitted")
    return _words(done)


def can_ask() -> bool:
    return has("squeue") or has("scontrol")


def ask(job: int) -> Seen | None:
    """The job as Slurm has it, or None if it has forgotten it, was never told, or is not here.

    Raises SlurmRefusedError if its controller does not answer: that says nothing of the job.
    """
    return _squeue(job) or _scontrol(job) or _sacct(job)


def script_of(job: int) -> Path | None:
    """The script that a job was submitted with."""
    fields = _show_job(job)
    return Path(fields["Command"]) if fields and fields.get("Command", "").startswith("/") else None


def signal_batch(job: int, signal: str) -> None:
    """A signal to the batch shell alone."""
    _must("scancel", f"--signal={signal}", "--batch", str(job))


def cancel(job: int) -> None:
    _must("scancel", str(job))


def requeue(job: int) -> None:
    _must("scontrol", "requeue", str(job))


def exec_command(job: int, node: str, command: list[str], *, terminal: bool) -> list[str]:
    """The line that runs a command inside a job's allocation, beside what runs there."""
    flags = ["--overlap", f"--jobid={job}", f"--nodelist={node}", "--nodes=1", "--ntasks=1"]
    return ["srun", *flags, *(["--pty"] if terminal else []), *command]


def hosts(nodes: str) -> list[str]:
    """node[1-2] -> node1, node2"""
    done = _call("scontrol", "show", "hostnames", nodes)
    return done.stdout.split() if done.returncode == 0 else []


def exit_code(text: str) -> int | None:
    """Slurm's CODE:SIGNAL as a shell has it."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    return None if match is None else 128 + int(match[2]) if int(match[2]) else int(match[1])


def _squeue(job: int) -> Seen | None:
    if not has("squeue"):
        return None
    done = _call("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r|%N|%S")
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise SlurmRefusedError(_words(done), "is slurmctld up, and this a node of the cluster?")
    fields = done.stdout.strip().split("|")
    if done.returncode != 0 or len(fields) != 4 or fields[0] in ENDED:  # squeue has no exit code
        return None
    state, reason, nodes, start = fields
    return Seen("squeue", state, "" if reason == "None" else reason, None, nodes, start)


def _scontrol(job: int) -> Seen | None:
    fields = _show_job(job)
    if not fields or "JobState" not in fields:
        return None
    state, reason = fields["JobState"], fields.get("Reason", "None")
    code = exit_code(fields.get("ExitCode", "")) if state in ENDED else None
    nodes = fields.get("NodeList", "").replace("(null)", "")
    return Seen("scontrol", state, "" if reason == "None" else reason, code, nodes, fields.get("StartTime", ""))


def _show_job(job: int) -> dict[str, str] | None:
    if not has("scontrol"):
        return None
    done = _call("scontrol", "show", "job", str(job))
    if done.returncode != 0:
        return None
    found = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", done.stdout))
    command = re.search(r"^\s*Command=(.*)$", done.stdout, re.MULTILINE)  # may hold spaces
    return found | ({"Command": command[1]} if command else {})


def _sacct(job: int) -> Seen | None:
    if not has("sacct"):
        return None
    fields = "--format=State,ExitCode,NodeList,Start,Reason"
    done = _call("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", fields)
    rows = [row.split("|") for row in done.stdout.splitlines() if row.count("|") == 4]
    if done.returncode != 0 or not rows:
        return None
    state, code, nodes, start, reason = rows[-1]
    state = state.split()[0] if state else "UNKNOWN"  # CANCELLED by 1000
    ended = exit_code(code) if state in ENDED else None
    return Seen("sacct", state, "" if reason == "None" else reason, ended, nodes, start)


def _need(program: str, hint: str) -> None:
    if not has(program):
        raise UserError(f"no {program} on the PATH: this is no machine that submits to Slurm", hint)


def _must(*command: str) -> None:
    _need(command[0], "go to a login node of the cluster")
    done = _call(*command)
    if done.returncode != 0:
        raise SlurmRefusedError(_words(done), "gptoss-launch jobs status says how the job is")


def _call(*command: str, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CALL_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmRefusedError(f"{command[0]} gave no answer in {CALL_LIMIT_S:g} s", "is slurmctld up?") from None


def _words(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return "; ".join(lines) or f"{done.args[0]} ended with {done.returncode} and no word"

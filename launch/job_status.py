"""How a job is, in words: what Slurm says and what its script wrote, put together.

Works without accounting and after Slurm has forgotten the job: then state.jsonl has the last word. Changes nothing.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..parallel.errors import UserError
from .run_folder import RESUMABLE, SCRIPT, RankEnd, first_failure, rank_ends, read_states, recall
from .slurm_query import ENDED, Seen, UnknownJobError, ask, can_ask, script_of

LOST = "LOST"  # it began, Slurm does not know it, and it did not say how it ended
POLL_S = 1.0

# Slurm's short words for why a job waits or ended, in longer ones. What is not here is shown as it is.
REASONS = {
    "AssocGrpGRES": "the account's share of GPUs is in use",
    "AssocMaxJobsLimit": "the account runs as many jobs as it may",
    "BeginTime": "waits for its start time; a requeued job waits two minutes or so",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "waits for a job that cannot end as asked: cancel it",
    "InvalidAccount": "the account does not exist here",
    "InvalidQOS": "the QOS does not exist here",
    "JobHeldAdmin": "held by an administrator",
    "JobHeldUser": "held: scontrol release frees it",
    "JobLaunchFailure": "the node could not start the script; often the folder of its output is missing there",
    "launch_failed_requeued_held": "the node could not start it; it is held: scontrol release frees it",
    "NodeDown": "a node of the job is down",
    "NonZeroExitCode": "ended with an error",
    "PartitionDown": "the partition is down",
    "PartitionNodeLimit": "asks for more nodes than the partition gives",
    "PartitionTimeLimit": "asks for more time than the partition gives",
    "Priority": "other jobs go first",
    "QOSMaxGRESPerUser": "you use as many GPUs as the QOS gives you",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as the QOS gives you",
    "ReqNodeNotAvail": "a node that it needs is down or reserved",
    "Reservation": "waits for its reservation",
    "Resources": "waits for nodes to become free",
    "TimeLimit": "reached its time limit",
}
STATES = {
    "CANCELLED": "cancelled",
    "COMPLETED": "ended well",
    "COMPLETING": "is ending",
    "CONFIGURING": "its nodes are starting",
    "FAILED": "failed",
    LOST: "ended without a last word: killed, or its node was lost",
    "NODE_FAIL": "a node was lost",
    "OUT_OF_MEMORY": "took more host memory than it asked for: give more with --mem",
    "PENDING": "waits",
    "PREEMPTED": "was preempted",
    "REQUEUED": "goes back into the queue",
    "RUNNING": "runs",
    "STOPPED": "stopped, and can go on: gptoss-launch jobs requeue",
    "SUBMITTED": "was submitted",
    "TIMEOUT": "reached its time limit before it had stopped",
}


@dataclass(frozen=True)
class Status:
    """One job. state: Slurm's word, or STOPPED (exit 75) or LOST. code: its own exit code, once it has ended.

    source: who said so. failure: the rank that failed first in the last attempt.
    """

    job: int
    state: str
    reason: str
    code: int | None
    attempt: int
    nodes: str
    start: str
    source: str
    folder: str
    failure: RankEnd | None

    @property
    def ended(self) -> bool:
        return self.state in ENDED or self.state in ("STOPPED", LOST)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ended": self.ended}


def find_job(target: str) -> tuple[int, Path]:
    """(id, run folder) of an id or a run folder. Raises UnknownJobError if it is none of ours."""
    if target.isascii() and target.isdigit():
        return int(target), _folder_of(int(target))
    folder = Path(os.path.expanduser(target)).absolute()
    if not folder.is_dir():
        raise UnknownJobError(
            f"{target} is neither a job's id nor a run folder", "jobs COMMAND ID, or jobs COMMAND RUN"
        )
    states = read_states(folder)
    if not states:
        hint = f"submit it: sbatch {folder / SCRIPT}" if (folder / SCRIPT).exists() else "name a run folder of submit"
        raise UnknownJobError(f"{folder} holds no job", hint)
    return states[-1]["job"], folder


def _folder_of(job: int) -> Path:
    if folder := recall(job):
        return folder
    script = script_of(job)
    if script is not None and read_states(script.parent, job):
        return script.parent
    whose = "is none of ours" if ask(job) else "is known neither to Slurm nor here"
    raise UnknownJobError(f"job {job} {whose}", "if it was submitted elsewhere, name its run folder instead of its id")


def status_of(job: int, folder: Path) -> Status:
    """How the job is now."""
    states = read_states(folder, job)
    last = states[-1] if states else {}
    seen = ask(job)
    source = seen.source if seen else "state.jsonl"
    state, code, reason = _judge(seen, last)
    failure = None if last.get("state") == "SUBMITTED" else first_failure(rank_ends(folder))
    return Status(
        job=job,
        state=state,
        reason=reason,
        code=code,
        attempt=max((one.get("attempt", 0) for one in states), default=0),
        nodes=seen.nodes if seen else "",
        start=seen.start if seen else "",
        source=source,
        folder=str(folder),
        failure=failure,
    )


def _judge(seen: Seen | None, last: dict[str, Any]) -> tuple[str, int | None, str]:
    """(state, exit code, reason in words). The script's last word counts for what Slurm cannot know."""
    said, said_code, said_reason = last.get("state", ""), last.get("code"), str(last.get("reason", ""))
    if seen is None and (said in ("COMPLETED", "FAILED", "STOPPED") or not can_ask()):
        return said, said_code, said_reason
    if seen is None:
        return LOST, None, STATES[LOST]
    if seen.state not in ENDED:
        return seen.state, None, _in_words(seen, said_reason if said == "REQUEUED" else "")
    if seen.state == "FAILED" and seen.code == RESUMABLE:
        return "STOPPED", RESUMABLE, said_reason
    own = said_reason if said in ("COMPLETED", "FAILED") else ""
    return seen.state, seen.code, own or _in_words(seen, "")


def _in_words(seen: Seen, more: str) -> str:
    words = REASONS.get(seen.reason, seen.reason) or STATES.get(seen.state, "")
    return f"{words} ({more})" if more else words


def wait_for_end(job: int, folder: Path, limit_s: float | None, beat: Callable[[], None] = lambda: None) -> Status:
    """Returns once the job has ended. beat: called at every look. Raises WaitTimedOutError after limit_s."""
    began_s, asked_s = time.monotonic(), -POLL_S
    while True:
        beat()
        now_s = time.monotonic()
        if now_s - asked_s >= POLL_S:
            asked_s = now_s
            status = status_of(job, folder)
            if status.ended:
                beat()
                return status
        if limit_s is not None and now_s - began_s >= limit_s:
            raise WaitTimedOutError(f"job {job} has not ended in {limit_s:g} s", f"gptoss-launch jobs status {job}")
        time.sleep(0.3)


class WaitTimedOutError(UserError):
    """--wait was given a limit, and the job took longer."""

    exit_code = 124


def code_of(status: Status) -> int:
    """What `submit --wait` exits with: the job's own code; 1 where it ended badly and has none."""
    if status.code:
        return status.code
    return 0 if status.state == "COMPLETED" else 1


def login_host() -> str:
    """This machine's name, for an ssh line."""
    return os.uname().nodename

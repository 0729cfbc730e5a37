"""The folder of a Slurm job: what was submitted, what the script has written since, and where a job's folder is found.

    RUN/script.sbatch  resolved.yaml  plan.json (where there is one)  state.jsonl  endpoint.json (serve)  slurm-JOB.out
    RUN/logs/attempt_N/{all.log, nodeK-HOST/rankR.{out,err,exit}}    RUN/logs/latest -> attempt_N

The script writes most of it, so it tells how a job ended when Slurm has forgotten it. Asks Slurm nothing.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..parallel.errors import UserError

SCRIPT, RESOLVED, PLAN, STATES, ENDPOINT = "script.sbatch", "resolved.yaml", "plan.json", "state.jsonl", "endpoint.json"
CANCEL = "cancel"  # its presence tells the script that a stop is no time limit, and that it must not requeue
CONSEQUENCES = (137, 143)  # SIGKILL and SIGTERM: what the others are ended with when one rank failed
RESUMABLE = 75


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended. node: its place in the job, from 0. at_s: seconds since 1970."""

    rank: int
    node: int
    host: str
    code: int
    at_s: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def create_run_folder(folder: Path, script: str, resolved: Mapping[str, Any], plan: Mapping[str, Any] | None) -> None:
    """Writes what is submitted. Raises UserError if the folder cannot be written, or holds a job already."""
    import yaml

    if (folder / SCRIPT).exists() or (folder / STATES).exists():
        hint = f"name a new folder, or submit its script again: sbatch {folder / SCRIPT}"
        raise UserError(f"run folder {folder} holds a job already", hint)
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / SCRIPT).write_text(script, encoding="utf-8")
        text = yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True)
        (folder / RESOLVED).write_text(text, encoding="utf-8")
        if plan is not None:
            (folder / PLAN).write_text(json.dumps(plan, indent=1), encoding="utf-8")
        (folder / STATES).touch()
    except OSError as error:
        raise UserError(f"run folder {folder}: {error.strerror}", "name a writable one: --set run.folder=...") from None


def remove_run_folder(folder: Path) -> None:
    """Of a job that Slurm refused; files that are not ours stay."""
    for name in (SCRIPT, RESOLVED, PLAN, STATES):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "logs", ignore_errors=True)
    try:
        folder.rmdir()
    except OSError:
        pass


def append_state(folder: Path, job: int, state: str, reason: str) -> None:
    """A line of state.jsonl as the script writes them."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    fields = {"job": job, "attempt": 0, "state": state, "code": None, "reason": reason, "host": "", "time": now}
    with (folder / STATES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def read_states(folder: Path, job: int | None = None) -> list[dict[str, Any]]:
    """The lines of state.jsonl, of one job or of all; a line that was cut off is left out."""
    states = []
    try:
        lines = (folder / STATES).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            fields = json.loads(line)
        except ValueError:
            continue
        if isinstance(fields, dict) and isinstance(fields.get("job"), int) and job in (None, fields["job"]):
            states.append(fields)
    return states


def attempt_folder(folder: Path) -> Path:
    """Logs of the attempt that runs, or that ran last."""
    return (folder / "logs" / "latest").resolve()


def node_folders(attempt: Path) -> Iterator[tuple[int, str, Path]]:
    """(place in the job, host, folder) of each node that has begun, in their order."""
    found = []
    for path in attempt.glob("node*-*"):
        number, _, host = path.name.removeprefix("node").partition("-")
        if number.isdigit():
            found.append((int(number), host, path))
    yield from sorted(found)


def rank_of(path: Path) -> int | None:
    """3 for .../rank3.out"""
    number = path.stem.removeprefix("rank")
    return int(number) if number.isdigit() else None


def rank_ends(folder: Path) -> list[RankEnd]:
    """The ranks of the last attempt that have ended, in the order of time."""
    ends = []
    for node, host, path in node_folders(attempt_folder(folder)):
        for file in path.glob("rank*.exit"):
            words, rank = file.read_text().split(), rank_of(file)
            if rank is not None and len(words) == 3:
                ends.append(RankEnd(rank, node, host, int(words[1]), float(words[0])))
    return sorted(ends, key=lambda end: end.at_s)


def first_failure(ends: list[RankEnd]) -> RankEnd | None:
    """The rank that failed by itself first; one that was ended by the others' failure only if there is no such rank."""
    failed = [end for end in ends if end.code not in (0, RESUMABLE)]
    return next((end for end in failed if end.code not in CONSEQUENCES), next(iter(failed), None))


# --- which folder belongs to which job


def _registry() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "gptoss-launch" / "jobs"


def remember(job: int, folder: Path) -> None:
    """So that `jobs ... ID` works from anywhere. Raises OSError."""
    _registry().mkdir(parents=True, exist_ok=True)
    (_registry() / str(job)).write_text(str(folder), encoding="utf-8")


def recall(job: int) -> Path | None:
    """The folder of a job that was submitted from here, if it is still there and holds that job."""
    try:
        folder = Path((_registry() / str(job)).read_text(encoding="utf-8"))
    except OSError:
        return None
    return folder if read_states(folder, job) else None

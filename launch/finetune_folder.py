"""The folder of a run while it is written to: made, held by one run at a time, its lines of metrics whole.

Does not know what a run does.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..parallel.errors import UserError, lacks_disk
from ..parallel.training.job import METRICS_FILE, STOP_FILE

LOCK_FILE = ".lock"


def make_folder(run: Path) -> None:
    """Raises UserError where nothing can be written."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / LOCK_FILE).touch()
    except OSError as error:
        raise UserError(f"run={run}: {error.strerror}", "run=FOLDER, one that can be written to") from None


def is_new(run: Path) -> bool:
    return not run.is_dir() or all(path.name == LOCK_FILE for path in run.iterdir())


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Raises UserError while another run writes to the folder: two would lose each other's steps. The system lets go of
    it when this process ends, however that is."""
    make_folder(run)
    with (run / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = f"wait for it, stop it with: touch {run / STOP_FILE}, or name another folder"
            raise UserError(f"run={run}: another run writes to it", hint) from None
        except OSError:
            pass  # a file system without locks
        yield


@contextmanager
def room_said(folder: Path) -> Iterator[None]:
    """A disk that is full while `folder` is written to, as a UserError."""
    try:
        yield
    except Exception as error:
        if not lacks_disk(error):
            raise
        raise UserError(f"{folder}: no space is left on its disk", "make room and start again") from None


def keep_metrics(run: Path, done: int) -> None:
    """Drop the lines of steps after `done`, which will be taken again, and one that was cut when its writer ended."""
    path, half = run / METRICS_FILE, run / f".half-{METRICS_FILE}"
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step(line) <= done]
    if kept != lines:
        half.write_bytes(b"".join(kept))
        half.replace(path)


def _step(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")

"""Checkpoints of a run: folders that are there whole or not at all, the last few of them.

Knows nothing of what is in them.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import UserError
from ..planning.machine import format_size
from .world import ALONE, World

_NAME = re.compile(r"checkpoint-(\d{8})")


def saves(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of `run`, the oldest first."""
    found = [(match, path) for path in run.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def save(
    run: Path,
    step: int,
    write: Callable[[Path], Iterable[str]],
    needed_bytes: int,
    keep_last: int,
    world: World = ALONE,
) -> Path:
    """The folder of `step`, filled by `write` on every rank, then moved into place; older ones beyond `keep_last` go.

    write: returns the names of the files that this rank has written.
    Raises UserError, with nothing changed, where the disk has no room.
    """
    free_bytes = shutil.disk_usage(run).free
    if world.largest(free_bytes < needed_bytes):
        world.refuse(
            UserError(
                f"{run}: a checkpoint takes {format_size(needed_bytes)}, {format_size(free_bytes)} are free",
                "make room and resume; the last checkpoint is kept",
            )
        )
    final, half = run / f"checkpoint-{step:08d}", run / f".half-{step:08d}"
    if world.first:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
    world.wait()
    for name in write(half):
        _sync(half / name)
    world.wait()
    if world.first:
        _sync(half)
        shutil.rmtree(final, ignore_errors=True)  # of a run that began anew
        half.rename(final)
        _sync(run)
        for _, old in saves(run)[:-keep_last]:
            shutil.rmtree(old)
        for left in run.glob(".half-*"):  # of a process that was killed while it wrote
            shutil.rmtree(left)
    world.wait()
    return final


def _sync(path: Path) -> None:
    """Bytes on the disk, not only in the page cache: a rename must not outlive what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

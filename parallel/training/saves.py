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
    error = _no_room(run, needed_bytes)
    if world.largest(error is not None):
        world.refuse(error or UserError(f"{run}: no room for a checkpoint", "another rank has said how much"))
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
        _clear(run)
    world.wait()
    return final


def check_room(run: Path, needed_bytes: int) -> None:
    """Raises UserError where the disk has no room for a checkpoint: better before the steps than after them. What a
    process left that ended while it wrote one is removed first."""
    _clear(run)
    if (error := _no_room(run, needed_bytes)) is not None:
        raise error


def _clear(run: Path) -> None:
    for left in run.glob(".half-[0-9]*"):
        shutil.rmtree(left)


def _no_room(run: Path, needed_bytes: int) -> UserError | None:
    free_bytes = shutil.disk_usage(run).free
    if free_bytes >= needed_bytes:
        return None
    return UserError(
        f"{run}: a checkpoint takes {format_size(needed_bytes)}, {format_size(free_bytes)} are free",
        "make room and resume; the last checkpoint is kept",
    )


def _sync(path: Path) -> None:
    """Bytes on the disk, not only in the page cache: a rename must not outlive what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

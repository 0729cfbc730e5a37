"""Files whose bytes are read as memory, for as long as a model runs. One that is cut short meanwhile would end the
process without a word (SIGBUS): it is looked at before every step, and after it; and what is cut while a step reads it
reads as zeros, so that the step ends and is not believed."""

import ctypes
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from ..errors import UserError
from ..kernels.cpu_build import LEVELS, NoLibraryError, library

SOURCE = Path(__file__).with_suffix(".cpp")
MAPS = Path("/proc/self/maps")


@dataclass
class Mapped:
    """sizes: bytes of each file as it was mapped."""

    sizes: dict[Path, int]
    _lost: UserError | None = field(default=None, init=False)
    _library: ctypes.CDLL | None = field(default=None, init=False)
    _watched: tuple[Path, ...] = field(default=(), init=False)  # of each range that the library was told

    def watch(self) -> tuple[str, ...]:
        """From now on what the files lose reads as zeros; to be called once they are mapped. One model a process.

        Returns what has to be said: that it cannot be done here.
        """
        ranges = list(self._ranges())
        why = "no mapping of theirs is found" if not ranges else ""
        try:
            made = library(SOURCE, LEVELS[-1])
        except NoLibraryError as error:
            made, why = None, str(error)
        if made is not None and ranges:
            made.watch.argtypes, made.watch.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_int
            made.lost.argtypes, made.lost.restype = (), ctypes.c_int64
            numbers = [number for _, *range_ in ranges for number in range_]
            code = made.watch((ctypes.c_uint64 * len(numbers))(*numbers), len(ranges))
            why = os.strerror(code) if code else ""
            self._library, self._watched = made, tuple(path for path, *_ in ranges)
        return (f"files of experts that are cut in the middle of a step end this process: {why}",) if why else ()

    def check(self) -> None:
        """Raises UserError for a file that has shrunk, and from then on: what fills the gap later may be anything. What
        was added to one is never read."""
        if self._lost is not None:
            raise self._lost
        for path, size_bytes in self.sizes.items():
            try:
                now_bytes = os.stat(path).st_size
            except OSError:
                continue  # it may be unlinked or out of reach: what is mapped stays whole
            if now_bytes < size_bytes:
                self._lose(f"{path} has shrunk from {size_bytes} to {now_bytes} bytes while experts were read from it")
        if self._library is not None and (place := self._library.lost()) >= 0:
            self._lose(f"{self._watched[place]} was cut short for a while, while experts were read from it")

    def _lose(self, message: str) -> NoReturn:
        hint = "bring the checkpoint back and start again; more --host-memory would keep experts in memory"
        self._lost = UserError(message, hint)
        raise self._lost

    def _ranges(self) -> Iterator[tuple[Path, int, int]]:
        """Where in memory the files are, as Linux tells; nowhere elsewhere."""
        names = {os.path.realpath(path): path for path in self.sizes}
        for line in MAPS.read_text(errors="replace").splitlines() if MAPS.exists() else ():
            place, *_, name = line.split(maxsplit=5)
            if name in names:
                begin, end = place.split("-")
                yield names[name], int(begin, 16), int(end, 16)


def mapped(paths: Iterable[Path]) -> Mapped:
    return Mapped({path: path.stat().st_size for path in sorted(set(paths))})

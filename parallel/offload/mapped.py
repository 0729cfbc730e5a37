"""Files whose bytes are read as memory, for as long as a model runs: one that is cut short meanwhile ends the process
without a word (SIGBUS), so it is looked at before every step."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError


@dataclass
class Mapped:
    """sizes: bytes of each file as it was mapped."""

    sizes: dict[Path, int]
    _lost: UserError | None = field(default=None, init=False)

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
                self._lost = UserError(
                    f"{path} has shrunk from {size_bytes} to {now_bytes} bytes while experts were read from it",
                    "bring the checkpoint back and start again; more --host-memory would keep experts in memory",
                )
                raise self._lost


def mapped(paths: Iterable[Path]) -> Mapped:
    return Mapped({path: path.stat().st_size for path in sorted(set(paths))})

"""Files whose bytes are read as memory, for as long as a model runs: one that is cut short meanwhile ends the process
without a word (SIGBUS), so it is looked at before every step."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError


@dataclass(frozen=True)
class Mapped:
    """sizes: bytes of each file as it was mapped."""

    sizes: dict[Path, int]

    def check(self) -> None:
        """Raises UserError for a file that has shrunk; what was added to one is never read."""
        for path, size_bytes in self.sizes.items():
            try:
                now_bytes = os.stat(path).st_size
            except OSError:
                continue  # it may be unlinked or out of reach: what is mapped stays whole
            if now_bytes < size_bytes:
                raise UserError(
                    f"{path} has shrunk from {size_bytes} to {now_bytes} bytes while experts were read from it",
                    "bring the checkpoint back and start again; more --host-memory would keep experts in memory",
                )


def mapped(paths: Iterable[Path]) -> Mapped:
    return Mapped({path: path.stat().st_size for path in sorted(set(paths))})

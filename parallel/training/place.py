"""Which of the ranks of a run this process is. No torch.

Does not know what ranks do or how they talk.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Of one rank, as torchrun gives it (https://docs.pytorch.org/docs/stable/elastic/run.html)."""

    rank: int
    size: int
    local_rank: int


def read_place(environ: Mapping[str, str]) -> Place | None:
    """None for a process that torchrun did not start."""
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    return Place(int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", "0")))

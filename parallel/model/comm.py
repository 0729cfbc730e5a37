"""How the ranks of a replica add up what each one holds: one small interface.

Knows tensors and a process group; knows nothing of layers.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Comm(Protocol):
    """Every rank of the replica calls the same method with the same shape, in the same order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, bitwise equal on all of them. May overwrite x."""
        ...


@dataclass(frozen=True)
class Alone(Comm):
    """A replica of one rank: there is nothing to add."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

"""The sum over ranks of a product of which each holds a part: of what the product gave, or inside its kernel, where
the programs that make a message exchange it themselves.

Knows what a kernel has to be told; knows nothing of memory that is shared, nor of process groups.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

Product = Literal["attention's output", "experts"]  # each has places of its own in the ranks' memory


@dataclass(frozen=True)
class Message:
    """What a kernel would exchange: `elements` of dtype, as programs of which each has so many `values`, the last ones
    perhaps past the end. The same on every rank.

    processors: multiprocessors, from which on programs that wait for those of a peer cannot keep out the ones that the
    peer waits for.
    """

    product: Product
    elements: int
    dtype: torch.dtype
    programs: int
    values: int
    processors: int


@dataclass(frozen=True)
class Exchange:
    """What a kernel needs for it (`triton_all_reduce.summed`). addresses: of the product's places in the memory of all
    ranks, in rank order. counts: int32, for each program the calls that it has made."""

    addresses: tuple[int, ...]
    rank: int
    counts: Tensor


def arguments(exchange: Exchange | None) -> dict[str, Any]:
    """Of a kernel that may have one."""
    if exchange is None:
        return {}
    return {"counts": exchange.counts, "addresses": exchange.addresses, "RANK": exchange.rank}


class Ranks(Protocol):
    """Those that hold the other parts, `model.comm.Comm`. alone: there are no others."""

    alone: ClassVar[bool]

    def all_reduce(self, x: Tensor) -> Tensor: ...

    def exchange(self, message: Message) -> AbstractContextManager[Exchange | None]:
        """For one launch of a kernel, which then adds up as all_reduce does; None: it cannot, and all_reduce has to."""
        ...


def over(ranks: Ranks | None, x: Tensor) -> Tensor:
    """The sum; None: of this rank alone."""
    return x if ranks is None else ranks.all_reduce(x)

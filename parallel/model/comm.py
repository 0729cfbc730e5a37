"""How the ranks of a replica add up what each one holds, and tell each other what each one found.

One small interface, three ways: alone; a process group (gloo on CPUs, NCCL on GPUs); and torch symmetric memory for
small messages between linked GPUs, with the process group for the rest. NVLink multicast is never used.
Knows tensors and groups; knows nothing of layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

WAYS = ("group", "one_shot", "two_shot")  # to all-reduce
Limits = tuple[tuple[int, str], ...]  # (most bytes, one of WAYS), ascending


class Comm(Protocol):
    """Every rank of the replica calls the same method with the same shape, in the same order."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, bitwise equal on all of them. May overwrite x."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[ranks, ...]: everybody's x, in rank order."""
        ...


@dataclass(frozen=True)
class Alone(Comm):
    """A replica of one rank: there is nothing to add."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]


@dataclass(frozen=True)
class Group(Comm):
    """The default process group. gloo and NCCL reduce each piece of a message in one place and send the result round,
    so that all ranks hold the same bits."""

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        ranks = dist.get_world_size()
        out = x.new_empty((ranks * len(x), *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous())
        return out.view(ranks, *x.shape)


class Linked(Comm):
    """GPUs that can read each other's memory: each message by the way that `limits` says for its size.

    One-shot: every rank reads all messages and adds them in rank order. Two-shot: every rank adds its piece and the
    pieces are read back. limits: (most bytes, way), ascending; larger messages go through the group.
    """

    def __init__(self, buffer_bytes: int, limits: Limits) -> None:
        import torch.distributed._symmetric_memory as symmetric

        group = dist.group.WORLD
        assert group is not None
        self.limits = limits
        self._group = Group()
        self._name = group.group_name
        self._buffer = symmetric.empty(buffer_bytes, dtype=torch.uint8, device=torch.device("cuda"))
        symmetric.rendezvous(self._buffer, self._name)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.all_reduce_by(way_for(x.nbytes, self.limits), x)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._group.all_gather(x)

    def all_reduce_by(self, way: str, x: Tensor) -> Tensor:
        if way == "group":
            return self._group.all_reduce(x)
        shared = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        if way == "one_shot":
            return torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x.contiguous(), "sum", self._name)
        shared.copy_(x)
        # the result stands in the buffer that the next message will overwrite
        return x.copy_(torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._name))


def way_for(message_bytes: int, limits: Limits) -> str:
    return next((way for limit, way in limits if message_bytes <= limit), "group")


class Marks(Protocol):
    """Who wants to know that this rank is in a collective (`engine.trace.Trace`)."""

    def collective_begins(self) -> None: ...
    def collective_ends(self) -> None: ...


@dataclass(frozen=True)
class Marked(Comm):
    """`comm`, each of whose collectives is marked while it lasts."""

    comm: Comm
    marks: Marks

    def all_reduce(self, x: Tensor) -> Tensor:
        self.marks.collective_begins()
        x = self.comm.all_reduce(x)
        self.marks.collective_ends()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        self.marks.collective_begins()
        x = self.comm.all_gather(x)
        self.marks.collective_ends()
        return x


@dataclass(frozen=True)
class Sums(Comm):
    """Every all-reduce of `comm` checked: all ranks must hold the same bits. For debugging; slow."""

    comm: Comm

    def all_reduce(self, x: Tensor) -> Tensor:
        x = self.comm.all_reduce(x)
        check_equal(self.comm, x, "an all-reduce")
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return self.comm.all_gather(x)


def check_equal(comm: Comm, x: Tensor, what: str) -> None:
    """Raise RuntimeError, naming the ranks, unless x has the same bits on every rank."""
    everyone = comm.all_gather(x)
    different = [rank for rank in range(len(everyone)) if not torch.equal(everyone[rank], everyone[0])]
    if different:
        raise RuntimeError(f"{what} differs between rank 0 and ranks {different}")


def message_sizes(largest_bytes: int) -> Iterator[int]:
    """What calibration measures: 2 KiB and its multiples by 4, up to what the buffer holds."""
    size = 2 << 10
    while size < largest_bytes:
        yield size
        size *= 4
    yield largest_bytes

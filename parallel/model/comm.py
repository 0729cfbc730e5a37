"""How the ranks of a replica add up what each one holds, and tell each other what each one found.

One small interface, three ways: alone; a process group (gloo on CPUs, NCCL on GPUs); and, between linked GPUs, memory
that all of them can write, through a kernel of our own or torch's, with the process group for large messages. NVLink
multicast is never used.
Knows tensors and groups; knows nothing of layers.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.sums import Exchange, Message
from ..planning.memory import FLAGGED_BYTES, INSIDE_BYTES

WAYS = ("group", "flagged", "one_shot", "two_shot")  # to all-reduce
SHOT_DTYPES = (torch.bfloat16, torch.float32)  # that torch's kernels know
FLAGGED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHECKED_CALLS = 8  # sums in a row
CHECKED_POLLS = 1_000_000  # about a second
Limits = tuple[tuple[int, str], ...]  # (most bytes, one of WAYS), ascending


class Comm(Protocol):
    """Every rank of the replica calls the same method with the same shape, in the same order. alone: every sum over
    ranks is what this one has, so that nobody has to make it."""

    alone: ClassVar[bool] = False

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, bitwise equal on all of them. May overwrite x."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[ranks, ...]: everybody's x, in rank order."""
        ...

    @contextmanager
    def exchange(self, message: Message) -> Iterator[Exchange | None]:
        """For one launch of a kernel that adds up what it makes as `all_reduce` would, within the context; None: it
        cannot, and all_reduce has to. The same answer on all ranks."""
        yield None


@dataclass(frozen=True)
class Alone(Comm):
    """A replica of one rank: there is nothing to add."""

    alone: ClassVar[bool] = True

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
    """GPUs that can read and write each other's memory: each message by the way that `limits` says for its size.

    Flagged: every rank writes its message, with flags, to all others and adds what it was sent in rank order
    (`kernels.triton_all_reduce`), in a kernel of its own or inside the one that makes the message. One-shot: every rank
    reads all messages and adds them in rank order. Two-shot: every rank adds its piece and the pieces are read back.
    limits: (most bytes, way), ascending; larger messages go through the group, as do those that their way does not
    take.
    """

    def __init__(self, buffer_bytes: int, limits: Limits) -> None:
        import torch.distributed._symmetric_memory as symmetric

        group = dist.group.WORLD
        assert group is not None
        self.limits = limits
        self._group = Group()
        self._name = group.group_name
        flagged_from = -(-buffer_bytes // 16) * 16
        device = torch.device("cuda", torch.cuda.current_device())
        inside_from = flagged_from + FLAGGED_BYTES
        memory = symmetric.empty(inside_from + INSIDE_BYTES, dtype=torch.uint8, device=device)
        self._mapped = handle = symmetric.rendezvous(memory, self._name)
        self._buffer = memory[:buffer_bytes]
        memory[flagged_from:].zero_()
        torch.cuda.synchronize()
        addresses, inside = (
            tuple(handle.get_buffer(rank, (1,), torch.uint8, at).data_ptr() for rank in range(handle.world_size))
            for at in (flagged_from, inside_from)
        )
        # all ranks answer each other here, and by then the flags of all of them are zeros
        self._flagged_limit_bytes = least(_flagged_limit_bytes(device))
        self.slow: tuple[str, ...] = ()
        if self._flagged_limit_bytes:
            from ..kernels.triton_all_reduce import Exchanges, FlaggedSum
            from ..kernels.triton_launch import processors

            self._flagged = FlaggedSum(addresses, handle.rank, FLAGGED_BYTES, device)
            self._inside = Exchanges(inside, handle.rank, INSIDE_BYTES, least(processors(device)), device)
            flaw = flagged_flaw(self._flagged, self._flagged_limit_bytes, handle.rank, len(addresses), device)
            if flaw is not None:
                self._flagged_limit_bytes = 0
                self.slow = (f"small sums between GPUs by torch's kernels, not by words with flags: {flaw}",)

    def all_reduce(self, x: Tensor) -> Tensor:
        way = way_for(x.nbytes, self.limits)
        return self.all_reduce_by(way if self.takes(way, x) else "group", x)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._group.all_gather(x)

    @contextmanager
    def exchange(self, message: Message) -> Iterator[Exchange | None]:
        """Where the flagged way is taken, which this is: with the same bits, and resting on the same of the link."""
        x = torch.empty(message.elements, dtype=message.dtype, device="meta")
        flagged = way_for(x.nbytes, self.limits) == "flagged" and self.takes("flagged", x)
        yield self._inside(message) if flagged else None

    def takes(self, way: str, x: Tensor) -> bool:
        """Whether x can go that way: the same answer on all ranks."""
        if way == "flagged":
            return x.nbytes <= self._flagged_limit_bytes and x.dtype in FLAGGED_DTYPES
        return way == "group" or (x.dtype in SHOT_DTYPES and x.nbytes <= len(self._buffer))

    def all_reduce_by(self, way: str, x: Tensor) -> Tensor:
        if way == "group":
            return self._group.all_reduce(x)
        if way == "flagged":
            return self._flagged(x)
        shared = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        if way == "one_shot":
            return torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x.contiguous(), "sum", self._name)
        shared.copy_(x)
        # the result stands in the buffer that the next message will overwrite
        return x.copy_(torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._name))


def _flagged_limit_bytes(device: torch.device) -> int:
    """The largest message of the flagged way, as this rank can take it; 0 for none."""
    if importlib.util.find_spec("triton") is None:
        return 0
    from ..kernels.triton_all_reduce import largest_bytes

    return largest_bytes(device, dist.get_world_size(), FLAGGED_BYTES)


def flagged_flaw(
    flagged: Callable[[Tensor, int], Tensor], limit_bytes: int, rank: int, ranks: int, device: torch.device
) -> str | None:
    """What is wrong with sums of bf16 by `flagged` here, None if nothing is; all ranks say the same.

    It rests on how the link orders what a GPU writes into another one's memory: seen to hold before anything depends on
    it. Nobody waits long for words that do not come.
    """
    limit = limit_bytes // torch.bfloat16.itemsize
    for sizes in ((2,), (limit,), (limit, 2) * CHECKED_CALLS, (limit // 2, 129) * CHECKED_CALLS):  # the last in a row
        flaw = ""
        try:
            found = []
            for call, size in enumerate(sizes):
                numbers = torch.arange(size, device=device) % 16 + call % 4  # sums of them are bf16
                message = (numbers + rank).to(torch.bfloat16)
                found.append((flagged(message, CHECKED_POLLS), ranks * numbers + ranks * (ranks - 1) // 2))
            if not all(torch.equal(total, wanted.to(total.dtype)) for total, wanted in found):
                flaw = f"wrong sums of {max(sizes)} values"
        except Exception as error:  # whatever a compiler or a driver says: there are other ways to sum
            flaw = f"{type(error).__name__}: {error}"
        if not least(int(not flaw)):
            return flaw or "another rank refused"
    return None


def least(number: int) -> int:
    """Of all ranks' numbers."""
    everyone = torch.tensor([number])
    dist.all_reduce(everyone, op=dist.ReduceOp.MIN)
    return int(everyone.item())


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

    @contextmanager
    def exchange(self, message: Message) -> Iterator[Exchange | None]:
        with self.comm.exchange(message) as exchange:
            if exchange is None:
                yield None  # all_reduce is marked
                return
            self.marks.collective_begins()
            yield exchange
            self.marks.collective_ends()


@dataclass(frozen=True)
class Sums(Comm):
    """Every all-reduce of `comm` checked: all ranks must hold the same bits. For debugging; slow. None is inside a
    kernel."""

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
    """What calibration measures: 2 KiB and its doubles, up to what the buffer holds. A message goes by what was fastest
    for the next larger one."""
    size = 2 << 10
    while size < largest_bytes:
        yield size
        size *= 2
    yield largest_bytes

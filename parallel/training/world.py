"""The ranks of a training run, and what they tell each other: sums, and that all have come to a point.

Every rank is data-parallel: it holds all that is trained, or its share of it through DeepSpeed, and runs its own packs.
One process without torchrun is a world of one rank, and nothing here then communicates. Knows nothing of models.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RankDiedError, UserError
from .place import Place

LONGEST_WAIT = timedelta(days=2)  # for rank 0, which reads the data while the others wait
PARENT_EVERY_S = 0.5


@dataclass(frozen=True)
class World:
    """device: of this rank. patient: a group in which waiting has no near end; None where there is one rank."""

    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over ranks, the same bits on all of them."""
        if self.size > 1:
            with self._together():
                works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
                for work in works:
                    assert work is not None
                    work.wait()

    def largest(self, number: float) -> float:
        if self.size > 1:
            tensor = torch.tensor([number], dtype=torch.float64)
            with self._together():
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            return tensor.item()
        return number

    def wait(self) -> None:
        """Returns once every rank has come here."""
        if self.patient is not None:
            with self._together():
                dist.barrier(group=self.patient)

    def refuse(self, error: UserError) -> NoReturn:
        """Ends all ranks by an error that every rank has found: the first says it, the others leave after it."""
        if self.first:
            raise error
        try:
            self.wait()
        except UserError:
            pass  # it is gone
        raise SystemExit(error.exit_code)

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise RankDiedError(f"lost the other ranks: {reason}", "the rank that ended first says why") from None


ALONE = World(0, 1, torch.device("cpu"))


@contextmanager
def joined(place: Place | None, device: Literal["cuda", "cpu"], group: bool) -> Iterator[World]:
    """The world of this process. group: whether a process group is wanted even for a single rank.

    Under torchrun this process ends when its parent does: nothing outlives a run.
    """
    if place is None:
        yield World(0, 1, torch.device(device))
        return
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    here = torch.device(device)
    if device == "cuda":
        here = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(here)
    if place.size == 1 and not group:
        yield World(place.rank, 1, here)
        return
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    patient = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    assert isinstance(patient, dist.ProcessGroup)
    yield World(place.rank, place.size, here, patient)
    dist.destroy_process_group()  # not after an error: the others may be gone, and this process will be


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_EVERY_S)
    os._exit(RankDiedError.exit_code)

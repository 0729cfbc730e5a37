"""All ranks of a replica as threads of one process, so that any number of them can be tested in seconds."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.kernels import PLAIN
from gptoss_launch.parallel.model.checkpoint import load
from gptoss_launch.parallel.model.comm import Comm
from gptoss_launch.parallel.planning.headers import read_inventory
from gptoss_launch.parallel.planning.plan import Plan
from torch import Tensor

T = TypeVar("T")


class ThreadComm(Comm):
    """Adds in rank order, on every rank for itself."""

    def __init__(self, rank: int, slots: list[Tensor], barrier: threading.Barrier) -> None:
        self._rank, self._slots, self._barrier = rank, slots, barrier

    def all_gather(self, x: Tensor) -> Tensor:
        self._slots[self._rank] = x
        self._barrier.wait()
        out = torch.stack(self._slots)
        self._barrier.wait()  # nobody overwrites a slot that another still reads
        return out

    def all_reduce(self, x: Tensor) -> Tensor:
        everyone = self.all_gather(x)
        total = everyone[0].clone()
        for other in everyone[1:]:
            total += other
        return total


def run_ranks(plan: Plan, work: Callable[[Engine], T]) -> list[T]:
    """What `work` returns on each rank of one replica of `plan`."""
    assert plan.checkpoint is not None
    inventory = read_inventory(Path(plan.checkpoint))
    slots = [torch.empty(0)] * plan.ranks
    barrier = threading.Barrier(plan.ranks)

    def one(rank: int) -> T:
        try:
            weights = load(plan, rank, inventory, torch.device("cpu"), kept=plan.kept)
            return work(Engine(plan, rank, weights, PLAIN, ThreadComm(rank, slots, barrier)))
        except BaseException:
            barrier.abort()  # the others must not wait for this rank
            raise

    with ThreadPoolExecutor(plan.ranks) as pool:
        return list(pool.map(one, range(plan.ranks)))


def with_ranks(plan: Plan, ranks: int, ep: int) -> Plan:
    return dataclasses.replace(plan, ranks=ranks, ep=ep)

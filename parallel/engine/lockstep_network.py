"""How the leader's step records reach ranks on other nodes: a broadcast each, in a gloo group of its own.

As `lockstep`, for a replica that lies on several nodes: every rank does what the record says, and nothing comes back. A
rank that waits for a record waits in gloo, which raises when the leader is gone.
"""

import datetime
from array import array

import torch
import torch.distributed as dist

from .lockstep import Steps
from .record import Record, read

FIRST_WORDS = 2048  # sent of every record, in one message, which is all of it for most decodes
FOR_EVER = datetime.timedelta(days=365)  # until there is something to do


class Broadcasts(Steps):
    """Every rank of the replica makes one, once it has joined."""

    def __init__(self, words: int) -> None:
        group = dist.new_group(backend="gloo", timeout=FOR_EVER)
        assert isinstance(group, dist.ProcessGroup), "every rank is in it"
        self._group = group
        self._words = torch.zeros(max(words, FIRST_WORDS), dtype=torch.int32)
        self._view: memoryview = self._words.numpy().data

    def publish(self, record: Record) -> None:
        """By the leader."""
        self._view[: record.head.words] = record.words
        self._first()
        self._rest(record.head.words)

    def wait(self, number: int) -> Record:
        """The record of step `number`, by the others."""
        self._first()
        words = read(self._view).head.words
        self._rest(words)
        record = read(memoryview(array("i", self._view[:words].tobytes())))  # the next one comes into the same place
        assert record.head.number == number, f"record {record.head.number} where {number} is awaited"
        return record

    def _first(self) -> None:
        dist.broadcast(self._words[:FIRST_WORDS], src=0, group=self._group)

    def _rest(self, words: int) -> None:
        if words > FIRST_WORDS:
            dist.broadcast(self._words[FIRST_WORDS:words], src=0, group=self._group)

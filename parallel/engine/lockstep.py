"""How the leader's step records reach the other ranks of its replica: a few slots of a mapped file that all can read.

Every rank does what the record says and draws the same tokens, so nothing has to come back. Works inside one host;
`lockstep_network` is for a replica that lies on several. Knows records as words; knows nothing of what they mean.
"""

import mmap
import time
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from .record import RING_STEPS, WORD_BYTES, Record, read

HEAD_WORDS = (
    2  # of a slot: the number of the step, and a checksum that tells a record that is being written from a whole one
)
SPIN_S = 200e-6  # for so long a rank looks without pause, then ever more rarely
LONGEST_PAUSE_S = 1e-3


class Steps(Protocol):
    """What the leader tells every other rank, one record after the other; steps count from 1."""

    def publish(self, record: Record) -> None: ...
    def wait(self, number: int) -> Record: ...


class Ring(Steps):
    """All slots. The leader makes the file before any other rank opens it."""

    def __init__(self, path: Path, words: int, *, create: bool) -> None:
        self._slot_words = HEAD_WORDS + words
        size = RING_STEPS * self._slot_words * WORD_BYTES
        with path.open("w+b" if create else "r+b") as file:
            if create:
                file.truncate(size)  # a sparse file: what is never written takes no memory
            self._map = mmap.mmap(file.fileno(), size)
        self._words = memoryview(self._map).cast("i")

    def _slot(self, number: int) -> memoryview:
        begin = number % RING_STEPS * self._slot_words
        return self._words[begin : begin + self._slot_words]

    def publish(self, record: Record) -> None:
        slot = self._slot(record.head.number)
        slot[HEAD_WORDS : HEAD_WORDS + record.head.words] = record.words
        slot[:HEAD_WORDS] = array("i", (record.head.number, _checksum(record.words)))

    def wait(self, number: int, pause: Callable[[float], None] = time.sleep) -> Record:
        """The record of step `number`, once it is there whole."""
        slot = self._slot(number)
        began_s = time.monotonic()
        while True:
            written, checksum = slot[:HEAD_WORDS].tolist()
            if written == number:
                record = read(slot[HEAD_WORDS:])
                if record.head.number == number and _checksum(record.words) == checksum:
                    return record
            waited_s = time.monotonic() - began_s
            if waited_s > SPIN_S:
                pause(min(waited_s / 10, LONGEST_PAUSE_S))


def _checksum(words: memoryview) -> int:
    """CRC-32, as a signed word."""
    checksum = zlib.crc32(words)
    return checksum - (1 << 32) if checksum >= 1 << 31 else checksum


def steps_file(control: Path) -> Path:
    """Beside the control socket of the replica."""
    return control.with_name(f"{control.stem}.steps")

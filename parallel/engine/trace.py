"""Where each rank is, written down where the supervisor can read it whatever happens to the rank: a mapped file each.

A rank that was killed, stopped or hangs cannot say where; its file still does. Costs a microsecond a collective. The
supervisor reads all files now and then: a rank that has been in one step for longer than the plan allows hangs.
"""

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["starting", "idle", "step", "collective"]
_PHASES: tuple[Phase, ...] = ("starting", "idle", "step", "collective")
_LAYOUT = struct.Struct("<qqqd")  # phase, step, collectives begun in it, when the step or wait began


@dataclass(frozen=True)
class Where:
    """step counts from 1 and is 0 before warm-up is over; collective counts from 1 within the step, 0 before the first.

    since_s: when the step began, on this machine's monotonic clock.
    """

    phase: Phase
    step: int
    collective: int
    since_s: float

    def __str__(self) -> str:
        if self.phase == "collective":
            return f"in collective {self.collective} of step {self.step}"
        if self.phase == "step":
            return f"computing in step {self.step}, after collective {self.collective}"
        return self.phase

    @property
    def progress(self) -> tuple[int, int, int]:
        """Grows as the rank goes on; whoever has the smallest holds up the others."""
        return self.step, self.collective, {"collective": 0, "idle": 2}.get(self.phase, 1)


class Trace:
    """The writer's side: one rank."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(_LAYOUT.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self._step = self._collective = 0
        self._since_s = 0.0
        self._write("starting")

    @property
    def waits(self) -> bool:
        """Whether this rank waits for others: in a collective, or for the leader's word."""
        return self._phase in ("collective", "idle")

    def _write(self, phase: Phase) -> None:
        self._phase = phase
        _LAYOUT.pack_into(self._map, 0, _PHASES.index(phase), self._step, self._collective, self._since_s)

    def step(self) -> None:
        """A step begins. Before the first of these nothing counts as a hang: loading and warming up take their time."""
        self._step += 1
        self._collective = 0
        self._since_s = time.monotonic()
        self._write("step")

    def collective_begins(self) -> None:
        if self._step:
            self._collective += 1
            self._write("collective")

    def collective_ends(self) -> None:
        if self._step:
            self._write("step")

    def idle(self) -> None:
        """The step is over, or warm-up is."""
        self._since_s = time.monotonic()
        self._write("idle")


def trace_file(control: Path, rank: int) -> Path:
    """Beside the control socket of the rank's replica."""
    return control.with_name(f"{control.stem}-rank-{rank}.trace")


def read_where(path: Path) -> Where | None:
    """None if the rank has not come so far as to write it."""
    try:
        phase, step, collective, since_s = _LAYOUT.unpack(path.read_bytes())
    except (OSError, struct.error):
        return None
    return Where(_PHASES[phase], step, collective, since_s)

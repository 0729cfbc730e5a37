"""Where the time of decode steps goes, by kernel, from torch's profiler: one line of JSON for each size of a step.

Watches the leader's steps and changes none. A size is looked at once, when it has been decoding for a while and
nothing else. On a GPU these are the kernels; on the CPU, torch's operations. Profiling slows steps down: the sums by
kernel hold, the time between kernels does not.

    {"decodes": 8, "steps": 24, "us": {"_gate_up": 412.1, ...}}    microseconds of a step of so many decodes, padded
                                                                    to the size of its CUDA graph where it is one
"""

import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .record import Head

BEFORE = 8  # steps of a size, so that nothing is compiled or captured any more
STEPS = 24
LEAST_TOKENS = BEFORE + STEPS + 2  # that an answer must have, so that its batch is looked at


class Profiler:
    """path: where lines are added."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        self._device = device
        self._seen: set[int] = set()
        self._size = self._run = 0  # of the steps so far that followed each other with the same decodes
        self._profile: profile | None = None

    def step(self, head: Head) -> None:
        """Called before each step."""
        size = 0 if head.chunks else head.decodes
        if size != self._size:
            self._drop()
            self._size, self._run = size, 0
        if self._profile is not None and self._run == BEFORE + STEPS - 1:
            self._write(self._profile)
        self._run += 1
        if size and self._run == BEFORE and size not in self._seen:
            self._synchronize()
            activity = ProfilerActivity.CUDA if self._device.type == "cuda" else ProfilerActivity.CPU
            self._profile = profile(activities=[activity])
            self._profile.start()

    def idle(self) -> None:
        """Called when there is nothing to do."""
        self._drop()
        self._size = self._run = 0

    def _drop(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, running: profile) -> None:
        self._synchronize()
        self._drop()
        self._seen.add(self._size)
        events = running.key_averages()
        on_gpu = self._device.type == "cuda"
        spent_us = {one.key: (one.self_device_time_total if on_gpu else one.self_cpu_time_total) for one in events}
        line = {
            "decodes": self._size,
            "steps": STEPS,
            "us": {name: us / STEPS for name, us in spent_us.items() if us > 0},
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

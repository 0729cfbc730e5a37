"""Bytes of safetensors files -> tensors in host memory: mapped, or read ahead of whoever takes them.

Knows where a tensor lies in its file, and nothing of what it is for. What is contiguous is read (`preadv`): a file
that ends early is an error then, not a signal. Narrow columns are copied from the mapped file.
"""

import ctypes
import mmap
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..offload.pinned import NotPinnedError, pinned
from ..planning.headers import Entry

DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8}  # by the names of the safetensors format
THREADS = 4  # that read: one copies some 8 GB/s out of the page cache, and a GPU takes several times as much
BUFFERS = 2 * THREADS  # for a GPU: some wait to be copied from while others are read into
CPU_BUFFERS = 2  # what is copied from host memory to host memory gains nothing from more
RUN_BYTES = 64 << 10  # contiguous bytes of a file for which a call of their own pays
ALIGNED_BYTES = 64  # boxes begin at multiples of it in a buffer


@dataclass(frozen=True)
class Box:
    """A part of a tensor in a file: a slice of each dim."""

    entry: Entry
    slices: tuple[slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.slices)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.entry.dtype].itemsize

    def runs(self) -> tuple[int, int]:
        """How often contiguous bytes of the file make up the box, and how many they are each time."""
        count, run_bytes = self._outer()
        return prod(part.stop - part.start for part in self.slices[:count]), run_bytes

    def offsets(self) -> Iterator[int]:
        """Where in the file each run begins, in their order."""
        outer, _ = self._outer()
        steps = [prod(self.entry.shape[dim + 1 :]) for dim in range(len(self.slices))]
        begin = sum(part.start * step for part, step in zip(self.slices[outer:], steps[outer:], strict=True))
        for place in product(*(range(part.start, part.stop) for part in self.slices[:outer])):
            elements = begin + sum(index * step for index, step in zip(place, steps, strict=False))
            yield self.entry.start_bytes + elements * DTYPES[self.entry.dtype].itemsize

    def _outer(self) -> tuple[int, int]:
        """How many dims lie outside of a run, and its bytes: all dims after the first one of a run are whole."""
        outer, whole = len(self.slices), DTYPES[self.entry.dtype].itemsize
        for size, part in zip(reversed(self.entry.shape), reversed(self.slices), strict=True):
            outer, whole = outer - 1, whole * (part.stop - part.start)
            if part.stop - part.start != size:
                break
        return outer, whole


def mapped(entry: Entry) -> Tensor:
    """The whole tensor as a view of its file, mapped for as long as the view lives; written to, it is no longer shared
    with the file. Raises UserError where the file ends before the tensor does."""
    begin = entry.start_bytes - entry.start_bytes % mmap.ALLOCATIONGRANULARITY
    within = entry.start_bytes - begin
    with entry.path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        if end < entry.start_bytes + entry.size_bytes:
            raise _cut(entry, end)
        pages = mmap.mmap(file.fileno(), within + entry.size_bytes, access=mmap.ACCESS_COPY, offset=begin)
    return torch.frombuffer(memoryview(pages)[within:], dtype=DTYPES[entry.dtype]).view(entry.shape)


@contextmanager
def read_ahead(groups: Sequence[Sequence[Box]], device: torch.device) -> Iterator[Iterator[tuple[Tensor, ...]]]:
    """Gives, for each group in turn, a tensor in host memory for each of its boxes, while the next groups are read.

    They are there until the next group is asked for; copies to `device` from them that were begun before on the current
    stream are waited for. Buffers hold the largest group, and are pinned where `device` is a GPU.
    """
    size_bytes = max((_layout(boxes)[-1] for boxes in groups), default=0)
    gpu = None
    if device.type == "cuda":
        gpu = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    count = min(BUFFERS if gpu else CPU_BUFFERS, len(groups))
    with ExitStack() as stack:
        files: dict[Path, int] = {}
        for path in sorted({box.entry.path for boxes in groups for box in boxes}):
            files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, files[path])
        # a thread that waits for an event of one GPU may make a context on another, unless it knows better
        pool = ThreadPoolExecutor(THREADS if gpu else 1, "read", gpu and partial(torch.cuda.set_device, gpu))
        stack.callback(pool.shutdown, cancel_futures=True)  # before the files are closed
        buffers = [_Buffer(_host_memory(size_bytes, gpu is not None), gpu) for _ in range(count)]

        def taken() -> Iterator[tuple[Tensor, ...]]:
            coming = iter(groups)
            waiting = deque(
                (buffer, pool.submit(buffer.fill, boxes, files)) for buffer, boxes in zip(buffers, coming, strict=False)
            )
            while waiting:
                buffer, filled = waiting.popleft()
                yield filled.result()
                buffer.leave()
                if (boxes := next(coming, None)) is not None:
                    waiting.append((buffer, pool.submit(buffer.fill, boxes, files)))

        yield taken()


@dataclass
class _Buffer:
    """gpu: that is copied to. free: when it needs nothing from here any more."""

    memory: Tensor
    gpu: torch.device | None
    _free: "torch.cuda.Event | None" = field(default=None, init=False)

    def leave(self) -> None:
        if self.gpu is not None:
            self._free = torch.cuda.Event(blocking=True)  # whoever waits leaves its CPU to others
            self._free.record(torch.cuda.current_stream(self.gpu))

    def fill(self, boxes: Sequence[Box], files: Mapping[Path, int]) -> tuple[Tensor, ...]:
        if self._free is not None:
            self._free.synchronize()
        made = []
        for box, start in zip(boxes, _layout(boxes), strict=False):
            part = self.memory[start : start + box.nbytes]
            made.append(part.view(DTYPES[box.entry.dtype]).view(box.shape))
            runs, run_bytes = box.runs()
            if runs > 1 and run_bytes < RUN_BYTES:
                made[-1].copy_(mapped(box.entry)[box.slices])
                continue
            for number, offset in enumerate(box.offsets()):
                _read(files[box.entry.path], part[number * run_bytes :][:run_bytes], offset, box.entry)
        return tuple(made)


def _layout(boxes: Sequence[Box]) -> list[int]:
    """Where in a buffer each begins, and where the last one ends."""
    starts = [0]
    for box in boxes:
        starts.append(starts[-1] + -(-box.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES)
    return starts


def _host_memory(size_bytes: int, pin: bool) -> Tensor:
    memory = torch.empty(size_bytes, dtype=torch.uint8)
    if pin:
        try:
            return pinned(memory)
        except NotPinnedError as error:
            warnings.warn(f"weights are copied to the GPU in two steps: {error}", stacklevel=2)
    return memory


def _read(file: int, into: Tensor, offset: int, entry: Entry) -> None:
    view = memoryview((ctypes.c_char * into.nbytes).from_address(into.data_ptr())).cast("B")
    while view:
        count = os.preadv(file, [view], offset)
        if count == 0:
            raise _cut(entry, offset)
        view, offset = view[count:], offset + count


def _cut(entry: Entry, end_bytes: int) -> UserError:
    message = f"{entry.path} ends at byte {end_bytes}, and had more when its header was read"
    return UserError(message, "bring the checkpoint back and start again")

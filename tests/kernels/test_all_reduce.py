"""The sum of messages with flags: one rank whose peers are written by hand, and real ranks in processes of their own.

As a program, `python test_all_reduce.py FOLDER RANK RANKS DTYPE`, it is one of those ranks: each polls, in the
interpreter, memory that the others write.
"""

import math
import mmap
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import compiled
import pytest
import torch
from gptoss_launch.parallel.kernels import triton_all_reduce
from gptoss_launch.parallel.kernels.triton_all_reduce import BLOCK, WORD_BYTES, FlaggedSum
from gptoss_launch.parallel.planning.memory import FLAGGED_BYTES, flagged_limit_bytes
from torch import Tensor

CPU = torch.device("cpu")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="polls the CPU's memory, in the interpreter")
PROGRAMS = 3
# the interpreter cuts sums to bf16 instead of rounding them: the messages below have sums that are bf16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CALLS = 40
MAP_32BIT = 0x40  # of mmap(2), on x86-64: below 2^31; Python has its name from 3.13 on


def buffer_bytes(ranks: int) -> int:
    return PROGRAMS * 2 * ranks * BLOCK * WORD_BYTES


def message(rank: int, call: int, count: int, dtype: torch.dtype) -> Tensor:
    """No two alike. Thirds where they are rounded well, else small integers."""
    x = torch.randint(-20, 20, (count,), generator=torch.Generator().manual_seed(1000 * call + rank)).to(dtype)
    return x if dtype == torch.bfloat16 else x / 3


def summed(messages: list[Tensor]) -> Tensor:
    total = messages[0].float()
    for one in messages[1:]:
        total = total + one.float()
    return total.to(messages[0].dtype)


def low_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As torch.zeros, in memory below 2^31."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_32BIT
    low = torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags), dtype=dtype).view(shape)
    assert low.data_ptr() < 1 << 31
    return low


class ByHand:
    """Rank 0 of several: its peers are whoever calls `send`."""

    def __init__(
        self, ranks: int, dtype: torch.dtype, calls_before: int = 0, zeros: Callable[..., Tensor] = torch.zeros
    ) -> None:
        self.dtype, self.ranks = dtype, ranks
        self.buffers = [zeros((PROGRAMS, 2, ranks, BLOCK), dtype=torch.int64) for _ in range(ranks)]
        addresses = tuple(buffer.data_ptr() for buffer in self.buffers)
        self.sum = FlaggedSum(addresses, 0, buffer_bytes(ranks), CPU)
        self.sum._counts += calls_before

    def words(self, x: Tensor, call: int) -> Tensor:
        """[programs, BLOCK] of message x."""
        per_word = 4 // x.element_size()
        programs = -(-len(x) // (BLOCK * per_word))
        padded = torch.zeros(programs * BLOCK * per_word, dtype=x.dtype)
        padded[: len(x)] = x
        data = padded.view(torch.int32).long() & 0xFFFFFFFF
        return (data | call << 32).view(programs, BLOCK)

    def send(self, x: Tensor, rank: int, call: int, to: int = 0) -> Tensor:
        """x from rank; the place where it lies."""
        words = self.words(x, call)
        place = self.buffers[to][: len(words), call & 1, rank]
        place.copy_(words)
        return place

    def start(self, x: Tensor) -> Callable[..., bool]:
        """Sum x in place meanwhile. Returns: whether that is over; True waits for it."""
        thread = threading.Thread(target=self.sum, args=(x,), daemon=True)
        thread.start()

        def over(wait: bool) -> bool:
            thread.join(20 if wait else 0.3)
            return not thread.is_alive()

        return over


@INTERPRETED
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there memory is to be had below 2^31")
def test_memory_at_addresses_of_32_bits_is_written_too() -> None:
    here = ByHand(2, torch.float32, zeros=low_zeros)
    messages = [message(rank, 0, 5, torch.float32) for rank in range(2)]
    here.send(messages[1], 1, 1)
    assert torch.equal(here.sum(messages[0].clone()), summed(messages))
    assert torch.equal(here.buffers[1][0, 1, 0], here.words(messages[0], 1)[0])


@INTERPRETED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", (2, 4))
def test_what_is_sent_and_what_is_summed(dtype: torch.dtype, ranks: int) -> None:
    """Several calls of several sizes: whole and broken blocks, a number of elements that fills no word."""
    here, per_word = ByHand(ranks, dtype), 4 // dtype.itemsize
    calls = [0] * PROGRAMS
    for number, count in enumerate((1, BLOCK * per_word, 5, 2 * BLOCK * per_word + 3, BLOCK * per_word * PROGRAMS, 7)):
        messages = [message(rank, number, count, dtype) for rank in range(ranks)]
        for program in range(-(-count // (BLOCK * per_word))):  # each counts its own calls
            calls[program] += 1
            part = slice(program * BLOCK * per_word, (program + 1) * BLOCK * per_word)
            for rank in range(1, ranks):
                here.buffers[0][program, calls[program] & 1, rank] = here.words(messages[rank][part], calls[program])
        assert torch.equal(here.sum(messages[0].clone()), summed(messages))
        for program in range(-(-count // (BLOCK * per_word))):
            part = slice(program * BLOCK * per_word, (program + 1) * BLOCK * per_word)
            words = here.words(messages[0][part], calls[program])
            for rank in range(1, ranks):
                assert torch.equal(here.buffers[rank][program, calls[program] & 1, 0], words[0])
        assert here.sum._counts.tolist() == calls
    with pytest.raises(AssertionError, match="do not fit"):
        here.sum(torch.zeros(BLOCK * per_word * PROGRAMS + 1, dtype=dtype))


@INTERPRETED
@pytest.mark.parametrize("calls_before", (0, 2**31 - 3, -3), ids=("first", "past 2^31", "past 2^32"))
def test_no_word_of_another_call_is_taken(calls_before: int) -> None:
    """A peer's words come one call after the other, some of them late."""
    here = ByHand(3, torch.float16, calls_before)
    for number in range(1, 5):
        call = (calls_before + number + 2**31) % 2**32 - 2**31  # as int32
        messages = [message(rank, number, 20, torch.float16) for rank in range(3)]
        x = messages[0].clone()
        here.send(messages[1], 1, call)
        over = here.start(x)
        assert not over(wait=False), "summed before rank 2 had sent anything"
        words = here.words(messages[2], call)[0]
        place = here.buffers[0][0, call & 1, 2]
        place[1:] = words[1:]
        assert not over(wait=False) and torch.equal(x, messages[0]), "summed while a word was missing"
        place[0] = words[0]
        assert over(wait=True)
        assert torch.equal(x, summed(messages))


@INTERPRETED
def test_words_that_never_come_are_given_up_where_that_is_asked_for() -> None:
    here = ByHand(2, torch.float32)
    x = message(0, 1, 10, torch.float32)
    assert not torch.equal(here.sum(x.clone(), 50), summed([x, message(1, 1, 10, torch.float32)]))


def rank_of_several(folder: Path, rank: int, ranks: int, dtype: torch.dtype) -> None:
    """Sums of mixed sizes, with pauses of its own: before it sends, and before it looks at what it was sent, where its
    peers may be a call ahead."""
    torch.set_num_threads(1)
    pauses = random.Random(rank)
    received = triton_all_reduce._received

    def received_late(*given):
        time.sleep(pauses.choice((0, 0, 0.02)))
        return received(*given)

    triton_all_reduce._received = received_late
    words = buffer_bytes(ranks) // WORD_BYTES
    files = [str(folder / f"buffer-{one}") for one in range(ranks)]
    buffers = [torch.from_file(file, shared=True, size=words, dtype=torch.int64) for file in files]
    flagged = FlaggedSum(tuple(buffer.data_ptr() for buffer in buffers), rank, buffer_bytes(ranks), CPU)
    sums = []
    for call, count in enumerate(counts(dtype)):
        time.sleep(pauses.choice((0, 0, 0, 0.05)))
        sums.append(flagged(message(rank, call, count, dtype)))
    torch.save(sums, folder / f"sums-{rank}")


def counts(dtype: torch.dtype) -> list[int]:
    largest = PROGRAMS * BLOCK * (4 // dtype.itemsize)
    return [random.Random(call).choice((3, largest // 3, largest // 2 + 1, largest)) for call in range(CALLS)]


@INTERPRETED
@pytest.mark.parametrize(
    ("ranks", "dtype"), ((2, torch.float16), pytest.param(3, torch.float32, marks=pytest.mark.slow))
)
def test_ranks_that_are_processes(ranks: int, dtype: torch.dtype, tmp_path: Path) -> None:
    for rank in range(ranks):
        (tmp_path / f"buffer-{rank}").write_bytes(bytes(buffer_bytes(ranks)))
    name = str(dtype).removeprefix("torch.")
    path = [str(Path(compiled.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "1"}
    commands = [[sys.executable, __file__, str(tmp_path), str(rank), str(ranks), name] for rank in range(ranks)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        assert [process.wait(120) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    everyone = [torch.load(tmp_path / f"sums-{rank}") for rank in range(ranks)]
    for call, count in enumerate(counts(dtype)):
        expected = summed([message(rank, call, count, dtype) for rank in range(ranks)])
        assert all(torch.equal(sums[call], expected) for sums in everyone), f"call {call} of {count}"


def test_the_largest_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the buffer holds, unless fewer programs run at the same time; nothing where there is no such GPU."""
    capability, processors = (9, 0), 132
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_all_reduce, "processors", lambda device: processors)
    device = torch.device("cuda", 0)
    largest = triton_all_reduce.largest_bytes
    assert [largest(device, ranks, 2 << 20) >> 10 for ranks in (2, 4, 8)] == [256, 128, 64]
    counted = [flagged_limit_bytes(ranks) for ranks in (2, 4, 8)]  # by the estimate of a step
    assert counted == [largest(device, ranks, FLAGGED_BYTES) for ranks in (2, 4, 8)]
    processors = 8
    assert largest(device, 2, 2 << 20) == 16 * 8 * BLOCK * 4
    capability = (7, 5)
    assert largest(device, 2, 2 << 20) == 0 == largest(CPU, 2, 2 << 20)


COMPILE = """
import triton
from gptoss_launch.parallel.kernels.triton_all_reduce import BLOCK, WARPS, _flagged_all_reduce
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for ranks, dtype, capability in ((2, "bf16", 90), (8, "bf16", 90), (2, "fp16", 80), (3, "fp32", 90)):
    types = {"x": "*" + dtype, "counts": "*i32", "addresses": ("i64",) * ranks, "count": "i32"}
    fixed = {"RANK": 1, "PER_WORD": 1 if dtype == "fp32" else 2, "BLOCK": BLOCK}
    fixed |= {"MOST_POLLS": 1000 if ranks == 3 else 0, "EARLY": capability >= 90}
    signature = types | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(_flagged_all_reduce, signature, fixed, {(0,): [["tt.divisibility", 16]]})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    accesses = [line.split("[")[0].split("{")[0].strip() for line in compiled.asm["ptx"].splitlines()]
    of_words = [one for one in accesses if ".b64" in one and ".global" in one]
    print(ranks, compiled.metadata.shared, len(of_words), *sorted(set(of_words)))
"""


@pytest.mark.slow
def test_words_are_never_cut_nor_kept(tmp_path: Path) -> None:
    """Compiled, every access to words is of two whole ones, 16 bytes; loads are volatile, before the loop and in it;
    stores go through to the peer's memory."""
    peers = {2: 1, 3: 2, 8: 7}
    lines = [line.split(maxsplit=3) for line in compiled.lines_of(COMPILE, tmp_path)]
    assert len(lines) == 4
    for ranks, shared_bytes, accesses, kinds in lines:
        assert kinds == "ld.volatile.global.v2.b64 st.global.wt.v2.b64"
        assert int(accesses) == 3 * peers[int(ranks)] and shared_bytes == "0"


if __name__ == "__main__":
    rank_of_several(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4]))

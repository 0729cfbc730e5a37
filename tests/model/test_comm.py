"""Which way a message between linked GPUs goes, without any: what each way takes, and how the fastest is kept."""

from collections.abc import Callable

import pytest
import torch
from gptoss_launch.parallel.kernels.sums import Exchange, Message
from gptoss_launch.parallel.model import calibrate, comm
from gptoss_launch.parallel.model.comm import (
    WAYS,
    Alone,
    Comm,
    Group,
    Limits,
    Linked,
    Marked,
    Sums,
    flagged_flaw,
    message_sizes,
    way_for,
)
from torch import Tensor

BUFFER_BYTES, FLAGGED_LIMIT_BYTES, PROCESSORS = 1 << 20, 256 << 10, 100
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Unlinked(Linked):
    """That there is no memory of others behind it only shows in the sums: here they are the way's name."""

    def __init__(self, flagged_limit_bytes: int = FLAGGED_LIMIT_BYTES) -> None:
        self.limits: Limits = ()
        self.taken: list[str] = []
        self._buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
        self._flagged_limit_bytes = flagged_limit_bytes
        here = Exchange((0, 16, 32), 1, torch.zeros(1, dtype=torch.int32))
        self._inside = lambda message: here if message.processors <= PROCESSORS else None

    def all_reduce_by(self, way: str, x: Tensor) -> Tensor:
        self.taken.append(way)
        return x


def ways(linked: Linked, size_bytes: int, dtype: torch.dtype) -> set[str]:
    return {way for way in WAYS if linked.takes(way, torch.empty(size_bytes // dtype.itemsize, dtype=dtype))}


def test_what_each_way_takes() -> None:
    shots = {"one_shot", "two_shot"}
    assert [ways(Unlinked(), 1024, dtype) - {"group"} for dtype in DTYPES] == [
        {"flagged", *shots},
        {"flagged"},
        {"flagged", *shots},
        set(),
    ]
    assert ways(Unlinked(), FLAGGED_LIMIT_BYTES, torch.bfloat16) == set(WAYS)
    assert ways(Unlinked(), FLAGGED_LIMIT_BYTES + 8, torch.bfloat16) == {"group", *shots}
    assert ways(Unlinked(), BUFFER_BYTES + 8, torch.bfloat16) == {"group"}
    assert ways(Unlinked(0), 2, torch.bfloat16) == {"group", *shots}, "where Triton does not run"


def test_what_a_way_does_not_take_goes_through_the_group() -> None:
    linked = Unlinked()
    linked.limits = ((BUFFER_BYTES, "flagged"),)
    for dtype in DTYPES:
        linked.all_reduce(torch.empty(8, dtype=dtype))
    linked.all_reduce(torch.empty(FLAGGED_LIMIT_BYTES, dtype=torch.bfloat16))
    assert linked.taken == ["flagged"] * 3 + ["group"] * 2


class Noted:
    def __init__(self) -> None:
        self.noted: list[str] = []

    def collective_begins(self) -> None:
        self.noted.append("begins")

    def collective_ends(self) -> None:
        self.noted.append("ends")


def exchanged(comm: Comm, elements: int, dtype: torch.dtype, processors: int = PROCESSORS) -> Exchange | None:
    with comm.exchange(Message("experts", elements, dtype, -(-elements // 16), 16, processors)) as exchange:
        return exchange


def test_a_kernel_exchanges_what_would_go_the_flagged_way() -> None:
    linked, size = Unlinked(), 5760
    here = exchanged(linked, size // 2, torch.bfloat16)
    assert here is None, "the group's"
    linked.limits = ((size, "flagged"), (BUFFER_BYTES, "one_shot"))
    here = exchanged(linked, size // 2, torch.bfloat16)
    assert here is not None and (here.rank, len(here.addresses)) == (1, 3)
    assert exchanged(linked, size // 2 + 1, torch.bfloat16) is None, "torch's"
    assert exchanged(linked, size // 2, torch.float32) is None and exchanged(linked, size // 4, torch.float32)
    assert exchanged(linked, 8, torch.float64) is None
    assert exchanged(linked, size // 2, torch.bfloat16, PROCESSORS + 1) is None, "fewer multiprocessors"
    for other in (Alone(), Group(), Sums(linked)):
        assert exchanged(other, size // 2, torch.bfloat16) is None
    linked = Unlinked(0)
    linked.limits = ((size, "flagged"),)
    assert exchanged(linked, size // 2, torch.bfloat16) is None, "where words with flags do not work"


def test_an_exchange_is_marked_while_it_lasts() -> None:
    linked, marks = Unlinked(), Noted()
    marked, message = Marked(linked, marks), Message("experts", 32, torch.bfloat16, 2, 16, 1)
    with marked.exchange(message) as exchange:
        assert exchange is None and marks.noted == []
    linked.limits = ((BUFFER_BYTES, "flagged"),)
    with marked.exchange(message) as exchange:
        assert exchange is not None and marks.noted == ["begins"]
    assert marks.noted == ["begins", "ends"]


def test_calibration_keeps_the_fastest_of_what_can_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the flagged way always the fastest: it is kept as far as it goes."""
    seconds = {"flagged": 1.0, "two_shot": 2.0, "one_shot": 3.0, "group": 4.0}
    monkeypatch.setattr(calibrate, "_seconds", lambda linked, way, message: seconds[way])
    limits = calibrate.measure(Unlinked(), BUFFER_BYTES, torch.device("cpu"))
    assert limits == ((FLAGGED_LIMIT_BYTES, "flagged"), (BUFFER_BYTES, "two_shot"))
    assert [way_for(size, limits) for size in (1, FLAGGED_LIMIT_BYTES + 1)] == ["flagged", "two_shot"]
    assert list(message_sizes(9000)) == [2048, 4096, 8192, 9000]


def test_sums_with_flags_are_checked_before_they_are_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rank 1 of 3 sees it, whose peers' messages follow from its own."""
    others_are_well = True
    monkeypatch.setattr(comm, "least", lambda number: number if others_are_well else 0)

    def flaw(flagged: Callable[[Tensor, int], Tensor]) -> str | None:
        return flagged_flaw(flagged, FLAGGED_LIMIT_BYTES, 1, 3, torch.device("cpu"))

    def right(x: Tensor, most_polls: int) -> Tensor:
        calls.append(len(x))
        assert x.dtype == torch.bfloat16 and most_polls > 0
        return 3 * x

    def late(x: Tensor, most_polls: int) -> Tensor:
        return right(x, most_polls) - int(len(calls) == 30)

    def broken(x: Tensor, most_polls: int) -> Tensor:
        raise RuntimeError("no such instruction")

    calls: list[int] = []
    assert flaw(right) is None and max(calls) * 2 == FLAGGED_LIMIT_BYTES and len(calls) > 30
    calls.clear()
    assert flaw(late) == f"wrong sums of {FLAGGED_LIMIT_BYTES // 4} values"
    assert flaw(lambda x, most_polls: x) == "wrong sums of 2 values"
    assert flaw(broken) == "RuntimeError: no such instruction"
    others_are_well = False
    assert flaw(right) == "another rank refused"

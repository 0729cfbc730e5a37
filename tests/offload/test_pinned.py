"""Pinned memory is locked for as long as its tensor is there, in pages of its own; what is refused is said."""

import gc
import mmap
from types import SimpleNamespace

import pytest
import torch
from gptoss_launch.parallel.offload.pinned import MAPPED, NotPinnedError, Pins, pinned
from small_models import GPU


class Runtime:
    """CUDA's, as far as it is asked here. locked: address -> bytes. refuses: the code that it answers with."""

    def __init__(self, refuses: int = 0) -> None:
        self.locked: dict[int, int] = {}
        self.refuses = refuses

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == 0 and address not in self.locked and flags == MAPPED
        if not self.refuses:
            self.locked[address] = size
        return self.refuses

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def fake(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> list[str]:
    """What else of CUDA was called."""
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("synchronize"))
    return called


def test_a_lock_goes_with_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    called = fake(monkeypatch, runtime)
    tensors = [torch.arange(count, dtype=torch.int16).view(2, -1) for count in (10, 5000)]
    copies = [pinned(tensor) for tensor in tensors]
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    assert runtime.locked == {copy.data_ptr(): copy.nbytes for copy in copies}
    view = copies.pop(0)[1]  # the memory stays, and its lock goes
    gc.collect()
    assert runtime.locked == {copies[0].data_ptr(): copies[0].nbytes} and view.tolist() == [5, 6, 7, 8, 9]
    copies.clear()
    gc.collect()
    assert runtime.locked == {} and called == ["synchronize"] * 2


def test_a_refusal_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, Runtime(refuses=2))
    asked = SimpleNamespace(zeros=0)
    zeros = torch.zeros

    def on_gpu(*shape: int, device: str) -> torch.Tensor:  # where CUDA's last error comes up
        assert device == "cuda"
        asked.zeros += 1
        zeros(*shape)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", on_gpu)
    with pytest.raises(NotPinnedError, match="4 bytes of host memory cannot be pinned: CUDA error 2"):
        pinned(torch.tensor([1], dtype=torch.int32))
    assert asked.zeros == 1
    slow: list[str] = []
    pins, tensors = Pins(slow), [torch.arange(count) for count in (3, 4)]
    assert [pins(tensor) is tensor for tensor in tensors] == [True, True]  # as they are, and the system is asked once
    assert asked.zeros == 2 and len(slow) == 1 and "24 bytes of host memory cannot be pinned" in slow[0]


def test_what_is_granted_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until one is refused: what was locked before stays so."""
    runtime = Runtime()
    fake(monkeypatch, runtime)
    monkeypatch.setattr("gptoss_launch.parallel.offload.pinned._forget_error", lambda: None)
    slow: list[str] = []
    pins, tensor = Pins(slow), torch.arange(5)
    copy = pins(tensor)
    assert list(runtime.locked) == [copy.data_ptr()] and torch.equal(copy, tensor) and slow == []
    runtime.refuses = 2
    assert pins(tensor) is tensor and len(slow) == 1 and list(runtime.locked) == [copy.data_ptr()]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_the_same_memory_can_be_pinned_again_and_copied_from(device: str) -> None:
    for round in range(20):
        copies = [pinned(torch.full((1 << 20,), round + place, dtype=torch.uint8)) for place in range(3)]
        assert all(copy.is_pinned() for copy in copies)
        plain = torch.full((1 << 20,), round, dtype=torch.uint8)  # memory that was pinned in the round before, perhaps
        assert all(
            torch.equal(one.to(device, non_blocking=True).cpu(), one.clone()) for one in (*copies, plain, plain[5:])
        )

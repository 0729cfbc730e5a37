"""Boxes of tensors, read ahead: the bytes of the file, in the order asked for, whatever way they are read."""

import itertools
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.model import files
from gptoss_launch.parallel.model.files import Box, mapped, read_ahead
from gptoss_launch.parallel.offload.pinned import NotPinnedError
from gptoss_launch.parallel.planning.headers import Entry, read_inventory
from safetensors.torch import save_file
from small_models import GPU
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.randint(0, 256, (7,), generator=generator, dtype=torch.uint8),
        "cube": torch.randint(0, 256, (5, 6, 7, 3), generator=generator, dtype=torch.uint8),
        "matrix": torch.randn((40, 33), generator=generator).bfloat16(),
    }
    save_file(tensors, folder / "model.safetensors")
    return read_inventory(folder), tensors


def boxes_of(inventory: dict[str, Entry]) -> list[Box]:
    """All, the first, the last and some of each dim, in all combinations."""
    made = []
    for entry in inventory.values():
        cuts = [(slice(0, size), slice(0, 1), slice(size - 1, size), slice(1, size - 1)) for size in entry.shape]
        made += [Box(entry, slices) for slices in itertools.product(*cuts)]
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run_bytes", [1, 20, 1 << 16])
def test_what_is_read_is_what_is_there(
    run_bytes: int,
    device: str,
    written: tuple[dict[str, Entry], dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many boxes in a group, and many more groups than buffers, which are copied from without waiting."""
    monkeypatch.setattr(files, "RUN_BYTES", run_bytes)
    inventory, tensors = written
    names = {entry: name for name, entry in inventory.items()}
    groups = [(), *((box,) for box in boxes_of(inventory)), tuple(boxes_of(inventory)), ()]
    found = []
    with read_ahead(groups, torch.device(device)) as read:
        for parts in read:
            found.append([part.to(device, non_blocking=True, copy=True) for part in parts])
    assert len(found) == len(groups) and len(groups) > 2 * files.BUFFERS
    for boxes, parts in zip(groups, found, strict=True):
        for box, part in zip(boxes, parts, strict=True):
            assert torch.equal(part.cpu(), tensors[names[box.entry]][box.slices])
            assert box.nbytes == part.nbytes and box.shape == part.shape


class LateCopies:
    """A GPU's stream: copies are done when somebody waits for an event after them, and no earlier."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, list[Tensor]]] = []
        self.lock = threading.Lock()

    def event(self, blocking: bool) -> "LateEvent":
        return LateEvent(self)

    def copy(self, part: Tensor, into: list[Tensor]) -> None:
        with self.lock:
            self.waiting.append((part, into))

    def work(self, until: int) -> None:
        with self.lock:
            for place, (part, into) in enumerate(self.waiting[:until]):
                if not into:
                    into.append(part.clone())
                self.waiting[place] = (torch.empty(0), into)


class LateEvent:
    def __init__(self, stream: LateCopies) -> None:
        self.stream, self.after = stream, 0

    def record(self, stream: object) -> None:
        self.after = len(self.stream.waiting)

    def synchronize(self) -> None:
        self.stream.work(self.after)


@pytest.mark.parametrize("refused", [False, True])
def test_a_buffer_is_read_into_when_copies_from_it_are_done(
    refused: bool, written: tuple[dict[str, Entry], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, pinned or not, with threads that read several groups at a time."""
    stream, pins, devices = LateCopies(), list[int](), list[torch.device]()

    def pinned(tensor: Tensor) -> Tensor:
        if refused:
            raise NotPinnedError("refused")
        pins.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(files, "pinned", pinned)
    inventory, tensors = written
    names = {entry: name for name, entry in inventory.items()}
    groups = [(box,) for box in boxes_of(inventory)] * 3
    found: list[list[Tensor]] = [[] for _ in groups]
    with pytest.warns(UserWarning, match="in two steps: refused") if refused else nullcontext():
        with read_ahead(groups, torch.device("cuda", 1)) as read:
            for (part,), into in zip(read, found, strict=True):
                stream.copy(part, into)
            stream.work(len(groups))
    for (box,), (part,) in zip(groups, found, strict=True):
        assert torch.equal(part, tensors[names[box.entry]][box.slices])
    assert len(pins) == (0 if refused else files.BUFFERS) and len(set(pins)) <= 1
    assert set(devices) == {torch.device("cuda", 1)}


def test_runs(written: tuple[dict[str, Entry], dict[str, Tensor]]) -> None:
    cube = written[0]["cube"]
    for slices, runs in (
        ((slice(0, 5), slice(0, 6), slice(0, 7), slice(0, 3)), (1, 630)),
        ((slice(1, 3), slice(0, 6), slice(0, 7), slice(0, 3)), (1, 252)),
        ((slice(1, 2), slice(2, 5), slice(0, 7), slice(0, 3)), (1, 63)),
        ((slice(0, 5), slice(2, 5), slice(0, 7), slice(0, 3)), (5, 63)),
        ((slice(0, 5), slice(0, 6), slice(0, 4), slice(0, 3)), (30, 12)),
        ((slice(0, 2), slice(0, 6), slice(0, 7), slice(1, 2)), (84, 1)),
    ):
        box = Box(cube, slices)
        assert box.runs() == runs and len(list(box.offsets())) == runs[0]


def test_a_view_of_a_file_is_its_own(written: tuple[dict[str, Entry], dict[str, Tensor]]) -> None:
    inventory, tensors = written
    for name, tensor in tensors.items():
        mapped(inventory[name]).zero_()
        assert torch.equal(mapped(inventory[name]), tensor)


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    """Also while others are read, and with buffers to come."""
    save_file(
        {str(number): torch.zeros(1000, dtype=torch.uint8) for number in range(9)}, tmp_path / "model.safetensors"
    )
    inventory = read_inventory(tmp_path)
    groups = [(Box(entry, (slice(0, 1000),)),) for _, entry in sorted(inventory.items())]
    last = max(entry.start_bytes for entry in inventory.values())
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(last + 10)
    said = f"model.safetensors ends at byte {last + 10}, "
    with pytest.raises(UserError, match=said):
        mapped(max(inventory.values(), key=lambda entry: entry.start_bytes))
    with pytest.raises(UserError, match=said):
        with read_ahead(groups, torch.device("cpu")) as read:
            for _ in read:
                pass

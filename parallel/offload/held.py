"""Where offloaded experts are, on the device and on the host, and how they get there while weights are loaded.

Experts on the host are in the layout of the kernels, so that a copy of one is a copy and nothing else; or in the mapped
file; or as the CPU reads them. Does not know what becomes of them in a step.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import Operations
from ..kernels import experts as plain
from ..kernels.experts import Layout, Packed, Shape
from ..planning.plan import Offload
from .pinned import Pins

PARTS = ("blocks", "scales", "bias")  # of a Packed; the first dim counts experts
Parts = tuple[Tensor, ...]  # of one expert, in this order


@dataclass
class Slots:
    """Which experts of a layer are on the device, and since when unused: the last ones were used last.

    ready: an event of each slot on a GPU: its weights are there. free: one on a GPU: nobody reads any slot any more.
    coming: slots whose weights nobody has waited for yet. ahead: experts that came before they were asked for, and have
    not been asked for yet.
    """

    places: OrderedDict[int, int]
    ready: list[torch.cuda.Event]
    free: "torch.cuda.Event | None"
    coming: set[int] = field(default_factory=set, init=False)
    ahead: set[int] = field(default_factory=set, init=False)


@dataclass(frozen=True)
class Held(Packed):
    """One product of a layer's experts on the device, at most `len(blocks)` of them, in the layout of the kernels
    (packed), and on the host. Host experts are all of the layer's, or those of host_places.

    repacks: those on the host are in the checkpoint's layout, and a copy has to be brought into the kernels'.
    of_slot, of_host, of_whole: the parts of each expert in packed, host and whole, as what is copied in every step must
    not be looked up in each.

    device_places, host_places: int64 [E], where each expert is; -1: not there. The first on the device, the second on
    the CPU, and both only where places never change. layer: counted from 0. whole: room on the device for all of a
    layer's experts, one for all layers: None where nothing is copied, or experts are read one by one anyway.
    """

    packed: Packed
    whole: Packed | None
    host: Packed
    repacks: bool
    of_slot: Sequence[Parts]
    of_host: Sequence[Parts]
    of_whole: Sequence[Parts]
    slots: Slots
    device_places: Tensor
    host_places: Tensor
    layer: int


class Holder:
    """The layout of an offloaded model's experts: gate_up and down of each layer come in turn, with experts on the
    host. Held.bias is that of all of a layer's experts there."""

    def __init__(self, offload: Offload, ops: Operations, device: torch.device, slow: list[str]) -> None:
        self._pins = Pins(slow)
        self._offload, self._ops, self._device, self._calls = offload, ops, device, 0
        self._slots: Slots | None = None
        self._whole: list[Packed | None] = []  # of gate_up and of down
        self.layout = Layout(self._pack, self._room, self._put)

    def _pack(self, blocks: Tensor, scales: Tensor, bias: Tensor) -> Held:
        """Of views into the mapped file, which stay there."""
        assert self._offload.taken.kept == "file"
        count, out, row_blocks = scales.shape
        whole = Packed(blocks, scales, _read_by_cpu(bias, self._offload))
        held = self._held(whole, (count, out, row_blocks), bias)
        for expert in held.slots.places:
            self._put(held, expert, blocks[expert], scales[expert])
        return held

    def _room(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Held:
        """In host memory: experts in the layout of the kernels, so that a copy of one is a copy and nothing else; or
        those that the CPU computes, as it reads them."""
        way, on_host = self._offload.taken, torch.device("cpu")
        bias = torch.empty(shape[:2], dtype=dtype)
        if way.misses == "copied":
            whole = self._ops.layout.room(shape, dtype, on_host)
            parts = {part: self._pinned(getattr(whole, part)) for part in PARTS}
            whole = dataclasses.replace(whole, **parts)
        else:
            whole = plain.room((shape[0] - len(self._hot()), *shape[1:]), dtype, on_host)
            whole = dataclasses.replace(whole, bias=_read_by_cpu(whole.bias, self._offload))
        return self._held(whole, shape, bias)

    def _put(self, held: Packed, place: int, blocks: Tensor, scales: Tensor) -> None:
        """place: the number of the expert."""
        assert isinstance(held, Held)
        way, slot, bias = self._offload.taken, held.slots.places.get(place), held.bias[place]
        if slot is not None:
            self._ops.layout.put(held.packed, slot, blocks, scales)
            held.packed.bias[slot] = bias.to(self._device)
        if way.kept == "file":
            return
        if way.misses == "copied":
            one = self._one(blocks, scales, bias) if slot is None else held.packed
            for part in PARTS:
                getattr(held.host, part)[place].copy_(getattr(one, part)[slot or 0])
        elif slot is None:
            there = int(held.host_places[place])
            plain.put(held.host, there, blocks, scales)
            held.host.bias[there] = bias

    def _one(self, blocks: Tensor, scales: Tensor, bias: Tensor) -> Packed:
        """On the device, whose room is planned for no more."""
        return self._ops.layout.pack(blocks[None], scales[None], bias[None].to(self._device))

    def _pinned(self, tensor: Tensor) -> Tensor:
        return self._pins(tensor) if self._device.type == "cuda" else tensor

    def _hot(self) -> tuple[int, ...]:
        """Those of this layer that are on the device at the beginning, in the order of their slots."""
        hot = self._offload.hot
        return hot[self._calls // 2] if hot else tuple(range(self._offload.taken.slots))

    def _held(self, whole: Packed, shape: Shape, bias: Tensor) -> Held:
        """With nothing on the device yet. whole: on the host, with what will be there."""
        way, count = self._offload.taken, shape[0]
        hot, layer = self._hot(), self._calls // 2
        if self._calls < 2:
            gathers = way.misses == "copied" and self._ops.experts is not plain.experts
            self._whole.append(self._ops.layout.room(shape, bias.dtype, self._device) if gathers else None)
        whole_layer = self._whole[self._calls % 2]
        self._calls += 1
        if self._slots is None:  # shared by both products of a layer
            on_gpu = self._device.type == "cuda"
            ready, free = [torch.cuda.Event() for _ in hot if on_gpu], torch.cuda.Event() if on_gpu else None
            slots = self._slots = Slots(OrderedDict((expert, slot) for slot, expert in enumerate(hot)), ready, free)
            slots.places = OrderedDict(reversed(slots.places.items()))  # the most used one is given up last
        else:
            slots, self._slots = self._slots, None
        device_places = torch.full((count,), -1, dtype=torch.int64)
        device_places[list(hot)] = torch.arange(len(hot))
        others = [expert for expert in range(count) if expert not in set(hot)]
        host_places = torch.full((count,), -1, dtype=torch.int64)
        fewer = way.misses == "computed" and way.kept == "memory"
        host_places[others] = torch.arange(len(others)) if fewer else torch.tensor(others, dtype=torch.int64)
        packed = self._ops.layout.room((len(hot), *shape[1:]), bias.dtype, self._device)
        empty = torch.empty((0,), device=self._device)
        repacks = way.misses == "copied" and way.kept == "file"
        return Held(
            empty,
            empty,
            bias,
            packed,
            whole_layer,
            whole,
            repacks,
            by_expert(packed),
            by_expert(whole),
            () if whole_layer is None else by_expert(whole_layer),
            slots,
            device_places.to(self._device),
            host_places,
            layer,
        )


def by_expert(packed: Packed) -> tuple[Parts, ...]:
    return tuple(zip(*(getattr(packed, part).unbind() for part in PARTS), strict=True))


def _read_by_cpu(bias: Tensor, offload: Offload) -> Tensor:
    """As its experts read it, if they compute anything."""
    return bias.float() if offload.taken.misses == "computed" and bias.dtype == torch.float16 else bias

"""The mixture of experts where the device holds only some of them, as the plan's `offload` says.

Two ways, with the signature and meaning of `kernels.experts.experts`. Copied: a layer's slots on the device are a
cache; what a step needs and the cache has not is copied from the host in place of what was unused for longest, on a
stream of its own, while experts that are there already compute. Computed: the slots never change, and the CPU computes
the others while the device computes its own. Works on any device, so that all of it can be tried without a GPU. Does
not know how the plan was chosen, nor anything of layers but the order in which they are loaded.
"""

import dataclasses
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import PLAIN, Operations
from ..kernels import experts as plain
from ..kernels.experts import Layout, Packed, Shape
from ..kernels.precision import wide
from ..planning.plan import Offload
from .counts import Counts
from .pinned import Pins

PARTS = ("blocks", "scales", "bias")  # of a Packed; the first dim counts experts
Parts = tuple[Tensor, ...]  # of one expert, in this order
GUESSED_TOKENS = 4  # of a step: with more, most experts are needed anyway
GUESSED_BESIDES = 2  # the likeliest ones are often there already


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


class Layer(Protocol):
    """What is needed of a layer to guess which experts it will choose, and to bring them in. Both are Held."""

    @property
    def mlp_norm_H(self) -> Tensor: ...
    @property
    def router_EH(self) -> Tensor: ...
    @property
    def router_bias_E(self) -> Tensor: ...
    @property
    def gate_up(self) -> Packed: ...
    @property
    def down(self) -> Packed: ...


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
            _by_expert(packed),
            _by_expert(whole),
            () if whole_layer is None else _by_expert(whole_layer),
            slots,
            device_places.to(self._device),
            host_places,
            layer,
        )


def _by_expert(packed: Packed) -> tuple[Parts, ...]:
    return tuple(zip(*(getattr(packed, part).unbind() for part in PARTS), strict=True))


def _copy_one(source: Parts, target: Parts) -> None:
    for here, there in zip(source, target, strict=True):
        there.copy_(here, non_blocking=True)


def _read_by_cpu(bias: Tensor, offload: Offload) -> Tensor:
    """As its experts read it, if they compute anything."""
    return bias.float() if offload.taken.misses == "computed" and bias.dtype == torch.float16 else bias


class Stalls:
    """For how long the device waits between `begin` and `end`, of which it is told on its own stream; added to the
    counts once it has come that far. On the CPU a copy is done when it returns, and what it took is no waiting."""

    def __init__(self, counts: Counts, on_gpu: bool) -> None:
        self._counts, self._on_gpu = counts, on_gpu
        self._begun: torch.cuda.Event | None = None
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self) -> None:
        if self._on_gpu:
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()

    def end(self) -> None:
        if self._begun is None:
            return
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        self._pairs.append((self._begun, ended))
        self._begun = None
        while self._pairs and self._pairs[0][1].query():
            began, ended = self._pairs.popleft()
            self._counts.stalled_s += began.elapsed_time(ended) / 1e3


@dataclass(frozen=True)
class Copied:
    """Experts through the cache. ops: those of the device. stream: for copies; None on the CPU. ahead: as Offload's.
    layers: given once all are loaded."""

    ops: Operations
    counts: Counts
    stream: "torch.cuda.Stream | None"
    stalls: "Stalls"
    ahead: int = 0
    layers: list[Layer] = field(default_factory=list)

    def __call__(
        self,
        x_TH: Tensor,
        weights_TX: Tensor,
        experts_TX: Tensor,
        gate_up: Held,
        down: Held,
        first_expert: int,
        limit: float,
    ) -> Tensor:
        began_s = time.perf_counter()
        guesses_TX = self._guess(x_TH, gate_up.layer)
        chosen = experts_TX.flatten()
        told = (chosen if guesses_TX is None else torch.cat([chosen, guesses_TX.T.flatten()])).tolist()  # at one go
        chosen, guessed = told[: len(chosen)], told[len(chosen) :]
        self.counts.waited_s += time.perf_counter() - began_s
        routed = x_TH, weights_TX, experts_TX
        if gate_up.whole is None or down.whole is None:
            out_TH = self._one_by_one(*routed, sorted(set(chosen)), gate_up, down, limit)
        elif len(chosen) <= len(gate_up.slots.places):  # not each once: more of them for few slots are another kernel's
            out_TH = self._from_slots(*routed, chosen, gate_up, down, limit)
        else:
            self._gather(sorted(set(chosen)), (gate_up, down))
            out_TH = self.ops.experts(*routed, gate_up.whole, down.whole, 0, limit)
        if guessed:
            self._bring_ahead(list(dict.fromkeys(guessed)), self.layers[gate_up.layer + 1])
        return out_TH

    def _one_by_one(
        self,
        x_TH: Tensor,
        weights_TX: Tensor,
        experts_TX: Tensor,
        wanted: Sequence[int],
        gate_up: Held,
        down: Held,
        limit: float,
    ) -> Tensor:
        """In the order of the plain operation, so that the sums have the same bits."""
        out_TH = torch.zeros(x_TH.shape, dtype=wide(x_TH.dtype), device=x_TH.device)
        slots, packs, room = gate_up.slots, (gate_up.packed, down.packed), len(gate_up.slots.places)
        for start in range(0, len(wanted), room):
            some = wanted[start : start + room]
            places = self._bring(some, gate_up, down)
            for expert in some:
                self._await(slots, places[expert])
                plain.add_expert(out_TH, x_TH, weights_TX, experts_TX == expert, *packs, places[expert], limit)
            self.stalls.end()
            self._release(slots)
        return out_TH.to(x_TH.dtype)

    def _from_slots(
        self,
        x_TH: Tensor,
        weights_TX: Tensor,
        experts_TX: Tensor,
        chosen: Sequence[int],
        gate_up: Held,
        down: Held,
        limit: float,
    ) -> Tensor:
        """Where a slot is only changes addresses: the bits are those of all experts in their places."""
        slots = gate_up.slots
        places = self._bring(sorted(set(chosen)), gate_up, down)
        places_TX = torch.tensor([places[expert] for expert in chosen]).view(experts_TX.shape).to(x_TH.device)
        for place in places.values():
            self._await(slots, place)
        self.stalls.end()
        out_TH = self.ops.experts(x_TH, weights_TX, places_TX, gate_up.packed, down.packed, 0, limit)
        self._release(slots)
        return out_TH

    def _gather(self, wanted: Sequence[int], products: Sequence[Held]) -> None:
        """`wanted` into their places among all of the layer's: kernels that sum up over a token's experts give the same
        bits only if they see them at one go. The cache stays as it is."""
        slots = products[0].slots
        self._missing(wanted, slots)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())  # the layer before has read what is there
        with torch.cuda.stream(self.stream):
            for held in products:
                for expert in wanted:
                    slot, target = slots.places.get(expert), held.of_whole[expert]
                    if slot is None:
                        self._fill(expert, held, target)
                    else:
                        _copy_one(held.of_slot[slot], target)
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        self.stalls.end()

    def _guess(self, x_TH: Tensor, layer: int) -> Tensor | None:
        """What the next layer would choose if its input were this one's, [T, X], the likeliest first; None where it is
        not asked. x_TH has been normed for this layer: the other's factors take the place of its own."""
        if not self.ahead or len(x_TH) > GUESSED_TOKENS or layer + 1 >= len(self.layers):
            return None
        here, then = self.layers[layer], self.layers[layer + 1]
        ratio_H = then.mlp_norm_H / here.mlp_norm_H.where(here.mlp_norm_H != 0, 1.0)
        logits_TE = torch.nn.functional.linear((x_TH * ratio_H).to(x_TH.dtype), then.router_EH, then.router_bias_E)
        return logits_TE.topk(self.ahead + GUESSED_BESIDES, dim=-1).indices

    def _bring_ahead(self, guessed: Sequence[int], then: Layer) -> None:
        """Those that the next layer has not, as many as `ahead`, in place of what was unused for longest; of guesses
        that are there the likeliest are the last to go."""
        gate_up, down = then.gate_up, then.down
        assert isinstance(gate_up, Held) and isinstance(down, Held)
        slots = gate_up.slots
        for expert in reversed(guessed):
            if expert in slots.places:
                slots.places.move_to_end(expert)
        for expert in [expert for expert in guessed if expert not in slots.places][: self.ahead]:
            self._replace(expert, slots, (gate_up, down))
            slots.ahead.add(expert)
            self.counts.ahead += 1

    def _bring(self, wanted: Sequence[int], gate_up: Held, down: Held) -> dict[int, int]:
        """Where each of `wanted` is, or will be when its event comes."""
        slots = gate_up.slots
        missing = self._missing(wanted, slots)
        for expert in wanted:
            if expert in slots.places:
                slots.places.move_to_end(expert)
        for expert in missing:
            self._replace(expert, slots, (gate_up, down))
        return {expert: slots.places[expert] for expert in wanted}

    def _missing(self, wanted: Sequence[int], slots: Slots) -> list[int]:
        """Those of `wanted` that have no slot; all are asked for, and a stall begins if any have none."""
        missing = [expert for expert in wanted if expert not in slots.places]
        self.counts.ahead_hits += len(slots.ahead.intersection(wanted))
        slots.ahead.clear()
        self.counts.hits += len(wanted) - len(missing)
        self.counts.misses += len(missing)
        if missing:
            self.stalls.begin()
        return missing

    def _replace(self, expert: int, slots: Slots, products: Sequence[Held]) -> None:
        """What was unused for longest by `expert`, which has a slot once its copy has begun: where memory for that is
        lacking, the step ends, and the slot holds no expert."""
        gone, place = slots.places.popitem(last=False)
        slots.ahead.discard(gone)
        slots.places[~place] = place  # no expert's number
        slots.places.move_to_end(~place, last=False)
        if self.stream is not None and slots.free is not None:
            self.stream.wait_event(slots.free)  # one that was never recorded is not waited for
        with torch.cuda.stream(self.stream):
            for held in products:
                self._fill(expert, held, held.of_slot[place])
            if slots.ready:
                slots.ready[place].record()
                slots.coming.add(place)
        del slots.places[~place]
        slots.places[expert] = place

    def _fill(self, expert: int, held: Held, target: Parts) -> None:
        """With the host's `expert`, on the device."""
        source = held.of_host[expert]
        self.counts.moved_bytes += sum(part.nbytes for part in source)
        if held.repacks:
            (source,) = _by_expert(self.ops.layout.pack(*(part[None].to(target[0].device) for part in source)))
        _copy_one(source, target)

    def _release(self, slots: Slots) -> None:
        if slots.free is not None:
            slots.free.record()

    def _await(self, slots: Slots, place: int) -> None:
        if place in slots.coming:
            slots.coming.remove(place)
            torch.cuda.current_stream().wait_event(slots.ready[place])


@dataclass(frozen=True)
class Computed:
    """Experts on the device, and the others on the CPU meanwhile. ops: those of the device. on_cpu: as
    `kernels.experts.experts`, on the CPU."""

    ops: Operations
    counts: Counts
    on_cpu: Callable[..., Tensor]

    def __call__(
        self,
        x_TH: Tensor,
        weights_TX: Tensor,
        experts_TX: Tensor,
        gate_up: Held,
        down: Held,
        first_expert: int,
        limit: float,
    ) -> Tensor:
        began_s = time.perf_counter()
        chosen_TX = experts_TX.cpu()
        self.counts.waited_s += time.perf_counter() - began_s
        places_TX = gate_up.host_places[chosen_TX]
        missed_T = (places_TX >= 0).any(1)
        missed = int((places_TX >= 0).sum())
        self.counts.misses += missed
        self.counts.hits += places_TX.numel() - missed
        rows = missed_T.nonzero().squeeze(1)
        # to the CPU before the device begins with its own: a copy waits for all that was begun before it
        x_MH, weights_MX = (part.cpu()[rows] for part in (x_TH.float(), weights_TX)) if missed else (None, None)
        out_TH = torch.zeros(x_TH.shape, dtype=wide(x_TH.dtype), device=x_TH.device)
        if len(gate_up.packed.blocks):
            here_TX = gate_up.device_places[experts_TX]
            out_TH += self.ops.experts(x_TH, weights_TX, here_TX, gate_up.packed, down.packed, 0, limit)
        if x_MH is not None and weights_MX is not None:
            began_s = time.perf_counter()
            y_MH = self.on_cpu(x_MH, weights_MX, places_TX[rows], gate_up.host, down.host, 0, limit)
            self.counts.stalled_s += time.perf_counter() - began_s
            out_TH.index_add_(0, rows.to(x_TH.device), y_MH.to(x_TH.device, out_TH.dtype))
        return out_TH.to(x_TH.dtype)


def offloaded(offload: Offload, ops: Operations, device: torch.device) -> tuple[Operations, Counts, list[str]]:
    """`ops` with experts as `offload` has them, what is counted meanwhile, and slower ways that are taken by need: all
    of them are known when the weights are loaded.

    A new value for each model that is loaded: `pack` counts layers.
    """
    counts, slow = Counts(), list[str]()
    holder = Holder(offload, ops, device, slow)
    if offload.taken.misses == "copied":
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        stalls = Stalls(counts, on_gpu=stream is not None)
        return (
            dataclasses.replace(ops, layout=holder.layout, experts=Copied(ops, counts, stream, stalls, offload.ahead)),
            counts,
            slow,
        )
    from ..kernels.cpu_build import NoLibraryError
    from ..kernels.cpu_experts import cpu_operations

    try:
        on_cpu = cpu_operations().experts
    except NoLibraryError as error:
        on_cpu = PLAIN.experts
        slow.append(f"plain torch experts on the CPU, some 100 times slower: {error}")
    return dataclasses.replace(ops, layout=holder.layout, experts=Computed(ops, counts, on_cpu)), counts, slow


def tell_layers(ops: Operations, layers: Sequence[Layer]) -> None:
    """To experts that are copied: those of the loaded model."""
    if isinstance(ops.experts, Copied):
        ops.experts.layers.extend(layers)

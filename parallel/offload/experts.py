"""The mixture of experts where the device holds only some of them, as the plan's `offload` says.

Two ways, with the signature and meaning of `kernels.experts.experts`. Copied: a layer's slots on the device are a
cache; what a step needs and the cache has not is copied from the host in place of what was unused for longest, on a
stream of its own, while experts that are there already compute. Computed: the slots never change, and the CPU computes
the others while the device computes its own. Works on any device, so that all of it can be tried without a GPU. Does
not know how the plan was chosen, nor anything of layers but the order in which they are loaded.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import PLAIN, Operations, sums
from ..kernels import experts as plain
from ..kernels.experts import Packed
from ..kernels.precision import wide
from ..planning.plan import Offload
from .counts import Counts
from .held import Held, Holder, Parts, Slots, by_expert

GUESSED_TOKENS = 4  # of a step: with more, most experts are needed anyway
GUESSED_BESIDES = 2  # the likeliest ones are often there already


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


def _copy_one(source: Parts, target: Parts) -> None:
    for here, there in zip(source, target, strict=True):
        there.copy_(here, non_blocking=True)


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
        ranks: sums.Ranks | None = None,
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
        return sums.over(ranks, out_TH)

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
            (source,) = by_expert(self.ops.layout.pack(*(part[None].to(target[0].device) for part in source)))
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
        ranks: sums.Ranks | None = None,
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
        return sums.over(ranks, out_TH.to(x_TH.dtype))


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
    from ..kernels.cpu_products import cpu_operations

    try:
        on_cpu = cpu_operations().experts
    except NoLibraryError as error:
        on_cpu = PLAIN.experts
        slow.append(f"plain torch experts on the CPU, some 100 times slower: {error}")
    return dataclasses.replace(ops, layout=holder.layout, experts=Computed(ops, counts, on_cpu)), counts, slow


def loaded(
    ops: Operations, layers: Sequence[Layer], counts: Counts, kernels_fetch: bool
) -> tuple[Operations, Callable[[], Counts]]:
    """`ops` of `offloaded`, once all layers are there, and what tells what has been counted so far.

    kernels_fetch: whether a kernel of ours may run that copies experts from the host. It does where the device can read
    them there, unless experts are to come ahead of their layer.
    """
    if isinstance(ops.experts, Copied):
        ops.experts.layers.extend(layers)
        if kernels_fetch and not ops.experts.ahead:
            from .fetched import fetched

            pairs = [(layer.gate_up, layer.down) for layer in layers]
            by_device = fetched(ops.experts.ops, pairs, layers[0].router_EH.device)
            if by_device is not None:
                return dataclasses.replace(ops, experts=by_device), by_device.counts
    return ops, lambda: counts

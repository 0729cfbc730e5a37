"""Experts that the device itself copies from the host, with the signature and meaning of `kernels.experts.experts`.

As `experts.Copied`, but nothing waits for the host, which does not even learn which experts were needed: steps can be
CUDA graphs. Where host memory is pinned and Triton's kernels run. Does not know how the plan was chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Operations, sums
from ..kernels.experts import Packed
from ..kernels.triton_fetch import COUNTED, Cache, fetch, fits, gather, make_cache
from .counts import Counts
from .held import PARTS, Held


@dataclass(frozen=True)
class Fetched:
    """caches: of the layers in turn. counted_LX: what their kernels leave for the host to read, a step late."""

    ops: Operations
    caches: Sequence[Cache]
    counted_LX: Tensor
    expert_bytes: int

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
        assert gate_up.whole is not None and down.whole is not None
        cache = self.caches[gate_up.layer]
        if experts_TX.numel() <= len(cache.used_S):  # not each once: more of them for few slots are another kernel's
            places_TX = fetch(experts_TX, cache)
            return self.ops.experts(x_TH, weights_TX, places_TX, gate_up.packed, down.packed, 0, limit, ranks)
        gather(experts_TX, cache)
        return self.ops.experts(x_TH, weights_TX, experts_TX, gate_up.whole, down.whole, 0, limit, ranks)

    def counts(self) -> Counts:
        hits, misses, stalled_ns, _ = self.counted_LX.sum(0).tolist()
        return Counts(hits, misses, misses * self.expert_bytes, stalled_s=stalled_ns / 1e9)


def fetched(ops: Operations, layers: Sequence[tuple[Packed, Packed]], device: torch.device) -> Fetched | None:
    """layers: gate_up and down of each, loaded, all of them Held. None where the device cannot read the host's."""
    held_LP = [tuple(held for held in pair if isinstance(held, Held)) for pair in layers]
    on_host_LX = [[getattr(held.host, part) for held in pair for part in PARTS] for pair in held_LP]
    on_gpu = device.type == "cuda"
    if any(held.repacks for held in held_LP[0]) or not fits(on_host_LX[0]):
        return None
    if on_gpu and not all(part.is_pinned() for on_host_X in on_host_LX for part in on_host_X):
        return None
    counted_LX = torch.zeros((len(layers), COUNTED), dtype=torch.int64, pin_memory=on_gpu)
    caches = [
        make_cache(
            [
                (getattr(held.host, part), getattr(held.packed, part), getattr(held.whole, part))
                for held in pair
                for part in PARTS
            ],
            sorted(pair[0].slots.places, key=lambda expert: pair[0].slots.places[expert]),
            counted_X,
            device,
        )
        for pair, counted_X in zip(held_LP, counted_LX, strict=True)
    ]
    return Fetched(ops, caches, counted_LX, sum(part[0].nbytes for part in on_host_LX[0]))

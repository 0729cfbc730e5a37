"""Experts that the device brings itself, against a cache of a few lines in Python: which are copied, in whose place,
and every byte of them."""

import random
from collections.abc import Sequence

import pytest
import torch
from gptoss_launch.parallel.kernels.triton_fetch import (
    CHUNK_BYTES,
    COUNTED,
    Cache,
    fetch,
    fits,
    gather,
    make_cache,
)
from small_models import GPU
from torch import Tensor

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")
DEVICES = [pytest.param("cpu", marks=NO_GPU), pytest.param("cuda", marks=GPU)]
SIZES = (CHUNK_BYTES + 4096, 48, CHUNK_BYTES)  # bytes of an expert's parts: chunks that are full, part of one, and both


class Oracle:
    """When each expert in a slot was last used; those in slots at the beginning, the most used one last of all."""

    def __init__(self, hot: Sequence[int]) -> None:
        self.used = {expert: -rank for rank, expert in enumerate(hot)}
        self.step = self.hits = self.misses = 0

    def count(self, chosen: Sequence[int]) -> set[int]:
        """Those that are lacking."""
        wanted = set(chosen)
        self.hits += len(wanted & set(self.used))
        self.misses += len(wanted - set(self.used))
        return wanted - set(self.used)

    def fetch(self, chosen: Sequence[int], there: set[int]) -> None:
        """Checks what is there after it: of equally old ones any may have gone."""
        self.step += 1
        missing = self.count(chosen)
        gone = set(self.used) - there
        assert there == (set(self.used) | missing) - gone and len(gone) == len(missing)
        assert not gone & set(chosen)
        stayed = [used for expert, used in self.used.items() if expert in there - set(chosen)]
        assert all(self.used[expert] <= min(stayed, default=self.step) for expert in gone)
        self.used = {expert: self.step if expert in chosen else self.used[expert] for expert in there}


def cache(experts: int, hot: Sequence[int], device: str) -> tuple[Cache, list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    parts = []
    for size in SIZES:
        host = torch.randint(0, 256, (experts, size), dtype=torch.uint8, pin_memory=device == "cuda")
        slots = host[list(hot)].to(device)
        parts.append((host, slots, torch.zeros_like(host, device=device, pin_memory=False)))
    counted = torch.zeros(COUNTED, dtype=torch.int64, pin_memory=device == "cuda")
    return make_cache(parts, hot, counted, torch.device(device)), parts, counted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("experts", "slots", "per_token"), [(8, 3, 2), (32, 19, 4), (5, 5, 3)])
def test_what_is_lacking_takes_the_place_of_what_was_unused_for_longest(
    experts: int, slots: int, per_token: int, device: str
) -> None:
    """Steps of as many tokens as slots allow, and of more, which leave the slots as they are."""
    r = random.Random(experts)
    hot = r.sample(range(experts), slots)
    held, parts, counted = cache(experts, hot, device)
    oracle, times = Oracle(hot), 12 if device == "cpu" else 200
    for step in range(times):
        most = slots // per_token  # tokens, of which each has slots for its experts
        tokens = r.randint(1, most) if step % 4 else r.randint(most + 1, most + 300 // per_token)
        chosen = [r.sample(range(experts), per_token) for _ in range(tokens)]
        chosen_TX, flat = torch.tensor(chosen, device=device), [expert for some in chosen for expert in some]
        if step % 4:
            places = fetch(chosen_TX, held).flatten().tolist()
            oracle.fetch(flat, set(held.expert_S.tolist()))
            assert len(set(places)) == len(set(flat))
            for expert, place in zip(flat, places, strict=True):
                for host, in_slots, _ in parts:
                    assert torch.equal(in_slots[place].cpu(), host[expert]), (step, expert)
        else:
            gather(chosen_TX, held)
            oracle.count(flat)
            for expert in set(flat):
                for host, _, room in parts:
                    assert torch.equal(room[expert].cpu(), host[expert]), (step, expert)
            for _, _, room in parts:
                room.zero_()
        if device == "cuda":
            torch.cuda.synchronize()
        assert counted.tolist()[:2] == [oracle.hits, oracle.misses]
        assert held.place_E.tolist() == [
            next((slot for slot, inside in enumerate(held.expert_S.tolist()) if inside == expert), -1)
            for expert in range(experts)
        ]
    assert oracle.misses or slots == experts
    assert (counted[2] > 0) == (device == "cuda" and oracle.misses > 0)


def test_parts_that_no_word_divides_do_not_fit() -> None:
    whole = torch.zeros((3, 32), dtype=torch.uint8)
    assert fits([whole, torch.zeros((3, 8), dtype=torch.bfloat16)])
    assert not fits([whole, torch.zeros((3, 12), dtype=torch.uint8)])
    assert not fits([whole.t()])
    assert not fits([torch.zeros(97, dtype=torch.uint8)[1:].view(3, 32)])

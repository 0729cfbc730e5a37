"""From losses to updates of what is trained: AdamW on every rank, with gradients summed over ranks.

Whoever trains adds up losses (`add`) and ends the step (`step`); where weights, gradients and moments lie is not their
affair. The other way to keep them is `zero.py`. Knows nothing of files.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .job import Recipe
from .world import World

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW names them


@dataclass(frozen=True)
class Kept:
    """One trained tensor and its moments, whole and in fp32."""

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Updates(Protocol):
    """What every method does is done by all ranks together."""

    def add(self, function: Callable[[], tuple[Tensor, Any]], last: bool) -> tuple[Tensor, Any]:
        """Adds up the gradients of a pack. function: passes through the model and returns this rank's share of a sum
        over all ranks, and anything else; both are returned. last: whether the pack is the last of its step."""
        ...

    def look(self, function: Callable[[], Any]) -> Any:
        """What `function` returns, which passes through the model and wants no gradients."""
        ...

    def step(self, rate: float) -> float:
        """Updates what is trained. Returns the norm of all gradients before they were clipped; nan or inf where they
        are no numbers, and then the update has not to be relied on."""
        ...

    def read(self, name: str) -> Kept:
        """What a checkpoint keeps of one tensor, whole on every rank."""
        ...

    def write(self, kept: Callable[[str], Kept], steps: int) -> None:
        """Puts back what `read` gave after `steps` steps, by name."""
        ...


class Replicated:
    """Every rank holds all that is trained, its gradients and its moments."""

    def __init__(self, leaves: Mapping[str, Tensor], recipe: Recipe, optimizer: torch.optim.Optimizer, world: World):
        self._leaves, self._clip, self._optimizer, self._world = leaves, recipe.clip, optimizer, world

    def add(self, function: Callable[[], tuple[Tensor, Any]], last: bool) -> tuple[Tensor, Any]:
        loss, other = function()
        loss.backward()
        return loss.detach(), other

    def look(self, function: Callable[[], Any]) -> Any:
        return function()

    def step(self, rate: float) -> float:
        gradients = [leaf.grad for leaf in self._leaves.values() if leaf.grad is not None]
        assert len(gradients) == len(self._leaves), "a trained tensor that no pack has passed through"
        self._world.add(gradients)
        norm = torch.nn.utils.clip_grad_norm_(list(self._leaves.values()), self._clip or math.inf).item()
        if math.isfinite(norm):
            self._set_rate(rate)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)  # CUDA graphs add to them where they are
        return norm

    def read(self, name: str) -> Kept:
        leaf = self._leaves[name]
        state = self._optimizer.state[leaf]
        return Kept(leaf.detach().float(), *(whole(state[moment]) for moment in MOMENTS))

    def write(self, kept: Callable[[str], Kept], steps: int) -> None:
        for leaf in self._leaves.values():
            leaf.grad = torch.zeros_like(leaf)
        self._set_rate(0.0)
        self._optimizer.step()  # makes the state, whatever its kind, and changes nothing at this rate
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, leaf in self._leaves.items():
                one, state = kept(name), self._optimizer.state[leaf]
                leaf.copy_(one.value)
                for moment in MOMENTS:
                    state[moment].copy_(getattr(one, moment))
                set_steps(state, steps)

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's, whose step is compiled
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def set_steps(state: dict[str, Any], steps: int) -> None:
    """The number of steps that AdamW corrects its moments for; a number or a tensor, as it came."""
    if isinstance(state["step"], Tensor):
        state["step"].fill_(steps)
    else:
        state["step"] = steps


def whole(moment: Tensor) -> Tensor:
    """In fp32: moments of 8 bits are tensors that know how to become it."""
    return (moment if type(moment) is Tensor else moment.dequantize()).float()

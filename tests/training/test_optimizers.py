"""AdamW in 8 bits, as torchao has it, through `Replicated`: against fp32, in bf16, and read and written."""

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn

import pytest
import torch
from gptoss_launch.parallel.training.job import Job, Recipe
from gptoss_launch.parallel.training.optimizers import make_optimizer
from gptoss_launch.parallel.training.updates import Kept, Replicated
from gptoss_launch.parallel.training.world import ALONE
from small_models import SPECS
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch's own, about itself, as it compiles

RECIPE = Recipe(
    learning_rate=1e-4,
    schedule="constant",
    warmup_fraction=0.0,
    floor_fraction=1.0,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.0,
    clip=0.0,
)
JOB = Job(
    model="tiny", checkpoint="", spec=SPECS["tiny"], mode="lora", attention_rank=4, attention_alpha=4, expert_rank=0,
    expert_alpha=0, dtype="fp32", device="cpu", sequence_tokens=64, packs_per_step=1, steps=1, recipe=RECIPE, seed=0,
    data="", weights=(1.0,), save_every=0, keep_last=1, eval_every=0, check_first_loss=False, optimizer="adamw8bit",
)  # fmt: skip


def need_torchao(skip_or_fail: Callable[[str], NoReturn]) -> None:
    if find_spec("torchao") is None:
        skip_or_fail("torchao, which optimizer=adamw8bit wants")


def updates(leaf: Tensor, job: Job = JOB) -> Replicated:
    return Replicated({"a": leaf}, job.recipe, make_optimizer(job, [leaf]), ALONE)


def take(of: Replicated, leaf: Tensor, seed: int) -> None:
    grad = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed)) + 1
    leaf.grad = grad.to(leaf.dtype)
    of.step(1e-4)


def test_moments_of_8_bits_go_nearly_where_those_of_32_go(skip_or_fail: Callable[[str], NoReturn]) -> None:
    need_torchao(skip_or_fail)
    leaves = [torch.ones(64, 256).requires_grad_() for _ in range(3)]
    small, exact, resumed = (updates(leaf, job) for leaf, job in zip(
        leaves, (JOB, dataclasses.replace(JOB, optimizer="adamw"), JOB), strict=True))  # fmt: skip
    for step in range(6):
        take(small, leaves[0], step)
        take(exact, leaves[1], step)
    moved, wanted = ((leaf - 1).detach() for leaf in leaves[:2])
    assert ((moved - wanted).norm() / wanted.norm()).item() < 0.05
    state: Any = small._optimizer.state[leaves[0]]
    assert {state[name].codes.dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.uint8}
    kept = small.read("a")
    assert all(part.dtype == torch.float32 for part in (kept.value, kept.exp_avg, kept.exp_avg_sq))
    resumed.write(lambda name: Kept(kept.value.clone(), kept.exp_avg, kept.exp_avg_sq), steps=6)
    assert torch.equal(leaves[2], leaves[0])
    for step in range(6, 9):
        take(small, leaves[0], step)
        take(resumed, leaves[2], step)
    assert ((leaves[2] - leaves[0]).norm() / (leaves[0] - 1).norm()).item() < 0.02


def test_bf16_gets_what_is_less_than_its_step(skip_or_fail: Callable[[str], NoReturn]) -> None:
    """20 steps of 1e-4 are half a step of bf16 below one, in which rounding to the nearest would lose each."""
    need_torchao(skip_or_fail)
    torch.manual_seed(0)
    leaf = torch.ones(64, 256, dtype=torch.bfloat16).requires_grad_()
    of = updates(leaf)
    for _ in range(20):
        leaf.grad = torch.ones_like(leaf)
        of.step(1e-4)
    assert 1 - leaf.detach().float().mean().item() == pytest.approx(2e-3, rel=0.1)
    assert of.read("a").value.dtype == torch.float32

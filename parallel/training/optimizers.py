"""AdamW (https://arxiv.org/abs/1711.05101), with moments in fp32 or, through torchao, in 8 bits.

A run that goes on rounds moments of 8 bits once more: its losses are near those of the run without a stop, not equal.
Parameters in bf16 are rounded at random, up or down, so that on average they get what is less than a step of bf16.
Knows nothing of gradients or ranks.
"""

from typing import Any

import torch
from torch import Tensor

from .job import Job, Recipe


def make_optimizer(job: Job, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if job.optimizer == "adamw":
        return adamw(parameters, job.recipe)
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports] # on request only

    return AdamW8bit(parameters, **_arguments(job.recipe), bf16_stochastic_round=True)


def adamw(parameters: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    fused = all(parameter.is_cuda for parameter in parameters)  # one pass over all, and no copies of them
    return torch.optim.AdamW(parameters, **_arguments(recipe), fused=fused)


def _arguments(recipe: Recipe) -> dict[str, Any]:
    betas = (recipe.beta1, recipe.beta2)
    return {"lr": recipe.learning_rate, "betas": betas, "weight_decay": recipe.weight_decay}

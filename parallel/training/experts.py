"""The way in which a mixture of experts is trained: all at once on a GPU where that proves right on a small case, else
one expert after the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.experts import Packed
from ..kernels.quantize import quantize
from .products import Dense, Experts, LowRank, Mix, one_by_one

RANK_MULTIPLE = 8  # 16 bytes of bf16, which grouped_mm wants rows to begin at
LIMIT = 7.0  # of SwiGLU, far from the values of the small case: near it rounding decides which gradients are zero
ERROR_LIMIT = 2e-2  # of the largest value, in bf16


@dataclass(frozen=True)
class Choice:
    """mix: what will be used. why: a line for the log."""

    mix: Mix
    why: str


def choose(device: torch.device, dtype: torch.dtype, ranks: Sequence[int]) -> Choice:
    """ranks: of experts' adapters."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return Choice(one_by_one, f"experts: one by one; all at once needs bf16 on a GPU, not {dtype} on {device.type}")
    if any(rank % RANK_MULTIPLE for rank in ranks):
        return Choice(one_by_one, f"experts: one by one; all at once needs expert_rank in steps of {RANK_MULTIPLE}")
    try:
        from .grouped import at_once

        error = largest_error(at_once, device, dtype)
    except Exception as error:  # whatever a compiler raises
        reason = " ".join(str(error).split())[:200]
        return Choice(one_by_one, f"experts: one by one; all at once fails here: {type(error).__name__}: {reason}")
    if not error <= ERROR_LIMIT:
        return Choice(one_by_one, f"experts: one by one; all at once is off by {error:.1e} (limit {ERROR_LIMIT:.0e})")
    return Choice(at_once, f"experts: all at once; within {error:.1e} of one by one, gradients included")


def largest_error(candidate: Mix, device: torch.device, dtype: torch.dtype) -> float:
    """Of sums and gradients, relative to the largest value of each, against one expert after the other in fp32.

    Four experts, of which the second and the last have no rows; packed with adapters, and trained with biases.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).to(dtype).float()

    x, grad, weights = draw(24, 128), draw(24, 128), draw(24, 2).softmax(-1)
    chosen = torch.tensor([[0, 2], [2, 0]], device=device).repeat(12, 1)
    matrices = draw(4, 128, 128) / 8, draw(4, 128, 64) / 8
    biases = draw(4, 128), draw(4, 128)
    added = draw(4, 8, 128) / 8, draw(4, 128, 8) / 4, draw(4, 8, 64) / 8, draw(4, 128, 8) / 4
    packed = [Packed(*quantize(matrix), bias) for matrix, bias in zip(matrices, biases, strict=True)]

    def run(mix: Mix, wanted: torch.dtype, low_rank: bool) -> list[Tensor]:
        trained = [*added] if low_rank else [matrices[0], biases[0], matrices[1], biases[1]]
        leaves = [one.detach().clone().requires_grad_() for one in (x.to(wanted), weights, *trained)]
        pairs = leaves[2:4], leaves[4:6]
        if low_rank:
            both = [Experts(base, LowRank(a, b, 0.5)) for base, (a, b) in zip(packed, pairs, strict=True)]
        else:
            both = [Experts(Dense(weight, bias, False)) for weight, bias in pairs]
        out, load_E = mix(both[0], both[1], leaves[0], leaves[1], chosen, LIMIT, True)
        out.backward(grad.to(wanted))
        return [out.detach(), load_E, *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]

    worst = 0.0
    for low_rank in (True, False):
        pairs = zip(run(candidate, dtype, low_rank), run(one_by_one, torch.float32, low_rank), strict=True)
        for ours, exact in pairs:
            worst = max(worst, ((ours.float() - exact).abs().max() / exact.abs().max()).item())
    return worst

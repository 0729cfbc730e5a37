"""The ways in which a layer's operations are trained, but for attention: fused on a GPU, and all experts at once,
where that proves right on a small case; else plain, and one expert after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.experts import Packed, route
from ..kernels.norm import add_norm
from ..kernels.quantize import quantize
from .loss import Slopes, slopes
from .products import Dense, Experts, LowRank, Mix, one_by_one

RANK_MULTIPLE = 8  # 16 bytes of bf16, which grouped_mm wants rows to begin at
LIMIT = 7.0  # of SwiGLU, far from the values of the small case: near it rounding decides which gradients are zero
ERROR_LIMIT = 2e-2  # of the largest value, in bf16


AddNorm = Callable[[Tensor, Tensor | None, Tensor, float, torch.dtype], tuple[Tensor, Tensor]]
Route = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Operations:
    """`norm.add_norm`, `experts.route` and `products.one_by_one`, differentiable, and `loss.slopes`; or what computes
    the same."""

    add_norm: AddNorm
    route: Route
    mix: Mix
    slopes: Slopes


PLAIN = Operations(add_norm, route, one_by_one, slopes)


@dataclass(frozen=True)
class Choice:
    """ops: what will be used. why: a line for the log."""

    ops: Operations
    why: str


def choose(device: torch.device, dtype: torch.dtype, ranks: Sequence[int]) -> Choice:
    """ranks: of experts' adapters."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return Choice(PLAIN, f"layers: plain; fused needs bf16 on a GPU, not {dtype} on {device.type}")
    if any(rank % RANK_MULTIPLE for rank in ranks):
        return Choice(PLAIN, f"layers: plain; fused needs expert_rank in steps of {RANK_MULTIPLE}")
    try:
        error = largest_error(fused(), device, dtype)
    except Exception as error:  # whatever a compiler raises
        reason = " ".join(str(error).split())[:200]
        return Choice(PLAIN, f"layers: plain; fused fails here: {type(error).__name__}: {reason}")
    if not error <= ERROR_LIMIT:
        return Choice(PLAIN, f"layers: plain; fused is off by {error:.1e} (limit {ERROR_LIMIT:.0e})")
    return Choice(fused(), f"layers: fused, all experts at once; within {error:.1e} of plain, gradients included")


def fused() -> Operations:
    from ..kernels import triton_layer, triton_loss
    from .grouped import at_once

    return Operations(triton_layer.add_norm, triton_layer.route, at_once, triton_loss.slopes)


def largest_error(candidate: Operations, device: torch.device, dtype: torch.dtype) -> float:
    """Of results and gradients, relative to the largest value of each, against the plain ones in fp32.

    A norm, a router, and four experts, of which the second and the last have no rows; packed with adapters, and all
    trained.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).to(dtype).float()

    x, grad, weights = draw(24, 128), draw(24, 128), draw(24, 2).softmax(-1)
    delta, norm, router, logits = draw(24, 128), draw(128), draw(4, 128) / 8, draw(4)
    chosen = torch.tensor([[0, 2], [2, 0]], device=device).repeat(12, 1)
    matrices = draw(4, 128, 128) / 8, draw(4, 128, 64) / 8
    biases = draw(4, 128), draw(4, 128)
    added = draw(4, 8, 128) / 8, draw(4, 128, 8) / 4, draw(4, 8, 64) / 8, draw(4, 128, 8) / 4
    packed = [Packed(*quantize(matrix), bias) for matrix, bias in zip(matrices, biases, strict=True)]

    def run_mix(ops: Operations, wanted: torch.dtype, low_rank: bool) -> list[Tensor]:
        trained = [*added] if low_rank else [matrices[0], biases[0], matrices[1], biases[1]]
        leaves = [one.detach().clone().requires_grad_() for one in (x.to(wanted), weights, *trained)]
        pairs = leaves[2:4], leaves[4:6]
        if low_rank:
            both = [Experts(base, LowRank(a, b, 0.5)) for base, (a, b) in zip(packed, pairs, strict=True)]
        else:
            both = [Experts(Dense(weight, bias, False)) for weight, bias in pairs]
        out = ops.mix(both[0], both[1], leaves[0], leaves[1], chosen, LIMIT, True)
        out.backward(grad.to(wanted))
        return [out.detach(), *_gradients(leaves)]

    def run_norm(ops: Operations, wanted: torch.dtype, frozen: bool) -> list[Tensor]:
        leaves = [x.to(wanted, copy=True), delta.to(wanted, copy=True), norm.clone()]
        for leaf in leaves[: 2 if frozen else 3]:
            leaf.requires_grad_()
        summed, normed = ops.add_norm(leaves[0], leaves[1], leaves[2], 1e-5, wanted)
        again = ops.add_norm(summed, None, leaves[2], 1e-5, wanted)[1]
        (summed * grad.to(wanted) + normed * grad.flip(0).to(wanted) + again * grad.flip(1).to(wanted)).sum().backward()
        return [summed.detach(), normed.detach(), again.detach(), *_gradients(leaves)]

    def run_route(ops: Operations, wanted: torch.dtype, frozen: bool) -> list[Tensor]:
        leaves = [one.to(wanted, copy=True) for one in (x, router, logits)]
        for leaf in leaves[: 1 if frozen else 3]:
            leaf.requires_grad_()
        found, experts = ops.route(leaves[0], leaves[1], leaves[2], 2)
        (found * weights).sum().backward()
        return [found.detach(), experts, *_gradients(leaves)]

    def run_slopes(ops: Operations, wanted: torch.dtype, case: bool) -> list[Tensor]:
        logits_TV = (x * 3).to(wanted)
        return list(ops.slopes(logits_TV, torch.arange(len(x), device=device) * (3 if case else 1), weights[:, 0]))

    worst = 0.0
    for run in (run_mix, run_norm, run_route, run_slopes):
        for case in (True, False):
            for ours, exact in zip(run(candidate, dtype, case), run(PLAIN, torch.float32, case), strict=True):
                difference, most = (ours.float() - exact).abs().max().item(), exact.abs().max().item()
                worst = max(worst, difference / most if most else difference)
    return worst


def _gradients(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]

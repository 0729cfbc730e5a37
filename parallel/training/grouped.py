"""Products of all experts at once, as torch's grouped_mm computes them: few kernels, and the host waits for none.

A layer's packed experts are dequantized together, for a product and again for its gradient, and never kept. Checked on
a small case before it is chosen. P rows in the order of their experts, I columns in, O rows out, E experts, R rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from ..kernels.experts import Packed
from ..kernels.quantize import quantize
from .products import ONE_BY_ONE, Dense, ExpertOperations, Experts, LowRank
from .quantize import through_mxfp4

Dequantize = Callable[[Tensor, Tensor, torch.dtype], Tensor]
RANK_MULTIPLE = 8  # 16 bytes of bf16, which grouped_mm wants rows to begin at
LIMIT = 7.0  # of SwiGLU, far from the values of the small case: near it rounding decides which gradients are zero
ERROR_LIMIT = 2e-2  # of the largest value, in bf16


class _Packed(torch.autograd.Function):
    """x W^T of a packed W, with the gradient of x."""

    @staticmethod
    def forward(
        ctx: Any, x_PI: Tensor, blocks: Tensor, scales: Tensor, ends_E: Tensor, dequantize: Dequantize
    ) -> Tensor:
        ctx.save_for_backward(blocks, scales, ends_E)
        ctx.dequantize = dequantize
        return grouped_mm(x_PI, dequantize(blocks, scales, x_PI.dtype).transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        blocks, scales, ends_E = ctx.saved_tensors
        grad_PO = grads[0].contiguous()
        weight = ctx.dequantize(blocks, scales, grad_PO.dtype)
        return grouped_mm(grad_PO, weight, offs=ends_E), None, None, None, None


class _Trained(torch.autograd.Function):
    """x W^T, with the gradients of both."""

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_PI, weight_EOI, ends_E)
        return grouped_mm(x_PI, weight_EOI.transpose(1, 2), offs=ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_PI, weight_EOI, ends_E = ctx.saved_tensors
        grad_PO = grads[0].contiguous()
        dx_PI = grouped_mm(grad_PO, weight_EOI, offs=ends_E) if ctx.needs_input_grad[0] else None
        dweight = grouped_mm(grad_PO.T, x_PI, offs=ends_E)
        # nothing is written for an expert without rows
        idle_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return dx_PI, dweight.masked_fill_(idle_E[:, None, None], 0), None


class _AddBias(torch.autograd.Function):
    """The gradient of a trained bias is a product with zeros and ones: adding rows up in order."""

    @staticmethod
    def forward(ctx: Any, y_PO: Tensor, bias_EO: Tensor, expert_P: Tensor) -> Tensor:
        ctx.save_for_backward(expert_P)
        ctx.experts = len(bias_EO)
        return y_PO + bias_EO[expert_P]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (expert_P,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grads[0], None, None
        mine_EP = expert_P == torch.arange(ctx.experts, device=expert_P.device)[:, None]
        return grads[0], mine_EP.to(grads[0].dtype) @ grads[0], None


@dataclass(frozen=True)
class Grouped:
    """A way to multiply, as `products.one_by_one`. dequantize: as `mxfp4.dequantize`."""

    dequantize: Dequantize

    def __call__(self, experts: Experts, rows_PI: Tensor, load_E: Tensor) -> Tensor:
        dtype, base, added = rows_PI.dtype, experts.base, experts.added
        ends_E = load_E.cumsum(0).to(torch.int32)
        y: Any
        if isinstance(base, Packed):
            y = _Packed.apply(rows_PI, base.blocks, base.scales, ends_E, self.dequantize)
        else:
            weight = through_mxfp4(base.weight) if base.as_mxfp4 else base.weight
            y = _Trained.apply(rows_PI, weight.to(dtype), ends_E)
        place_P = torch.arange(len(rows_PI), dtype=torch.int32, device=rows_PI.device)
        y = _AddBias.apply(y, base.bias.to(dtype), torch.bucketize(place_P, ends_E, right=True))
        if added is None:
            return y
        inner: Any = _Trained.apply(rows_PI, added.a.to(dtype), ends_E)
        outer: Any = _Trained.apply(inner * added.scale, added.b.to(dtype), ends_E)
        return y + outer


@dataclass(frozen=True)
class Choice:
    """ops: what will be used. why: a line for the log."""

    ops: ExpertOperations
    why: str


def choose(device: torch.device, dtype: torch.dtype, ranks: Sequence[int]) -> Choice:
    """All experts at once where that proves right on a small case, else one by one. ranks: of experts' adapters."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return Choice(ONE_BY_ONE, f"experts: one by one; all at once needs bf16 on a GPU, not {dtype} on {device.type}")
    if any(rank % RANK_MULTIPLE for rank in ranks):
        return Choice(ONE_BY_ONE, f"experts: one by one; all at once needs expert_rank in steps of {RANK_MULTIPLE}")
    try:
        from ..kernels.triton_dequantize import dequantize
        from ..kernels.triton_swiglu import swiglu

        candidate = ExpertOperations(Grouped(dequantize), swiglu)
        error = largest_error(candidate, device, dtype)
    except Exception as error:  # whatever a compiler raises
        reason = " ".join(str(error).split())[:200]
        return Choice(ONE_BY_ONE, f"experts: one by one; all at once fails here: {type(error).__name__}: {reason}")
    if not error <= ERROR_LIMIT:
        return Choice(ONE_BY_ONE, f"experts: one by one; all at once is off by {error:.1e} (limit {ERROR_LIMIT:.0e})")
    return Choice(candidate, f"experts: all at once; within {error:.1e} of one by one, gradients included")


def largest_error(candidate: ExpertOperations, device: torch.device, dtype: torch.dtype) -> float:
    """Of output and gradients, relative to the largest value of each, against one expert after the other in fp32.

    A product of four experts, of which the second and the last have no rows, and SwiGLU of its result; packed with
    adapters, and trained with biases.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    rows, load_E = draw(100, 128), torch.tensor([60, 0, 40, 0], device=device)
    weight, bias, grad = draw(4, 64, 128) / 11, draw(4, 64), draw(100, 32)
    a, b = draw(4, 8, 128) / 11, draw(4, 64, 8) / 3
    packed = Packed(*quantize(weight), bias)
    worst = 0.0

    def run(ops: ExpertOperations, wanted: torch.dtype, low_rank: bool) -> list[Tensor]:
        leaves = [x.to(dtype).to(wanted).requires_grad_() for x in (rows, *((a, b) if low_rank else (weight, bias)))]
        if low_rank:
            experts = Experts(packed, LowRank(leaves[1], leaves[2], 0.5))
        else:
            experts = Experts(Dense(leaves[1], leaves[2], False))
        out = ops.swiglu(ops.products(experts, leaves[0], load_E), LIMIT)
        out.backward(grad.to(dtype).to(wanted))
        return [out.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]

    for low_rank in (True, False):
        pairs = zip(run(candidate, dtype, low_rank), run(ONE_BY_ONE, torch.float32, low_rank), strict=True)
        for ours, exact in pairs:
            worst = max(worst, ((ours.float() - exact).abs().max() / exact.abs().max()).item())
    return worst

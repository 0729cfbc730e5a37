"""SwiGLU and its gradient for training, each in one pass over memory: as `experts.swiglu`, computed in fp32.

Sources: see experts.py. P rows, I intermediate.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .experts import SWIGLU_ALPHA

BLOCK = 1024  # results of a program


@triton.jit
def _load(x, begin, count, BLOCK: tl.constexpr):
    """(gate, up) of BLOCK results, fp32."""
    place = 2 * begin + tl.arange(0, 2 * BLOCK)
    pair = tl.load(x + place, mask=place < 2 * count, other=0.0).to(tl.float32)
    return pair.reshape(BLOCK, 2).split()


@triton.jit
def _swiglu_forward(x, out, count, limit, ALPHA: tl.constexpr, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    gate, up = _load(x, begin, count, BLOCK)
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    place = begin + tl.arange(0, BLOCK)
    value = gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < count)


@triton.jit
def _swiglu_backward(x, grad, dx, count, limit, ALPHA: tl.constexpr, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    gate, up = _load(x, begin, count, BLOCK)
    place = begin + tl.arange(0, BLOCK)
    g = tl.load(grad + place, mask=place < count, other=0.0).to(tl.float32)
    # a NaN passes as the product that it makes of all
    free_gate, free_up = ~(gate > limit), ~((up > limit) | (up < -limit))
    gate = tl.where(free_gate, gate, limit)
    up = tl.where(free_up, up, tl.where(up > limit, limit, -limit))
    sigmoid = 1.0 / (1.0 + tl.exp(-ALPHA * gate))
    dgate = tl.where(free_gate, g * (up + 1.0) * sigmoid * (1.0 + ALPHA * gate * (1.0 - sigmoid)), 0.0)
    dup = tl.where(free_up, g * gate * sigmoid, 0.0)
    to = 2 * begin + tl.arange(0, 2 * BLOCK)
    tl.store(dx + to, tl.join(dgate, dup).reshape(2 * BLOCK).to(dx.dtype.element_ty), mask=to < 2 * count)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
        ctx.save_for_backward(x)
        ctx.limit = limit
        count = out.numel()
        _swiglu_forward[triton.cdiv(count, BLOCK),](x, out, count, limit, ALPHA=SWIGLU_ALPHA, BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad, dx = grads[0].contiguous(), torch.empty_like(x)
        count = grad.numel()
        _swiglu_backward[triton.cdiv(count, BLOCK),](x, grad, dx, count, ctx.limit, ALPHA=SWIGLU_ALPHA, BLOCK=BLOCK)
        return dx, None


def swiglu(x: Tensor, limit: float) -> Tensor:
    """x: contiguous."""
    out: Any = _Swiglu.apply(x.contiguous(), limit)
    return out

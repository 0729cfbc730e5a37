"""Add the last half-layer's result to the residual and normalise it, in one Triton kernel: see norm.add_norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_launch import constants, early

WARPS = 8


def add_norm(
    residual_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(residual + delta, its RMSNorm). Signature and meaning are those of norm.add_norm."""
    tokens, hidden = residual_TH.shape
    sum_TH = residual_TH if delta_TH is None else torch.empty_like(residual_TH)
    normed_TH = torch.empty((tokens, hidden), dtype=dtype, device=residual_TH.device)
    _add_norm[(tokens,)](
        residual_TH,
        residual_TH if delta_TH is None else delta_TH,
        weight_H,
        sum_TH,
        normed_TH,
        eps,
        **constants(
            HIDDEN=hidden,
            BLOCK=triton.next_power_of_2(hidden),
            ADD=delta_TH is not None,
            EARLY=early(residual_TH),
            num_warps=WARPS,
        ),
    )
    return sum_TH, normed_TH


@triton.jit(do_not_specialize=["eps"])
def _add_norm(
    residual,
    delta,
    weight,
    summed,
    normed,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    here = column < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + column
    factor = tl.load(weight + column, mask=here, other=0.0)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(residual + at, mask=here, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(delta + at, mask=here, other=0.0).to(x.dtype).to(tl.float32)).to(x.dtype)
        tl.store(summed + at, x, mask=here)
    wide = x.to(tl.float32)  # of the rounded sum, as the next layer adds to it
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    wide *= factor.to(tl.float32)
    tl.store(normed + at, wide.to(normed.dtype.element_ty), mask=here)

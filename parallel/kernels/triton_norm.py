"""Add the last half-layer's result to the residual and normalise it, in one Triton kernel: see norm.add_norm. Where
that result is what a few tokens' experts gave, not yet summed up, a kernel does this too."""

# pyright: reportArgumentType=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_launch import constants, early
from .triton_parts import Parts, terms_of, weighted_sum

WARPS = 8  # one number for both kernels: a row's squares are added up in the same order


def add_norm(
    residual_TH: Tensor, delta_TH: Tensor | Parts | None, weight_H: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(residual + delta, its RMSNorm). Signature and meaning are those of norm.add_norm; a delta in parts is summed up,
    with the same bits in one kernel as in two. Its residual must be older than the experts."""
    tokens, hidden = residual_TH.shape
    if isinstance(delta_TH, Parts):
        if len(delta_TH.partial) == 1:
            return _of_parts(residual_TH, delta_TH, weight_H, eps, dtype)
        delta_TH = delta_TH.summed()
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


def _of_parts(
    residual_TH: Tensor, parts: Parts, weight_H: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`add_norm` of parts that are not split."""
    tokens, hidden = residual_TH.shape
    sum_TH = torch.empty_like(residual_TH)
    normed_TH = torch.empty((tokens, hidden), dtype=dtype, device=residual_TH.device)
    _sum_add_norm[(tokens,)](
        residual_TH,
        parts.bias_ER,
        parts.experts_TX,
        parts.weights_TX,
        parts.partial,
        weight_H,
        sum_TH,
        normed_TH,
        parts.first,
        len(parts.bias_ER),
        parts.partial.shape[2],
        eps,
        **constants(
            HIDDEN=hidden,
            BLOCK=triton.next_power_of_2(hidden),
            EXPERTS_PER_TOKEN=parts.experts_TX.shape[1],
            DTYPE=getattr(tl, str(parts.dtype).removeprefix("torch.")),
            EARLY=parts.early,
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
    if EARLY:
        gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    here = column < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + column
    factor = tl.load(weight + column, mask=here, other=0.0)
    if EARLY:
        gdc_wait()
    x = tl.load(residual + at, mask=here, other=0.0)
    if ADD:
        x = added(x, tl.load(delta + at, mask=here, other=0.0))
        tl.store(summed + at, x, mask=here)
    tl.store(normed + at, normalised(x, factor, eps, HIDDEN).to(normed.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["first", "held", "eps"])
def _sum_add_norm(
    residual,
    bias,
    experts,
    weights,
    partial,
    norm,
    summed,
    normed,
    first,
    held,
    tile_rows,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS_PER_TOKEN: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`triton_parts._finish`, whose result would be in DTYPE, and then `_add_norm`."""
    if EARLY:
        gdc_launch_dependents()
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    here = column < HIDDEN
    at = token.to(tl.int64) * HIDDEN + column
    factor = tl.load(norm + column, mask=here, other=0.0)
    # As routes are, the residual is of a kernel before `_gate_up`. That lets none start before it has waited, so that
    # by the time `_down` starts, and this one after it, all before `_gate_up` are over.
    x = tl.load(residual + at, mask=here, other=0.0)
    terms = terms_of(bias, experts, weights, first, held, HIDDEN, token, column, EXPERTS_PER_TOKEN)
    if EARLY:
        tl.debug_barrier()  # ptxas would read all of it after the wait
        gdc_wait()
    delta = weighted_sum(terms, weights, partial, token, column, tile_rows, EXPERTS_PER_TOKEN)
    x = added(x, delta.to(DTYPE))
    tl.store(summed + at, x, mask=here)
    tl.store(normed + at, normalised(x, factor, eps, HIDDEN).to(normed.dtype.element_ty), mask=here)


@triton.jit
def added(x, delta):
    """x + delta, rounded as x is."""
    return (x.to(tl.float32) + delta.to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit
def normalised(x, factor, eps, HIDDEN: tl.constexpr):
    """fp32 RMSNorm of a row; x is the rounded sum, as the next layer adds to it, and 0 past HIDDEN."""
    wide = x.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    return wide * factor.to(tl.float32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, EARLY: tl.constexpr):
    """fp32 to DTYPE, to bf16 by pairs where kernels start early: what is made fp32 again ptxas would convert number by
    number (F2F, not F2FP), and a lane has many."""
    if EARLY and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return x.to(DTYPE)

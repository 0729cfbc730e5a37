"""Attention of one row from parts: what several programs found over different keys, joined in a fixed order.

A part is the running softmax where a program ended: the largest score (in units of log 2), the sum of the weights and
the weighted sum of the values. A program that saw no key leaves LOWEST, 0 and nothing. Knows no pages and no sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_launch import constants, early

LOWEST = tl.constexpr(-1e30)  # a score below all, but finite, so that its distance to itself is 0
TOGETHER = 32  # parts that are read at a time
WARPS = 4


def parts(out_TND: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Room for the parts of each row of out: (mixed_TNSD, stats_TNS2), fp32; with one split `out` stands for both."""
    if splits == 1:
        return out_TND, out_TND
    tokens, heads, head_dim = out_TND.shape
    mixed_TNSD = torch.empty((tokens, heads, splits, head_dim), dtype=torch.float32, device=out_TND.device)
    return mixed_TNSD, torch.empty((tokens, heads, splits, 2), dtype=torch.float32, device=out_TND.device)


def merge(mixed_TNSD: Tensor, stats_TNS2: Tensor, out_TND: Tensor, first_1: Tensor, factor: float) -> None:
    """The rows of out from their parts, from the first_1-th token on. factor: what values have to be multiplied by."""
    tokens, heads, splits, head_dim = mixed_TNSD.shape
    _merge[(tokens, heads)](
        mixed_TNSD,
        stats_TNS2,
        out_TND,
        first_1,
        splits,
        factor,
        **constants(HEAD_DIM=head_dim, TOGETHER=TOGETHER, EARLY=early(out_TND), num_warps=WARPS),
    )


@triton.jit
def store_part(mixed, stats, at, split, splits, top, total, acc, mask, HEAD_DIM: tl.constexpr):
    """The part of rows `at` (token * heads + head) over the keys of one split."""
    dim = tl.arange(0, HEAD_DIM)
    at = at.to(tl.int64) * splits + split
    tl.store(mixed + at[:, None] * HEAD_DIM + dim[None, :], acc, mask=(mask & (total > 0))[:, None])
    tl.store(stats + at * 2, top, mask=mask)
    tl.store(stats + at * 2 + 1, total, mask=mask)


@triton.jit
def with_parts(tops, totals, mixed, top, total, acc):
    """The running softmax (top, total, acc [D]) after these parts [P], their values mixed as [P, D]."""
    higher = tl.maximum(top, tl.max(tops, 0))
    weights = tl.exp2(tops - higher)
    fade = tl.exp2(top - higher)
    return higher, total * fade + tl.sum(weights * totals, 0), acc * fade + tl.sum(mixed * weights[:, None], 0)


@triton.jit(do_not_specialize=["splits", "factor"], do_not_specialize_on_alignment=["stats", "first"])
def _merge(
    mixed, stats, out, first, splits, factor, HEAD_DIM: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if tl.program_id(0) < tl.load(first):
        return
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dim = tl.arange(0, HEAD_DIM)
    top = tl.load(stats + row * splits * 2)
    total = 0.0
    acc = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, splits, TOGETHER):
        split = start + tl.arange(0, TOGETHER)
        at = row * splits + split
        tops = tl.load(stats + at * 2, mask=split < splits, other=LOWEST)
        totals = tl.load(stats + at * 2 + 1, mask=split < splits, other=0.0)
        part = tl.load(mixed + at[:, None] * HEAD_DIM + dim[None, :], mask=(totals > 0)[:, None], other=0.0)
        top, total, acc = with_parts(tops, totals, part, top, total, acc)
    tl.store(out + row * HEAD_DIM + dim, (acc * (factor / total)).to(out.dtype.element_ty))

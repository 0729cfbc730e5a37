"""The experts' parts of a few tokens' results, one row for each pair (token, expert), and the kernel that sums them up.

Other kernels that sum them up share with it how: in the order of a token's experts, in fp32.

T tokens, X experts a token, P = T X pairs (token, expert); pair = token * X + place.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOptionalOperand=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_all_reduce import summed
from .triton_launch import constants

FINISH_ROWS = 256  # of a program that sums up: two a lane, so that all loads of a sum are in flight together


@dataclass(frozen=True)
class Parts:
    """What `triton_decode.down_parts` left: [split, P, rows or more] fp32, without bias; rows of pairs whose expert is
    not here are undefined. first: the first expert here. dtype: of the sum. early: kernels start as triton_launch
    says."""

    partial: Tensor
    bias_ER: Tensor
    experts_TX: Tensor
    weights_TX: Tensor
    first: int
    dtype: torch.dtype
    early: bool

    def summed(self) -> Tensor:
        """[T, rows], the weighted sum over each token's experts here."""
        (tokens, per_token), (held, rows) = self.experts_TX.shape, self.bias_ER.shape
        split, pairs, tile_rows = self.partial.shape
        out_TR = torch.empty((tokens, rows), dtype=self.dtype, device=self.partial.device)
        _finish[tokens, triton.cdiv(rows, FINISH_ROWS)](
            self.bias_ER,
            self.experts_TX,
            self.weights_TX,
            out_TR,
            self.partial,
            self.first,
            held,
            pairs,
            rows,
            tile_rows,
            **constants(EXPERTS_PER_TOKEN=per_token, SPLIT=split, BLOCK=FINISH_ROWS, EARLY=self.early, num_warps=4),
        )
        return out_TR


@triton.jit
def terms_of(bias, experts, weights, first, held, rows, token, row, EXPERTS_PER_TOKEN: tl.constexpr):
    """For each expert of a token: whether it and these rows are here, their bias, and the expert's weight."""
    terms = ()
    for place in tl.static_range(EXPERTS_PER_TOKEN):
        pair = token * EXPERTS_PER_TOKEN + place
        chosen = tl.load(experts + pair).to(tl.int32) - first
        there = (chosen >= 0) & (chosen < held) & (row < rows)
        y = tl.load(bias + chosen.to(tl.int64) * rows + row, mask=there, other=0.0).to(tl.float32)
        terms += ((there, y, tl.load(weights + pair)),)
    return terms


@triton.jit
def sum_up(
    terms,
    out,
    partial,
    pairs,
    rows,
    token,
    row,
    tile_rows,
    EXPERTS_PER_TOKEN: tl.constexpr,
    SPLIT: tl.constexpr,
    tile=0,
    counts=None,
    addresses=None,
    RANK: tl.constexpr = 0,
):
    """These rows of out [T, rows]: the weighted sum of what the token's experts here gave, in a fixed order; with
    addresses by one warp, and over all ranks (`triton_all_reduce.summed`)."""
    if addresses is not None:
        call = tl.load(counts + tile) + 1
    total = tl.zeros(row.shape, tl.float32)
    for place in tl.static_range(EXPERTS_PER_TOKEN):
        there, y, weight = terms[place]
        for i in tl.static_range(SPLIT):
            at = partial + (i * pairs + token * EXPERTS_PER_TOKEN + place).to(tl.int64) * tile_rows + row
            y += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
        total += weight * y
    if addresses is not None:
        total = summed(total.to(out.dtype.element_ty), call, tile, addresses, RANK, 32 // row.shape[0])
        tl.debug_barrier()  # all lanes have read the count
        tl.store(counts + tile, call)
    tl.store(out + tl.cast(token, tl.int64) * rows + row, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def weighted_sum(terms, weights, partial, token, row, tile_rows, EXPERTS_PER_TOKEN: tl.constexpr):
    """fp32, with the bits of `sum_up` where nothing is split, for many rows a lane: ptxas would use some parts before
    it asks for others, and so wait for memory several times."""
    parts = ()
    for place in tl.static_range(EXPERTS_PER_TOKEN):
        at = partial + (token * EXPERTS_PER_TOKEN + place).to(tl.int64) * tile_rows + row
        parts += (tl.load(at, mask=terms[place][0], other=0.0, cache_modifier=".cg"),)
    tl.debug_barrier()  # no load of parts can sink below it, and no use climb above it, as that needs what is read here
    total = tl.zeros(row.shape, tl.float32)
    for place in tl.static_range(EXPERTS_PER_TOKEN):
        weight = tl.load(weights + token * EXPERTS_PER_TOKEN + place)
        one = weight * 0.0 + 1.0  # which the compiler cannot know
        total += weight * (terms[place][1] * one + parts[place])
    return total


@triton.jit(do_not_specialize=["first", "held", "pairs"])
def _finish(
    bias,
    experts,
    weights,
    out,
    partial,
    first,
    held,
    pairs,
    rows,
    tile_rows,
    EXPERTS_PER_TOKEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out [T, rows] from partial, as `triton_decode._down` left it."""
    if EARLY:
        gdc_launch_dependents()
    token, row = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    terms = terms_of(bias, experts, weights, first, held, rows, token, row, EXPERTS_PER_TOKEN)
    if EARLY:
        tl.debug_barrier()  # ptxas would read the terms after the wait
        gdc_wait()
    sum_up(terms, out, partial, pairs, rows, token, row, tile_rows, EXPERTS_PER_TOKEN, SPLIT)

"""Norm, then q, k, v with RoPE and the write into pages: for one token one Triton kernel, for up to 16 one for the norm
and one for the rest, for more torch's product between the norm and a kernel for what follows it.

With one token few programs stay for the whole product: each takes pair after pair of rows, with the loads of the next
in flight, and works out the norm once.

Signature and meaning are those of attention.norm_qkv_write. fp8 pages hold the largest number of e4m3 (448) where the
plain version, by torch's conversion, would hold NaN.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_launch import constants, early, processors
from .triton_linear import few_cut, few_product, few_shape, group_rows, linear
from .triton_norm import add_norm, added, rounded
from .triton_pages import as_stored, entry, operand, to_stored
from .triton_weight_only import stored
from .weight_only import Narrow, Weight

HEADS_TOGETHER = 8  # of a program that rotates and writes
WARPS = 2
TOGETHER = 8  # pairs of columns of a program for a few tokens


@dataclass(frozen=True)
class Stay:
    """How the product for one token is cut: constants from a benchmark (tests/benchmarks/kernels_attention.py)."""

    warps: int  # of a program
    programs: int  # of a multiprocessor, which all run at once
    ahead: int  # rows, or pairs of rows, that are asked for before they are needed


ONE = Stay(warps=4, programs=5, ahead=1)


def norm_qkv_write(
    residual_TH: Tensor,
    delta_TH: Tensor | None,
    norm_H: Tensor,
    eps: float,
    dtype: torch.dtype,
    weight_QH: Weight,
    bias_Q: Tensor,
    rotation: tuple[Tensor, Tensor],
    kv_PCSKD: Tensor,
    slots_T: Tensor,
    how: Stay = ONE,
) -> tuple[Tensor, Tensor]:
    """(residual + delta, q_TND): add and norm, project, rotate q and k, write k and v to their slots."""
    kv_PCSKD = as_stored(kv_PCSKD)
    page_tokens, kv_heads, head_dim = kv_PCSKD.shape[2:]
    tokens, hidden = residual_TH.shape
    heads = len(weight_QH) // head_dim - 2 * kv_heads
    q_TND = torch.empty((tokens, heads, head_dim), dtype=dtype, device=residual_TH.device)
    shape = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "PAGE_TOKENS": page_tokens}
    after = (*rotation, slots_T, q_TND, kv_PCSKD)
    if tokens == 1:
        pairs, (values, scales, factor) = len(weight_QH) // 2, stored(weight_QH)
        sum_TH = residual_TH if delta_TH is None else torch.empty_like(residual_TH)
        _norm_qkv_one[(_programs(residual_TH, pairs, how),)](
            residual_TH,
            residual_TH if delta_TH is None else delta_TH,
            norm_H,
            sum_TH,
            values,
            scales,
            bias_Q,
            *after,
            eps,
            pairs,
            **constants(**shape, **_stay_shape(residual_TH, values, how), ADD=delta_TH is not None, FACTOR=factor),
        )
        return sum_TH, q_TND
    residual_TH, x_TH = add_norm(residual_TH, delta_TH, norm_H, eps, dtype)
    narrow = isinstance(weight_QH, Narrow)
    cut = None if narrow else few_cut(x_TH, weight_QH)
    if not narrow and cut is not None and head_dim % (2 * TOGETHER) == 0:
        _qkv_few[(len(weight_QH) // (2 * TOGETHER),)](
            x_TH, weight_QH, bias_Q, *after, tokens, **constants(**shape, **few_shape(x_TH, *cut))
        )
        return residual_TH, q_TND
    qkv_TQ = (linear if narrow else torch.nn.functional.linear)(x_TH, weight_QH, bias_Q)
    _rotate_and_write[(tokens, -(-(heads + 2 * kv_heads) // HEADS_TOGETHER))](
        qkv_TQ,
        *after,
        **constants(**shape, TOGETHER=HEADS_TOGETHER, EARLY=early(x_TH), num_warps=WARPS),
    )
    return residual_TH, q_TND


def _programs(x: Tensor, units: int, how: Stay) -> int:
    """As many as run at once, or fewer if that needs no more rounds."""
    rounds = -(-units // (processors(x.device) * how.programs))
    return -(-units // rounds)


def _stay_shape(x: Tensor, weight: Tensor, how: Stay) -> dict[str, Any]:
    return {
        "COLUMNS": weight.shape[1],
        "BLOCK": how.warps * 512 // weight.element_size(),  # 16 bytes a lane
        "AHEAD": how.ahead,
        "EARLY": early(x),
        "num_warps": how.warps,
    }


@triton.jit
def _row(weight, row, there, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """A row in parts of BLOCK columns; zeros if it is not there."""
    parts = ()
    for begin in tl.static_range(0, COLUMNS, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        at = tl.cast(row, tl.int64) * COLUMNS + column
        parts += (tl.load(weight + at, mask=there & (column < COLUMNS), other=0),)
    return parts


@triton.jit
def _dot(w, x):
    """The sum over the products of two rows in parts, the second in fp32."""
    total = operand(w[0], tl.float32) * x[0]
    for i in tl.static_range(1, len(w)):
        total += operand(w[i], tl.float32) * x[i]
    return tl.sum(total, 0)


@triton.jit
def _store(
    left,
    right,
    c,
    s,
    head,
    dim,
    token,
    slot,
    there,
    q,
    kv,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):
    """Columns dim and dim + HEAD_DIM / 2 of one head, fp32 sums: rounded, turned unless the head is a value, stored."""
    dtype = q.dtype.element_ty
    left, right = left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32)
    if head < HEADS + KV_HEADS:
        left, right = left * c - right * s, right * c + left * s
    left, right = left.to(dtype), right.to(dtype)
    half: tl.constexpr = HEAD_DIM // 2
    if head < HEADS:
        q_at = q + (token * HEADS + head) * HEAD_DIM + dim
        tl.store(q_at, left, mask=there)
        tl.store(q_at + half, right, mask=there)
    else:
        is_value = head >= HEADS + KV_HEADS
        kv_head = head - HEADS - tl.where(is_value, KV_HEADS, 0)
        kv_at = kv + entry(slot // PAGE_TOKENS, slot % PAGE_TOKENS, kv_head, KV_HEADS, HEAD_DIM, PAGE_TOKENS) + dim
        kv_at += tl.where(is_value, PAGE_TOKENS * KV_HEADS * HEAD_DIM, 0)
        tl.store(kv_at, to_stored(left.to(tl.float32), kv.dtype.element_ty), mask=there)
        tl.store(kv_at + half, to_stored(right.to(tl.float32), kv.dtype.element_ty), mask=there)


@triton.jit
def _pair(weight, pair, pairs, HALF: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The two rows of a pair of columns that turn together."""
    row = pair // HALF * (2 * HALF) + pair % HALF
    left = _row(weight, row, pair < pairs, COLUMNS, BLOCK)
    return left, _row(weight, row + HALF, pair < pairs, COLUMNS, BLOCK)


@triton.jit
def _after(bias, cos, sin, pair, pairs, HALF: tl.constexpr):
    """What a pair's sums are finished with: both biases, cosine and sine."""
    there = pair < pairs
    row, dim = pair // HALF * (2 * HALF) + pair % HALF, pair % HALF
    left, right = tl.load(bias + row, mask=there, other=0.0), tl.load(bias + row + HALF, mask=there, other=0.0)
    return left, right, tl.load(cos + dim), tl.load(sin + dim)


@triton.jit(do_not_specialize=["eps", "pairs"], do_not_specialize_on_alignment=["slots"])
def _norm_qkv_one(
    residual,
    delta,
    norm,
    summed,
    weight,
    row_scale,
    bias,
    cos,
    sin,
    slots,
    q,
    kv,
    eps,
    pairs,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    ADD: tl.constexpr,
    FACTOR: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token. All programs work out the norm, which is less than to wait for a kernel that does."""
    HALF: tl.constexpr = HEAD_DIM // 2
    if EARLY:
        gdc_launch_dependents()
    program, programs = tl.program_id(0), tl.num_programs(0)
    factor = _row(norm, 0, True, COLUMNS, BLOCK)
    ahead = ()
    later = ()
    for i in tl.static_range(AHEAD):
        ahead += (_pair(weight, program + i * programs, pairs, HALF, COLUMNS, BLOCK),)
        later += (_after(bias, cos, sin, program + i * programs, pairs, HALF),)
    slot = tl.load(slots)
    if EARLY:
        tl.debug_barrier()  # ptxas would read the weights after the wait
        gdc_wait()
    x = _row(residual, 0, True, COLUMNS, BLOCK)
    if ADD:
        more = _row(delta, 0, True, COLUMNS, BLOCK)
        sums = ()
        for i in tl.static_range(len(x)):
            sums += (added(x[i], more[i]),)
            column = i * BLOCK + tl.arange(0, BLOCK)
            tl.store(summed + column, sums[i], mask=(program == 0) & (column < COLUMNS))
        x = sums
    squares = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(len(x)):
        wide = x[i].to(tl.float32)
        squares += wide * wide
    scale = tl.rsqrt(tl.sum(squares, 0) / COLUMNS + eps)
    value = ()
    for i in tl.static_range(len(x)):
        normed = x[i].to(tl.float32) * scale * factor[i].to(tl.float32)
        value += (rounded(normed, q.dtype.element_ty, EARLY).to(tl.float32),)
    for pair in range(program, pairs, programs):
        w = ahead[0]
        left_bias, right_bias, c, s = later[0]
        ahead = ahead[1:] + (_pair(weight, pair + AHEAD * programs, pairs, HALF, COLUMNS, BLOCK),)
        later = later[1:] + (_after(bias, cos, sin, pair + AHEAD * programs, pairs, HALF),)
        head, dim = pair // HALF, pair % HALF
        row = head * HEAD_DIM + dim
        left, right = _dot(w[0], value), _dot(w[1], value)
        if FACTOR > 0:
            left *= tl.load(row_scale + row) * FACTOR
            right *= tl.load(row_scale + row + HALF) * FACTOR
        left += left_bias.to(tl.float32)
        right += right_bias.to(tl.float32)
        _store(left, right, c, s, head, dim, 0, slot, True, q, kv, HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["slots"])
def _qkv_few(
    x,
    weight,
    bias,
    cos,
    sin,
    slots,
    q,
    kv,
    tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    WAYS: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """A few tokens, a program for eight pairs of columns that turn together."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(0) // (HALF // 8)
    first = tl.program_id(0) % (HALF // 8) * 8
    row_L = head * HEAD_DIM + first + group_rows(WAYS)
    dim = (first + tl.arange(0, 8))[:, None]
    row = head * HEAD_DIM + dim
    token = tl.arange(0, TOKENS)[None, :]
    there = token < tokens
    # all that is there before x is, as nothing is left to wait for together with it after the product
    left_bias, right_bias = tl.load(bias + row).to(tl.float32), tl.load(bias + row + HALF).to(tl.float32)
    c = tl.load(cos + token * HALF + dim, mask=there, other=0.0)
    s = tl.load(sin + token * HALF + dim, mask=there, other=0.0)
    slot = tl.load(slots + token, mask=there, other=0)
    y = few_product(x, weight, row_L, row_L + HALF, tokens, COLUMNS, TOKENS, WAYS, UNROLL, EARLY, PLAIN)
    left, right = y.reshape(2, 8, TOKENS).permute(1, 2, 0).split()
    left += left_bias
    right += right_bias
    _store(left, right, c, s, head, dim, token, slot, there, q, kv, HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rotate_and_write(
    qkv,
    cos,
    sin,
    slots,
    q,
    kv,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    if EARLY:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER))[:, None]  # of q, then k, then v
    dim = tl.arange(0, HALF)[None, :]
    here = head < HEADS + 2 * KV_HEADS
    at = (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + dim
    c, s = tl.load(cos + token * HALF + dim), tl.load(sin + token * HALF + dim)
    slot = tl.load(slots + token)
    if EARLY:
        gdc_wait()
    left = tl.load(qkv + at, mask=here, other=0.0)
    right = tl.load(qkv + at + HALF, mask=here, other=0.0)
    turns = head < HEADS + KV_HEADS
    turned_left = (left.to(tl.float32) * c - right.to(tl.float32) * s).to(left.dtype)
    turned_right = (right.to(tl.float32) * c + left.to(tl.float32) * s).to(left.dtype)
    left, right = tl.where(turns, turned_left, left), tl.where(turns, turned_right, right)

    at = (token * HEADS + head) * HEAD_DIM + dim
    tl.store(q + at, left, mask=head < HEADS)
    tl.store(q + at + HALF, right, mask=head < HEADS)
    kv_head = head - HEADS  # a value's is KV_HEADS too much, and that many heads and some pass before it comes
    part = tl.where(turns, 0, PAGE_TOKENS * KV_HEADS * HEAD_DIM - KV_HEADS * HEAD_DIM)
    at = entry(slot // PAGE_TOKENS, slot % PAGE_TOKENS, kv_head, KV_HEADS, HEAD_DIM, PAGE_TOKENS) + part + dim
    stored = kv.dtype.element_ty
    tl.store(kv + at, to_stored(left.to(tl.float32), stored), mask=here & (head >= HEADS))
    tl.store(kv + at + HALF, to_stored(right.to(tl.float32), stored), mask=here & (head >= HEADS))

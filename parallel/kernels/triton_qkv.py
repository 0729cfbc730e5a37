"""q, k, v with RoPE and the write into pages: for one token one Triton kernel, for more the product and one kernel for
all that follows it.

Signature and meaning are those of attention.qkv_write. fp8 pages hold the largest number of e4m3 (448) where the plain
version, by torch's conversion, would hold NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_launch import constants, early
from .triton_linear import linear, stored
from .triton_pages import as_stored, entry, operand, to_stored
from .weight_only import Quantized, Weight

HEADS_TOGETHER = 8  # of a program
WARPS = 2
ONE_WARPS = 4  # of a program for one token


def qkv_write(
    x_TH: Tensor,
    weight_QH: Weight,
    bias_Q: Tensor,
    rotation: tuple[Tensor, Tensor],
    kv_PCSKD: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Project, rotate q and k, write k and v to their slots. Returns q_TND, contiguous."""
    kv_PCSKD = as_stored(kv_PCSKD)
    page_tokens, kv_heads, head_dim = kv_PCSKD.shape[2:]
    tokens, hidden = x_TH.shape
    heads = len(weight_QH) // head_dim - 2 * kv_heads
    q_TND = torch.empty((tokens, heads, head_dim), dtype=x_TH.dtype, device=x_TH.device)
    shape = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "PAGE_TOKENS": page_tokens}
    after = (*rotation, slots_T, q_TND, kv_PCSKD)
    if tokens == 1:
        values, scales, factor = stored(weight_QH)
        _qkv_one[((heads + 2 * kv_heads) * head_dim // 2,)](
            x_TH,
            values,
            scales,
            bias_Q,
            *after,
            **constants(
                **shape,
                COLUMNS=hidden,
                BLOCK=triton.next_power_of_2(hidden),
                FACTOR=factor,
                EARLY=early(x_TH),
                num_warps=ONE_WARPS,
            ),
        )
        return q_TND
    # at this shape cuBLAS is the faster from two tokens on: 10.6 against 11.8 us on an H200
    if isinstance(weight_QH, Quantized):
        qkv_TQ = linear(x_TH, weight_QH, bias_Q)
    else:
        qkv_TQ = torch.nn.functional.linear(x_TH, weight_QH, bias_Q)
    _rotate_and_write[(tokens, -(-(heads + 2 * kv_heads) // HEADS_TOGETHER))](
        qkv_TQ,
        *after,
        **constants(**shape, TOGETHER=HEADS_TOGETHER, EARLY=early(x_TH), num_warps=WARPS),
    )
    return q_TND


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _qkv_one(
    x,
    weight,
    scale,
    bias,
    cos,
    sin,
    slots,
    q,
    kv,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    FACTOR: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One token, a program for each pair of columns that turn together."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head, dim = tl.program_id(0) // HALF, tl.program_id(0) % HALF
    left_row = head * HEAD_DIM + dim
    column = tl.arange(0, BLOCK)
    here = column < COLUMNS
    left_w = tl.load(weight + left_row * COLUMNS + column, mask=here, other=0)
    right_w = tl.load(weight + (left_row + HALF) * COLUMNS + column, mask=here, other=0)
    slot = tl.load(slots)
    c, s = tl.load(cos + dim), tl.load(sin + dim)
    left, right = tl.load(bias + left_row).to(tl.float32), tl.load(bias + left_row + HALF).to(tl.float32)
    if FACTOR > 0:
        left_scale, right_scale = (
            tl.load(scale + left_row).to(tl.float32),
            tl.load(scale + left_row + HALF).to(tl.float32),
        )
    if EARLY:
        tl.debug_barrier()  # ptxas would read the weights after the wait
        gdc_wait()
        gdc_launch_dependents()
    value = tl.load(x + column, mask=here, other=0.0).to(tl.float32)
    left_sum, right_sum = (
        tl.sum(operand(left_w, tl.float32) * value, 0),
        tl.sum(operand(right_w, tl.float32) * value, 0),
    )
    if FACTOR > 0:
        left_sum *= left_scale * FACTOR
        right_sum *= right_scale * FACTOR
    left += left_sum
    right += right_sum
    left, right = left.to(q.dtype.element_ty).to(tl.float32), right.to(q.dtype.element_ty).to(tl.float32)
    if head < HEADS + KV_HEADS:
        left, right = left * c - right * s, right * c + left * s
    left, right = left.to(q.dtype.element_ty), right.to(q.dtype.element_ty)
    if head < HEADS:
        tl.store(q + left_row, left)
        tl.store(q + left_row + HALF, right)
    else:
        is_value = head >= HEADS + KV_HEADS
        kv_head = head - HEADS - tl.where(is_value, KV_HEADS, 0)
        at = entry(slot // PAGE_TOKENS, slot % PAGE_TOKENS, kv_head, KV_HEADS, HEAD_DIM, PAGE_TOKENS) + dim
        at += tl.where(is_value, PAGE_TOKENS * KV_HEADS * HEAD_DIM, 0)
        tl.store(kv + at, to_stored(left.to(tl.float32), kv.dtype.element_ty))
        tl.store(kv + at + HALF, to_stored(right.to(tl.float32), kv.dtype.element_ty))


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
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER))[:, None]  # of q, then k, then v
    dim = tl.arange(0, HALF)[None, :]
    here = head < HEADS + 2 * KV_HEADS
    at = (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + dim
    c, s = tl.load(cos + token * HALF + dim), tl.load(sin + token * HALF + dim)
    slot = tl.load(slots + token)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
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

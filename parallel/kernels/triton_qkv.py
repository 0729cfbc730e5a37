"""q, k, v with RoPE and the write into pages: the product, then one Triton kernel for all that follows it.

Signature and meaning are those of attention.qkv_write. fp8 pages hold the largest number of e4m3 (448) where the plain
version, by torch's conversion, would hold NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_launch import constants, early
from .triton_linear import linear
from .triton_pages import as_stored, entry, to_stored

HEADS_TOGETHER = 8  # of a program
WARPS = 2


def qkv_write(
    x_TH: Tensor,
    weight_QH: Tensor,
    bias_Q: Tensor,
    rotation: tuple[Tensor, Tensor],
    kv_PCSKD: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Project, rotate q and k, write k and v to their slots. Returns q_TND, contiguous."""
    kv_PCSKD = as_stored(kv_PCSKD)
    page_tokens, kv_heads, head_dim = kv_PCSKD.shape[2:]
    # at this shape cuBLAS is the faster from two tokens on: 10.6 against 11.8 us on an H200
    product = linear if len(x_TH) == 1 else torch.nn.functional.linear
    qkv_TQ = product(x_TH, weight_QH, bias_Q)
    tokens, heads = len(x_TH), qkv_TQ.shape[1] // head_dim - 2 * kv_heads
    q_TND = torch.empty((tokens, heads, head_dim), dtype=qkv_TQ.dtype, device=qkv_TQ.device)
    cos, sin = rotation
    _rotate_and_write[(tokens, -(-(heads + 2 * kv_heads) // HEADS_TOGETHER))](
        qkv_TQ,
        cos,
        sin,
        slots_T,
        q_TND,
        kv_PCSKD,
        **constants(
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            PAGE_TOKENS=page_tokens,
            TOGETHER=HEADS_TOGETHER,
            EARLY=early(x_TH),
            num_warps=WARPS,
        ),
    )
    return q_TND


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

"""What the Triton kernels that touch KV pages share: where an entry lies, and fp8 pages as plain bytes.

A page is [2, page_tokens, K, D]: keys, then values. fp8 (e4m3fn, unscaled) goes in and out as uint8 and is decoded by
moving bits, so that there is one way for every GPU: sm_80 has no instruction for it. Knows nothing of sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8_FACTOR = 256.0  # `operand` of an fp8 byte times this is its value
E4M3_LARGEST = tl.constexpr(448.0)
E4M3_LEAST_NORMAL = tl.constexpr(0.015625)
E4M3_SUBNORMAL_SHIFT = tl.constexpr(16384.0)  # fp32 numbers from here to twice this are 2^-9 apart, as e4m3's least are
E4M3_SUBNORMAL_SHIFT_BITS = tl.constexpr(0x46800000)


def as_stored(kv_PCSKD: Tensor) -> Tensor:
    """The same pages as the kernels want them: fp8 as bytes."""
    if not kv_PCSKD.is_contiguous():
        raise ValueError(f"pages of one layer must be contiguous, not strided {kv_PCSKD.stride()}")
    return kv_PCSKD.view(torch.uint8) if kv_PCSKD.dtype == torch.float8_e4m3fn else kv_PCSKD


def stored_factor(kv_PCSKD: Tensor) -> float:
    """What `operand` of an entry has to be multiplied by."""
    return FP8_FACTOR if kv_PCSKD.dtype in (torch.float8_e4m3fn, torch.uint8) else 1.0


@triton.jit
def entry(page, offset, head, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr):
    """Index of the first element of a key; its value's is PAGE_TOKENS * KV_HEADS * HEAD_DIM further."""
    page_elements: tl.constexpr = 2 * PAGE_TOKENS * KV_HEADS * HEAD_DIM
    return page.to(tl.int64) * page_elements + offset * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM


@triton.jit
def as_operand(query, stored: tl.constexpr):
    """Queries in the dtype of the products: with bytes fp16, which e4m3 becomes without arithmetic."""
    if stored == tl.uint8 and query.dtype == tl.bfloat16:
        return query.to(tl.float16)
    else:
        return query


@triton.jit
def operand(x, dtype: tl.constexpr):
    """What a page holds, as an operand of a product; bytes become e4m3 / 256, exactly: the bits of e4m3 in those of
    fp16 are that, subnormals too."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def to_stored(x, dtype: tl.constexpr):
    """fp32 to what a page holds, to nearest, ties to even. What is too large for e4m3 becomes its largest."""
    if dtype == tl.uint8:
        bits = x.to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        size = tl.minimum(tl.abs(x), E4M3_LARGEST)
        bits = size.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # 120: fp32's exponent bias less e4m3's
        shifted = (size + E4M3_SUBNORMAL_SHIFT).to(tl.uint32, bitcast=True)
        subnormal = shifted - E4M3_SUBNORMAL_SHIFT_BITS
        return (sign | tl.where(size < E4M3_LEAST_NORMAL, subnormal, normal)).to(tl.uint8)
    else:
        return x.to(dtype)

"""MXFP4 -> bf16, all of a tensor at once, for whoever multiplies with cuBLAS: as `mxfp4.dequantize`, at the speed of
memory.

Sources: see mxfp4.py.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 128  # of a program


@triton.jit
def _value(code):
    """E2M1 -> fp32. Its bits are those of an fp16 of 2 ** -14 times the value, subnormal numbers included."""
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _dequantize(blocks, scales, out, count, PER_ROW: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr):
    """PER_ROW blocks become a row of `out`, whose rows are STRIDE values apart."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    here = block < count
    codes = tl.load(blocks + block[:, None] * 16 + tl.arange(0, 16)[None, :], mask=here[:, None], other=0).to(tl.int32)
    scale = tl.load(scales + block, mask=here, other=0).to(tl.int32)
    # 2 ** (scale - 127) by its bits; of 0 it is a subnormal number, and 255 is NaN
    bits = tl.where(scale == 0, 1 << 22, tl.where(scale == 255, 0x7FC00000, scale << 23))
    factor = bits.to(tl.float32, bitcast=True)[:, None]
    pair = tl.join(_value(codes & 15) * factor, _value(codes >> 4) * factor).reshape(BLOCKS, 32)
    to = block // PER_ROW * STRIDE + block % PER_ROW * 32
    tl.store(out + to[:, None] + tl.arange(0, 32)[None, :], pair.to(out.dtype.element_ty), mask=here[:, None])


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype, spare: int = 0) -> Tensor:
    """blocks, scales: contiguous. spare: columns that every row of the result has besides, for the caller to fill."""
    if not (blocks.is_contiguous() and scales.is_contiguous()):
        raise ValueError("MXFP4 that is not contiguous")
    per_row = blocks.shape[-2]
    out = torch.empty((*blocks.shape[:-2], per_row * 32 + spare), dtype=dtype, device=blocks.device)
    _dequantize[triton.cdiv(scales.numel(), BLOCKS),](
        blocks,
        scales,
        out,
        scales.numel(),
        PER_ROW=per_row,
        STRIDE=per_row * 32 + spare,
        BLOCKS=BLOCKS,
        num_warps=8,
    )
    return out

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

BYTES = 2048  # of a program


@triton.jit
def _value(code):
    """E2M1 -> fp32."""
    exponent, odd = (code >> 1) & 3, (code & 1).to(tl.float32)
    size = tl.where(exponent == 0, odd * 0.5, (1.0 + odd * 0.5) * (1 << tl.maximum(exponent - 1, 0)).to(tl.float32))
    return tl.where(code > 7, -size, size)


@triton.jit
def _dequantize(blocks, scales, out, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    codes = tl.load(blocks + byte).to(tl.int32)
    scale = tl.load(scales + byte // 16).to(tl.int32)
    # 2 ** (scale - 127) by its bits; of 0 it is a subnormal number, and 255 is NaN
    bits = tl.where(scale == 0, 1 << 22, tl.where(scale == 255, 0x7FC00000, scale << 23))
    factor = bits.to(tl.float32, bitcast=True)
    pair = tl.join(_value(codes & 15) * factor, _value(codes >> 4) * factor).reshape(2 * BYTES)
    at = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out + at, pair.to(out.dtype.element_ty))


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks: contiguous, a multiple of 2,048 bytes in all, as matrices of the published models are."""
    if blocks.numel() % BYTES or not (blocks.is_contiguous() and scales.is_contiguous()):
        raise ValueError(f"{blocks.numel()} bytes of MXFP4 are no multiple of {BYTES}, or not contiguous")
    out = torch.empty((*blocks.shape[:-2], blocks.shape[-2] * 32), dtype=dtype, device=blocks.device)
    _dequantize[blocks.numel() // BYTES,](blocks, scales, out, BYTES=BYTES, num_warps=8)
    return out

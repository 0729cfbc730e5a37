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
    """E2M1 -> fp32. Its bits are those of an fp16 of 2 ** -14 times the value, subnormal numbers included."""
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _dequantize(blocks, scales, out, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    codes = tl.load(blocks + block[:, None] * 16 + tl.arange(0, 16)[None, :]).to(tl.int32)
    scale = tl.load(scales + block).to(tl.int32)
    # 2 ** (scale - 127) by its bits; of 0 it is a subnormal number, and 255 is NaN
    bits = tl.where(scale == 0, 1 << 22, tl.where(scale == 255, 0x7FC00000, scale << 23))
    factor = bits.to(tl.float32, bitcast=True)[:, None]
    pair = tl.join(_value(codes & 15) * factor, _value(codes >> 4) * factor).reshape(BLOCKS, 32)
    to = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(out + to, pair.to(out.dtype.element_ty))


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks: contiguous, a multiple of 2,048 bytes in all, as matrices of the published models are."""
    if blocks.numel() % BYTES or not (blocks.is_contiguous() and scales.is_contiguous()):
        raise ValueError(f"{blocks.numel()} bytes of MXFP4 are no multiple of {BYTES}, or not contiguous")
    out = torch.empty((*blocks.shape[:-2], blocks.shape[-2] * 32), dtype=dtype, device=blocks.device)
    _dequantize[blocks.numel() // BYTES,](blocks, scales, out, BLOCKS=BYTES // 16, num_warps=8)
    return out

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
def places(count, expert_blocks, row_blocks, PER_ROW: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr):
    """(number in the source, first value in the result, whether it is one) of the blocks of a program, which are of one
    expert. count: blocks of an expert, PER_ROW to a row. expert_blocks, row_blocks: from one to the next in the source.
    STRIDE: values from a row to the next in the result."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    expert = tl.program_id(1).to(tl.int64)
    row, column = block // PER_ROW, block % PER_ROW
    source = expert * expert_blocks + row * row_blocks + column
    return source, (expert * (count // PER_ROW) + row) * STRIDE + column * 32, block < count


@triton.jit
def _dequantize(blocks, scales, out, count, expert_blocks, row_blocks, PER_ROW: tl.constexpr, STRIDE: tl.constexpr,
                BLOCKS: tl.constexpr):  # fmt: skip
    source, to, here = places(count, expert_blocks, row_blocks, PER_ROW, STRIDE, BLOCKS)
    codes = tl.load(blocks + source[:, None] * 16 + tl.arange(0, 16)[None, :], mask=here[:, None], other=0).to(tl.int32)
    scale = tl.load(scales + source, mask=here, other=0).to(tl.int32)
    # 2 ** (scale - 127) by its bits; of 0 it is a subnormal number, and 255 is NaN
    bits = tl.where(scale == 0, 1 << 22, tl.where(scale == 255, 0x7FC00000, scale << 23))
    factor = bits.to(tl.float32, bitcast=True)[:, None]
    pair = tl.join(_value(codes & 15) * factor, _value(codes >> 4) * factor).reshape(BLOCKS, 32)
    tl.store(out + to[:, None] + tl.arange(0, 32)[None, :], pair.to(out.dtype.element_ty), mask=here[:, None])


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype, spare: int = 0) -> Tensor:
    """blocks: [experts, rows, blocks of a row, 16], whole or some rows or some blocks of each row; scales: the same of
    theirs. spare: columns that every row of the result has besides, for the caller to fill."""
    experts, rows, per_row = scales.shape
    expert_blocks, row_blocks, one = scales.stride()
    if one != 1 or blocks.stride() != (expert_blocks * 16, row_blocks * 16, 16, 1):
        raise ValueError(f"MXFP4 whose blocks are not side by side: strides {blocks.stride()} and {scales.stride()}")
    out = torch.empty((experts, rows, per_row * 32 + spare), dtype=dtype, device=blocks.device)
    _dequantize[triton.cdiv(rows * per_row, BLOCKS), experts](
        blocks,
        scales,
        out,
        rows * per_row,
        expert_blocks,
        row_blocks,
        PER_ROW=per_row,
        STRIDE=per_row * 32 + spare,
        BLOCKS=BLOCKS,
        num_warps=8,
    )
    return out

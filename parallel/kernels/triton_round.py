"""Values -> the nearest that MXFP4 has, all of a tensor at once: `quantize.quantize`, then `mxfp4.dequantize`, in one
pass over memory.

Sources: see quantize.py. A block in which both scales are as good but for rounding may get the other one.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_dequantize import places

BLOCKS = 128  # of a program


@triton.jit
def _power(exponent):
    """2 ** exponent, from -127 to 127, by its bits."""
    bits = tl.where(exponent == -127, 1 << 22, (exponent + 127) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _nearest(size, exponent):
    """size, at least 0, as E2M1 times 2 ** exponent; ties go to the even mantissa."""
    y = size * _power(-exponent)[:, None]
    value = tl.where(y > 0.25, 0.5, 0.0) + tl.where(y >= 0.75, 0.5, 0.0) + tl.where(y > 1.25, 0.5, 0.0)
    value += tl.where(y >= 1.75, 0.5, 0.0) + tl.where(y > 2.5, 1.0, 0.0) + tl.where(y >= 3.5, 1.0, 0.0)
    value += tl.where(y > 5.0, 2.0, 0.0)
    return value * _power(exponent)[:, None]


@triton.jit
def _round(x, out, count, expert_blocks, row_blocks, PER_ROW: tl.constexpr, STRIDE: tl.constexpr,
           BLOCKS: tl.constexpr):  # fmt: skip
    source, to, here = places(count, expert_blocks, row_blocks, PER_ROW, STRIDE, BLOCKS)
    here, column = here[:, None], tl.arange(0, 32)[None, :]
    value = tl.load(x + source[:, None] * 32 + column, mask=here, other=0.0).to(tl.float32)
    size = tl.abs(value)
    largest = tl.max(size, 1)
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 127 - 2  # 2: that of E2M1's largest value
    exponent = tl.where(largest > 0, exponent, 0)
    exponent = tl.minimum(tl.maximum(exponent, -127), 126)  # a block that has 2 ** 127 in it is none that is trained
    low, high = _nearest(size, exponent), _nearest(size, exponent + 1)
    low_error = tl.sum((low - size) * (low - size), 1)
    high_error = tl.sum((high - size) * (high - size), 1)
    best = tl.where((high_error < low_error)[:, None], high, low)
    best = tl.where(value < 0, -best, best)
    tl.store(out + to[:, None] + column, best.to(out.dtype.element_ty), mask=here)


def nearest_mxfp4(values: Tensor, dtype: torch.dtype, spare: int = 0) -> Tensor:
    """values: [experts, rows, columns], whole or some rows or some whole blocks of each row. spare: columns that every
    row of the result has besides, for the caller to fill."""
    (experts, rows, columns), (of_expert, of_row, one) = values.shape, values.stride()
    if one != 1 or any(count % 32 for count in (columns, of_expert, of_row)):
        raise ValueError(f"values that are no whole blocks: shape {tuple(values.shape)}, strides {values.stride()}")
    per_row = columns // 32
    out = torch.empty((experts, rows, columns + spare), dtype=dtype, device=values.device)
    _round[triton.cdiv(rows * per_row, BLOCKS), experts](
        values,
        out,
        rows * per_row,
        of_expert // 32,
        of_row // 32,
        PER_ROW=per_row,
        STRIDE=columns + spare,
        BLOCKS=BLOCKS,
        num_warps=8,
    )
    return out

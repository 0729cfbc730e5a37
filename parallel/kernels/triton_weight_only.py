"""What Triton kernels need to read weights of 8 bits as they are, and the product for a few tokens with them.

Sums over codes are multiplied with the scale of their row. The kernels for one token are those of weights in 16 bits,
which know both. T tokens, I columns in, O rows out.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import weight_only
from .triton_launch import constants, early
from .triton_pages import FP8_FACTOR, operand
from .weight_only import Narrow, Weight

FEW_TOKENS = 16  # one side of a tensor core's tile; with more, weights are dequantized for torch's product
ROWS, COLUMNS_TOGETHER, WAYS, WARPS, STAGES = 16, 512, 4, 4, 3


def stored(weight_OI: Weight) -> tuple[Tensor, Tensor, float]:
    """(values, scales of rows, FACTOR) of a weight as the kernels take it: fp8 as bytes, which `operand` makes numbers
    that FACTOR is missing from. FACTOR 0: a weight without scales, for which any tensor stands."""
    if not isinstance(weight_OI, Narrow):
        return weight_OI, weight_OI, 0.0
    if weight_OI.codes_OI.dtype == torch.int8:
        return weight_OI.codes_OI, weight_OI.scale_O, 1.0
    return weight_OI.codes_OI.view(torch.uint8), weight_OI.scale_O, FP8_FACTOR


def several(x_TI: Tensor, weight_OI: Narrow, bias_O: Tensor | None) -> Tensor:
    """x W^T + b, [T, O], in the dtype of x, for two tokens and more."""
    tokens, (rows, columns) = len(x_TI), weight_OI.shape
    if tokens > FEW_TOKENS:
        return weight_only.linear(x_TI, weight_OI, bias_O)
    values, scales, factor = stored(weight_OI)
    out_TO = torch.empty((tokens, rows), dtype=x_TI.dtype, device=x_TI.device)
    _few[(-(-rows // ROWS),)](
        x_TI.contiguous(),
        values,
        scales,
        values if bias_O is None else bias_O,
        out_TO,
        tokens,
        rows,
        **constants(
            COLUMNS=columns,
            TOKENS=FEW_TOKENS,
            OUT=ROWS,
            PARTS=WAYS,
            BLOCK=COLUMNS_TOGETHER // WAYS,
            BIAS=bias_O is not None,
            FACTOR=factor,
            EARLY=early(x_TI),
            num_warps=WARPS,
            num_stages=STAGES,
        ),
    )
    return out_TO


@triton.jit(do_not_specialize=["tokens", "rows"])
def _few(
    x,
    weight,
    scale,
    bias,
    out,
    tokens,
    rows,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    FACTOR: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0) * OUT + tl.arange(0, OUT)
    is_row = row < rows
    token = tl.arange(0, TOKENS)
    is_token = token < tokens
    weight += row.to(tl.int64)[None, :, None] * COLUMNS
    x += token[None, None, :] * COLUMNS
    acc = tl.zeros([PARTS, OUT, TOKENS], tl.float32)
    if EARLY:
        gdc_wait()
    for start in range(0, COLUMNS, PARTS * BLOCK):
        column = start + tl.arange(0, PARTS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        is_column = column < COLUMNS
        w = tl.load(weight + column[:, None, :], mask=is_row[None, :, None] & is_column[:, None, :], other=0)
        v = tl.load(x + column[:, :, None], mask=is_token[None, None, :] & is_column[:, :, None], other=0.0)
        acc = tl.dot(operand(w, x.dtype.element_ty), v, acc, input_precision="ieee")
    y = tl.sum(acc, 0) * (tl.load(scale + row, mask=is_row, other=0.0) * FACTOR)[:, None]
    if BIAS:
        y += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + token[None, :] * rows + row[:, None], y.to(out.dtype.element_ty), mask=is_row[:, None] & is_token[None, :]
    )

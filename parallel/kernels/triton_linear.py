"""Matrix products for a few tokens in Triton, where what counts is to read the weight once and fast; torch's for more.

Weights of 8 bits are read as they are, and sums are multiplied with the scale of their row. T tokens, I columns in, O
rows out. Sums are in fp32 and always in the same order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import weight_only
from .triton_launch import constants, early
from .triton_pages import FP8_FACTOR, operand
from .weight_only import Quantized, Weight


@dataclass(frozen=True)
class Tuning:
    """Constants that a benchmark found (tests/benchmarks/kernels_attention.py)."""

    rows: int  # of the weight, of one program
    columns: int  # read at a time
    ways: int  # parts of these columns that are summed apart, each by a warp
    warps: int
    stages: int


ONE = Tuning(rows=1, columns=4096, ways=1, warps=4, stages=1)
FEW = Tuning(rows=16, columns=512, ways=4, warps=4, stages=3)
FEW_TOKENS = 16  # a tensor core's tile; from here on torch's


def stored(weight_OI: Weight) -> tuple[Tensor, Tensor, float]:
    """(values, scales of rows, FACTOR) of a weight as the kernels take it: fp8 as bytes, which `operand` makes numbers
    that FACTOR is missing from. FACTOR 0: a weight without scales, for which any tensor stands."""
    if not isinstance(weight_OI, Quantized):
        return weight_OI, weight_OI, 0.0
    if weight_OI.codes_OI.dtype == torch.int8:
        return weight_OI.codes_OI, weight_OI.scale_O, 1.0
    return weight_OI.codes_OI.view(torch.uint8), weight_OI.scale_O, FP8_FACTOR


def linear(x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, [T, O], in the dtype of x."""
    tokens = len(x_TI)
    if tokens == 1:
        return one(x_TI, weight_OI, bias_O, ONE)
    if tokens <= FEW_TOKENS:
        return few(x_TI, weight_OI, bias_O, FEW)
    if isinstance(weight_OI, Quantized):
        return weight_only.linear(x_TI, weight_OI, bias_O)
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)


def one(x_1I: Tensor, weight_OI: Weight, bias_O: Tensor | None, tuning: Tuning) -> Tensor:
    """linear for one token: multiply and add, no tensor core."""
    rows, columns = weight_OI.shape
    values, scales, factor = stored(weight_OI)
    out_1O = torch.empty((1, rows), dtype=x_1I.dtype, device=x_1I.device)
    _one[(-(-rows // tuning.rows),)](
        x_1I,
        values,
        scales,
        values if bias_O is None else bias_O,
        out_1O,
        rows,
        **constants(
            COLUMNS=columns,
            ROWS=tuning.rows,
            BLOCK=min(tuning.columns, triton.next_power_of_2(columns)),
            BIAS=bias_O is not None,
            FACTOR=factor,
            EARLY=early(x_1I),
            num_warps=tuning.warps,
        ),
    )
    return out_1O


def few(x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None, tuning: Tuning) -> Tensor:
    """linear for at most FEW_TOKENS tokens, which fill one side of a tensor core's tile."""
    tokens, (rows, columns) = len(x_TI), weight_OI.shape
    values, scales, factor = stored(weight_OI)
    out_TO = torch.empty((tokens, rows), dtype=x_TI.dtype, device=x_TI.device)
    _few[(-(-rows // tuning.rows),)](
        x_TI,
        values,
        scales,
        values if bias_O is None else bias_O,
        out_TO,
        tokens,
        rows,
        **constants(
            COLUMNS=columns,
            TOKENS=FEW_TOKENS,
            ROWS=tuning.rows,
            WAYS=tuning.ways,
            BLOCK=tuning.columns // tuning.ways,
            BIAS=bias_O is not None,
            FACTOR=factor,
            EARLY=early(x_TI),
            num_warps=tuning.warps,
            num_stages=tuning.stages,
        ),
    )
    return out_TO


@triton.jit(do_not_specialize=["rows"])
def _one(
    x,
    weight,
    scale,
    bias,
    out,
    rows,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    FACTOR: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    weight += row.to(tl.int64)[:, None] * COLUMNS
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        w = tl.load(weight + column[None, :], mask=is_row[:, None] & (column < COLUMNS)[None, :], other=0)
        if EARLY and start == 0:
            tl.debug_barrier()  # ptxas would read the weight after the wait
            gdc_wait()
            gdc_launch_dependents()
        acc += operand(w, tl.float32) * tl.load(x + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]
    y = tl.sum(acc, 1)
    if FACTOR > 0:
        y *= tl.load(scale + row, mask=is_row, other=0.0).to(tl.float32) * FACTOR
    if BIAS:
        y += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=is_row)


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
    ROWS: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    FACTOR: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    token = tl.arange(0, TOKENS)
    is_token = token < tokens
    weight += row.to(tl.int64)[None, :, None] * COLUMNS
    x += token[None, None, :] * COLUMNS
    acc = tl.zeros([WAYS, ROWS, TOKENS], tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for start in range(0, COLUMNS, WAYS * BLOCK):
        column = start + tl.arange(0, WAYS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        is_column = column < COLUMNS
        w = tl.load(weight + column[:, None, :], mask=is_row[None, :, None] & is_column[:, None, :], other=0)
        v = tl.load(x + column[:, :, None], mask=is_token[None, None, :] & is_column[:, :, None], other=0.0)
        acc = tl.dot(operand(w, x.dtype.element_ty), v, acc, input_precision="ieee")
    y = tl.sum(acc, 0)
    if FACTOR > 0:
        y *= (tl.load(scale + row, mask=is_row, other=0.0).to(tl.float32) * FACTOR)[:, None]
    if BIAS:
        y += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + token[None, :] * rows + row[:, None], y.to(out.dtype.element_ty), mask=is_row[:, None] & is_token[None, :]
    )

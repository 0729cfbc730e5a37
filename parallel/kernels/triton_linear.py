"""Matrix products for a few tokens in Triton, where what counts is to read the weight once and fast; torch's for more.

For one token a warp owns a row. For two to FEW_TOKENS a program owns 16 rows, whose columns its warps share; what a
lane loads is its own share of the operands of mma.m16n8k16, so that no weight changes lanes or passes through shared
memory. Both ask for weights before they wait for x: for as many as registers hold, which can be all. Weights of 8 bits
go the same way for one token, and one of their own for more.

T tokens, I columns in, O rows out. Sums are in fp32 and always in the same order.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import sums
from .triton_all_reduce import summed
from .triton_launch import MOST_REGISTERS, at_once, capped, constants, early
from .triton_pages import operand
from .triton_weight_only import several, stored
from .weight_only import Narrow, Weight

FEW_TOKENS = 16  # from here on torch's
TILE_ROWS = 16
STEP_COLUMNS = 32  # of a warp: 8 for each of the four lanes that share a row
PART_BYTES = 512  # of a row: 16 a lane
MOST_WAYS = 8
MOST_STEPS = 15  # whose loads a warp has in flight


@dataclass(frozen=True)
class Rows:
    """How the product for one token is cut: constants from a benchmark (tests/benchmarks/kernels_attention.py)."""

    warps: int  # of a program, each with a row of its own
    ahead: int  # parts of PART_BYTES whose loads are in flight before the first is used
    registers: int | None = None  # the most of a lane: fewer, and more programs are there at a time


ONE = Rows(warps=4, ahead=16, registers=96)
# Where ranks share the columns: half of them at most, and all programs have to be there at a time. The first that fits:
# 2,880 rows are 720 programs, of which a multiprocessor has 6 or 8, so that 120 or 90 are enough. Compiled for 2,048
# columns nothing is spilled.
ONE_SUMMED = (Rows(warps=4, ahead=16, registers=80), Rows(warps=4, ahead=16, registers=64))


def linear(x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None, ranks: sums.Ranks | None = None) -> Tensor:
    """x W^T + b, [T, O], in the dtype of x; summed over ranks, where they are given: for one token inside the kernel,
    if it can be."""
    if ranks is not None:
        for how in ONE_SUMMED if len(x_TI) == 1 else ():
            with ranks.exchange(one_message(x_TI, weight_OI, how)) as exchange:
                if exchange is not None:
                    return one(x_TI, weight_OI, bias_O, how, exchange)
        return ranks.all_reduce(linear(x_TI, weight_OI, bias_O))
    if not len(x_TI):  # a step in the middle of a prompt wants no logits: nothing to read a head for
        return x_TI.new_empty((0, len(weight_OI)))
    if len(x_TI) == 1:
        return one(x_TI, weight_OI, bias_O, ONE)
    if isinstance(weight_OI, Narrow):
        return several(x_TI, weight_OI, bias_O)
    cut = few_cut(x_TI, weight_OI)
    if cut is not None:
        return few(x_TI, weight_OI, bias_O, *cut)
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)


def one_message(x_1I: Tensor, weight_OI: Weight, how: Rows) -> sums.Message:
    """What `one` would exchange. All of its programs wait for those of the other ranks."""
    rows = len(weight_OI)
    programs = -(-rows // how.warps)
    processors = -(-programs // at_once(how.warps, how.registers or MOST_REGISTERS))
    return sums.Message("attention's output", rows, x_1I.dtype, programs, how.warps, processors)


def one(
    x_1I: Tensor, weight_OI: Weight, bias_O: Tensor | None, how: Rows, exchange: sums.Exchange | None = None
) -> Tensor:
    """linear for one token: multiply and add, no tensor core. exchange: of `one_message`; the sum over its ranks."""
    rows, (values, scales, factor) = len(weight_OI), stored(weight_OI)
    out_1O = torch.empty((1, rows), dtype=x_1I.dtype, device=x_1I.device)
    _one[(-(-rows // how.warps),)](
        x_1I,
        values,
        scales,
        values if bias_O is None else bias_O,
        out_1O,
        rows,
        **constants(**rows_shape(x_1I, values, how), BIAS=bias_O is not None, FACTOR=factor),
        **sums.arguments(exchange),
    )
    return out_1O


def rows_shape(x: Tensor, weight: Tensor, how: Rows) -> dict[str, Any]:
    return {
        "COLUMNS": weight.shape[1],
        "ROWS": how.warps,
        "PART": PART_BYTES // weight.element_size(),
        "AHEAD": how.ahead,
        "EARLY": early(x),
        "num_warps": how.warps,
        **capped(x, how.registers),
    }


def few_cut(x_TI: Tensor, weight_OI: Tensor) -> tuple[int, int] | None:
    """(ways, unroll) of `few` at this shape: columns shared by so many warps, and steps of each whose loads are in
    flight together. They divide the columns, as masks would cost `few` its layout. None: `few` cannot do it."""
    columns = x_TI.shape[1]
    if len(x_TI) > FEW_TOKENS or columns % STEP_COLUMNS or x_TI.element_size() != 2 or weight_OI.dtype != x_TI.dtype:
        return None
    steps = columns // STEP_COLUMNS
    ways = math.gcd(steps, MOST_WAYS)
    return ways, max(count for count in range(1, MOST_STEPS + 1) if steps // ways % count == 0)


def few(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, ways: int, unroll: int) -> Tensor:
    """linear for 1 to FEW_TOKENS tokens."""
    tokens, rows = len(x_TI), len(weight_OI)
    out_TO = torch.empty((tokens, rows), dtype=x_TI.dtype, device=x_TI.device)
    _few[(-(-rows // TILE_ROWS),)](
        x_TI.contiguous(),
        weight_OI,
        weight_OI if bias_O is None else bias_O,
        out_TO,
        tokens,
        rows,
        **constants(**few_shape(x_TI, ways, unroll), BIAS=bias_O is not None),
    )
    return out_TO


def few_shape(x_TI: Tensor, ways: int, unroll: int) -> dict[str, Any]:
    return {
        "COLUMNS": x_TI.shape[1],
        "TOKENS": 8 if len(x_TI) <= 8 else 16,
        "WAYS": ways,
        "UNROLL": unroll,
        "EARLY": early(x_TI),
        "PLAIN": not x_TI.is_cuda,
        "num_warps": ways,
    }


@triton.jit
def _part(weight, row, there, part: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr):
    """[ROWS, PART] of a weight, a row for each warp; zeros past the columns and in rows that are not there."""
    column = part * PART + tl.arange(0, PART)
    here = there[:, None] & (column < COLUMNS)[None, :]
    return tl.load(weight + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], mask=here, other=0)


@triton.jit
def _part_of_x(x, row, part: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr):
    """[ROWS, PART] fp32: the same for each row, as each warp needs it whole and another layout would cost a way through
    shared memory."""
    column = part * PART + tl.arange(0, PART)
    at = row[:, None] * 0 + column[None, :]
    return tl.load(x + at, mask=at < COLUMNS, other=0.0).to(tl.float32)


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
    PART: tl.constexpr,
    AHEAD: tl.constexpr,
    BIAS: tl.constexpr,
    FACTOR: tl.constexpr,
    EARLY: tl.constexpr,
    counts=None,
    addresses=None,
    RANK: tl.constexpr = 0,
):
    """With addresses: the sum over ranks (`triton_all_reduce.summed`)."""
    if EARLY:
        gdc_launch_dependents()
    PARTS: tl.constexpr = (COLUMNS + PART - 1) // PART
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    w = ()
    for i in tl.static_range(min(AHEAD, PARTS)):
        w += (_part(weight, row, there, i, COLUMNS, PART),)
    offset = tl.zeros([ROWS], tl.float32)
    if BIAS and addresses is not None:  # peers wait for what comes after the product
        offset = tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    if EARLY:
        tl.debug_barrier()  # ptxas would read the weights after the wait
        gdc_wait()
    if addresses is not None:
        call = tl.load(counts + tl.program_id(0)) + 1
    acc = tl.zeros([ROWS, PART], tl.float32)
    for i in tl.static_range(PARTS):
        if i % 4 == 0:
            tl.debug_barrier()  # ptxas would read all of x at once, into registers that weights need
        if i + AHEAD < PARTS:
            w += (_part(weight, row, there, i + AHEAD, COLUMNS, PART),)
        if (
            BIAS and addresses is None and i == min(4, PARTS - 1)
        ):  # registers are free, and there is work left meanwhile
            offset = tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
        acc += operand(w[i], tl.float32) * _part_of_x(x, row, i, COLUMNS, PART)
    y = tl.sum(acc, 1)
    if FACTOR > 0:
        y *= tl.load(scale + row, mask=there, other=0.0) * FACTOR
    y += offset
    if addresses is not None:
        y = summed(y.to(out.dtype.element_ty), call, tl.program_id(0), addresses, RANK, 32)
        tl.debug_barrier()  # all lanes have read the count
        tl.store(counts + tl.program_id(0), call)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def _weights(left, right, WAYS: tl.constexpr):
    """Two [(way g t), 8 (q kh h)] -> the operands [way, 16 (rh g), 16 (t kh h)] of q = 0 and 1."""
    w = tl.join(left, right).reshape(WAYS, 8, 4, 2, 2, 2, 2)  # way g t q kh h rh
    w_0, w_1 = w.permute(0, 6, 1, 2, 4, 5, 3).split()
    return w_0.reshape(WAYS, 16, 16), w_1.reshape(WAYS, 16, 16)


@triton.jit
def _operands(x, WAYS: tl.constexpr, TOKENS: tl.constexpr):
    """[(nh way nl t), 8 (q kh h)] -> the operands [way, 16 (t kh h), TOKENS (nh nl)] of q = 0 and 1."""
    x_0, x_1 = x.reshape(TOKENS // 8, WAYS, 8, 4, 2, 2, 2).permute(1, 3, 5, 6, 0, 2, 4).split()
    return x_0.reshape(WAYS, 16, TOKENS), x_1.reshape(WAYS, 16, TOKENS)


@triton.jit
def group_rows(WAYS: tl.constexpr):
    """[WAYS * 32]: which of eight rows each lane loads, see `few_product`."""
    return tl.arange(0, WAYS * 32) % 32 // 4


@triton.jit
def few_product(
    x,
    weight,
    left_L,
    right_L,
    tokens,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    WAYS: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """16 rows by all tokens: [16 (rh g), TOKENS] fp32. What stands past `tokens` means nothing. left_L, right_L: the
    rows rh = 0 and rh = 1 of each lane, by its `group_rows`. Waits for the kernel before once the first weights are
    asked for.

    A step of a warp is 32 columns = (t q kh h): t < 4 lanes of a row, the rest in a lane. Neither load has a mask: with
    one Triton moves what was loaded between lanes.
    """
    if EARLY:
        gdc_launch_dependents()
    lane = tl.arange(0, WAYS * 32)
    column = (lane // 32 * 32 + lane % 4 * 8)[:, None] + tl.arange(0, 8)[None, :]
    left = weight + left_L.to(tl.int64)[:, None] * COLUMNS + column
    right = weight + right_L.to(tl.int64)[:, None] * COLUMNS + column
    place = tl.arange(0, WAYS * TOKENS * 4)  # nh way nl t
    token = tl.minimum(place // (WAYS * 32) * 8 + place % 32 // 4, tokens - 1)
    column = (place % (WAYS * 32) // 32 * 32 + place % 4 * 8)[:, None] + tl.arange(0, 8)[None, :]
    x += tl.multiple_of(token * COLUMNS, 32)[:, None] + column
    acc = tl.zeros([WAYS, 16, TOKENS], tl.float32)
    for begin in range(0, COLUMNS, WAYS * 32 * UNROLL):
        lefts = ()
        rights = ()
        for i in tl.static_range(UNROLL):
            lefts += (tl.load(left + begin + i * (WAYS * 32)),)
            rights += (tl.load(right + begin + i * (WAYS * 32)),)
        tl.debug_barrier()  # ptxas sinks loads to their use, but not across this
        if EARLY:
            gdc_wait()
        for i in tl.static_range(UNROLL):
            x_0, x_1 = _operands(tl.load(x + begin + i * (WAYS * 32)), WAYS, TOKENS)
            w_0, w_1 = _weights(lefts[i], rights[i], WAYS)
            if PLAIN:
                x_0, x_1, w_0, w_1 = x_0.to(tl.float32), x_1.to(tl.float32), w_0.to(tl.float32), w_1.to(tl.float32)
            acc = tl.dot(w_1, x_1, tl.dot(w_0, x_0, acc, input_precision="ieee"), input_precision="ieee")
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["tokens", "rows"])
def _few(
    x,
    weight,
    bias,
    out,
    tokens,
    rows,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    WAYS: tl.constexpr,
    UNROLL: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    PLAIN: tl.constexpr,
):
    first = tl.program_id(0) * 16
    left_L = tl.minimum(first + group_rows(WAYS), rows - 1)
    right_L = tl.minimum(first + 8 + group_rows(WAYS), rows - 1)
    row = first + tl.arange(0, 16)
    offset = tl.zeros([16], tl.float32)
    if BIAS:  # ahead of the product, as in `_one`
        offset = tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    y = few_product(x, weight, left_L, right_L, tokens, COLUMNS, TOKENS, WAYS, UNROLL, EARLY, PLAIN)
    y += offset[:, None]
    token = tl.arange(0, TOKENS)
    there = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(out + token[None, :] * rows + row[:, None], y.to(out.dtype.element_ty), mask=there)

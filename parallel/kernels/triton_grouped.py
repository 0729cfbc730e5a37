"""Experts for many tokens: pairs sorted by expert, then products of 128 outputs by many rows on the tensor cores.

Four steps, each a kernel: sort the pairs and reorder x within each 64 columns (as Tiles want it: operands then need no
shuffle); gate_up with SwiGLU; down; the weighted sum over a token's experts. Weights become bf16 in registers and go
from there into the product, x passes through shared memory. How many pairs an expert has is known to the device alone,
so grids cover the worst case and programs without work leave at once.

T tokens, X experts a token, P = T X pairs (token, expert); pair = token * X + place; E experts here.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .experts import SWIGLU_ALPHA
from .triton_mxfp4 import HALVES, TILE_COLUMNS, Tiles, scaled_planes, swiglu

SORT_PAIRS = 2048  # pairs that the sort looks at together
SUM_COLUMNS = 512
MOST_EXPERTS = 128  # what is compiled for, if there are no more
_BACK = tl.constexpr(2.0**32)  # `scaled_planes` gives 2**-32 times the weights
_CODES, _HALVES = tl.constexpr(TILE_COLUMNS), tl.constexpr(HALVES)


@dataclass(frozen=True)
class Shape:
    """How a product is cut: a program makes `tiles` * 16 outputs of `rows` pairs of an expert. For the last pairs of
    each it takes fewer, `least_rows` or twice that and so on, as few as hold them."""

    rows: int
    least_rows: int
    tiles: int
    warps: int
    stages: int

    @property
    def sizes(self) -> int:
        """How many row counts there are, from `least_rows` to `rows`."""
        return (self.rows // self.least_rows).bit_length()


@triton.jit(do_not_specialize=["first", "held", "pairs"])
def _sort(experts, order, starts, first, held, pairs, BLOCK: tl.constexpr):
    """order [P] int32: the pairs held here, by expert, then by number; starts [E + 1] int32: where each begins.

    One program an expert: it counts those before its own, then writes its own.
    """
    expert = tl.program_id(0)
    less = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, pairs, BLOCK):
        pair = begin + tl.arange(0, BLOCK)
        local = tl.load(experts + pair, mask=pair < pairs, other=-1).to(tl.int32) - first
        there = (pair < pairs) & (local >= 0)
        less += (there & (local < expert)).to(tl.int32)
        equal += (there & (local == expert)).to(tl.int32)
    start = tl.sum(less, 0)
    tl.store(starts + expert, start)
    if expert == held - 1:
        tl.store(starts + held, start + tl.sum(equal, 0))
    for begin in range(0, pairs, BLOCK):
        pair = begin + tl.arange(0, BLOCK)
        local = tl.load(experts + pair, mask=pair < pairs, other=-1).to(tl.int32) - first
        mine = (pair < pairs) & (local == expert)
        place = tl.cumsum(mine.to(tl.int32), 0)
        tl.store(order + start + place - 1, pair, mask=mine)
        start += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _reorder(x, out, width, out_width, COLUMNS: tl.constexpr):
    """Each 64 columns of a row from 32 b + 8 t + 4 q + 2 kh + h to 32 b + 16 q + 8 kh + 2 t + h; zeros past width."""
    token = tl.program_id(0).to(tl.int64)
    to = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b, q, kh, t, h = to // 32, to // 16 % 2, to // 8 % 2, to // 2 % 4, to % 2
    column = 32 * b + 8 * t + 4 * q + 2 * kh + h
    value = tl.load(x + token * width + column, mask=column < width, other=0.0)
    tl.store(out + token * out_width + to, value, mask=to < out_width)


@triton.jit
def _where(starts, block, held, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """(expert, its first row, first row of this block, end of its rows) of the block-th group of ROWS sorted pairs;
    expert is `held` or more where there are no more."""
    expert = tl.arange(0, EXPERTS)
    start = tl.load(starts + expert, mask=expert < held, other=0)
    end = tl.load(starts + expert + 1, mask=expert < held, other=0)
    upto = tl.cumsum((end - start + ROWS - 1) // ROWS, 0)  # blocks of experts up to and including this
    chosen = tl.sum((upto <= block).to(tl.int32), 0)
    before = tl.max(tl.where(upto <= block, upto, 0), 0)
    begin = tl.sum(tl.where(expert == chosen, start, 0), 0) + (block - before) * ROWS
    return chosen, begin, tl.sum(tl.where(expert == chosen, end, 0), 0)


@triton.jit
def _weights(half, word, TILES: tl.constexpr, PLAIN: tl.constexpr):
    """halves [(tiles, g, t), 8 (kh rh h)], scale words [(tiles, g, t)] -> [tiles * 16 (rh g), 64 (b q kh t h)].

    Two dims in, as a third would let Triton lay lanes along the tiles, and weights would pass through shared memory.
    """
    odd = (tl.arange(0, 8) // 2 % 2)[None, :] == 1  # rh of each half
    pair = tl.where(odd, (word >> 16)[:, None], word[:, None])  # bytes rh 0 b 0, rh 0 b 1, rh 1 b 0, rh 1 b 1
    v_0, v_1, v_2, v_3 = scaled_planes(half, (pair & 255).to(tl.int16), ((pair >> 8) & 255).to(tl.int16), PLAIN)
    value = tl.join(tl.join(v_0, v_2), tl.join(v_1, v_3))  # ... b q
    value = value.reshape(TILES, 8, 4, 2, 2, 2, 2, 2).permute(0, 4, 1, 6, 7, 3, 2, 5)
    return value.reshape(TILES * 16, 64)


@triton.jit
def _product(
    x,
    blocks,
    scales,
    bias,
    order,
    out,
    expert,
    begin,
    end,
    column_block,
    tiles,
    steps,
    rows,
    out_width,
    limit,
    ALPHA: tl.constexpr,
    GATE_UP: tl.constexpr,
    EXPERTS_PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Sorted pairs `begin` up to `end`, at most ROWS, of one expert by TILES * 16 outputs, as `_grouped` says."""
    place = begin + tl.arange(0, ROWS)
    live = place < end
    pair = tl.load(order + place, mask=live, other=0)
    source = pair // EXPERTS_PER_TOKEN if GATE_UP else tl.where(live, place, 0)
    column = tl.arange(0, _CODES)
    x_MK = x + source.to(tl.int64)[:, None] * (steps * _CODES) + column[None, :]
    lane = tl.arange(0, TILES * 32)
    tile = tl.minimum(column_block * TILES + lane // 32, tiles - 1)  # past the last: again it, not stored
    tile = (expert.to(tl.int64) * tiles + tile) * steps
    half = blocks + (tile * _HALVES + lane % 32 * 8)[:, None] + tl.arange(0, 8)[None, :]
    scale = scales + tile * 8 + lane % 32 // 4
    acc = tl.zeros((TILES * 16, ROWS), tl.float32)
    for step in range(0, steps):
        weight = _weights(tl.load(half + step * _HALVES), tl.load(scale + step * 8), TILES, PLAIN)
        value = tl.load(x_MK + step * _CODES)
        acc = tl.dot(weight, tl.trans(value.to(weight.dtype)), acc)
        if not PLAIN:
            # Weights are in registers, and Triton (3.6) would leave the products of a step pending while the weights of
            # the next are written into those registers. What reads the sum in between makes it wait for them.
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], tl.float32, is_pure=True, pack=1)
    acc *= _BACK
    bias += expert.to(tl.int64) * rows
    if GATE_UP:
        UNITS: tl.constexpr = TILES * 8
        gate, up = acc.reshape(TILES, 2, 8, ROWS).permute(0, 2, 3, 1).reshape(UNITS, ROWS, 2).split()
        unit = column_block * UNITS + tl.arange(0, UNITS)
        there = unit * 2 < rows
        gate += tl.load(bias + unit * 2, mask=there, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias + unit * 2 + 1, mask=there, other=0.0).to(tl.float32)[:, None]
        value = tl.where(there[:, None], swiglu(gate, up, limit, ALPHA), 0.0)
        value = tl.trans(value.to(out.dtype.element_ty))
        value = value.reshape(ROWS, UNITS // 32, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(ROWS, UNITS)
        at = place.to(tl.int64)[:, None] * out_width + unit[None, :]
        tl.store(out + at, value, mask=live[:, None] & (unit < out_width)[None, :])
    else:
        OUTPUTS: tl.constexpr = TILES * 16
        value = acc.reshape(TILES, 2, 8, ROWS).permute(3, 0, 2, 1).reshape(ROWS, OUTPUTS)
        output = column_block * OUTPUTS + tl.arange(0, OUTPUTS)
        there = output < rows
        value += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)[None, :]
        at = pair.to(tl.int64)[:, None] * out_width + output[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=live[:, None] & there[None, :])


@triton.jit(do_not_specialize=["held"])
def _grouped(
    x,
    blocks,
    scales,
    bias,
    order,
    starts,
    out,
    held,
    tiles,
    steps,
    rows,
    out_width,
    limit,
    ALPHA: tl.constexpr,
    GATE_UP: tl.constexpr,
    EXPERTS_PER_TOKEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    LEAST_ROWS: tl.constexpr,
    SIZES: tl.constexpr,
    TILES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """GATE_UP: x [T, steps * 64] reordered -> out [P, out_width], SwiGLU, sorted and reordered as x is.
    Otherwise x [P, steps * 64] sorted and reordered -> out [P, out_width] by pair, columns as they should be.

    Blocks of ROWS pairs; the last one of an expert takes as few rows as it needs, of SIZES counts from LEAST_ROWS on,
    each twice the one before.
    """
    column_block, block = tl.program_id(0), tl.program_id(1)
    expert, begin, end = _where(starts, block, held, EXPERTS, ROWS)
    if expert >= held:
        return
    count = tl.minimum(end - begin, ROWS)
    for size in tl.static_range(SIZES):
        if (count <= LEAST_ROWS << size) & (count > (LEAST_ROWS << size >> 1) * (size > 0)):
            _product(
                x,
                blocks,
                scales,
                bias,
                order,
                out,
                expert,
                begin,
                end,
                column_block,
                tiles,
                steps,
                rows,
                out_width,
                limit,
                ALPHA,
                GATE_UP,
                EXPERTS_PER_TOKEN,
                LEAST_ROWS << size,
                TILES,
                PLAIN,
            )


@triton.jit(do_not_specialize=["first", "held"])
def _sum(y, weights, experts, out, first, held, width, EXPERTS_PER_TOKEN: tl.constexpr, COLUMNS: tl.constexpr):
    """out [T, width]: the weighted sum of y [P, width] over a token's experts that are here, in their order."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for place in tl.static_range(EXPERTS_PER_TOKEN):
        pair = token.to(tl.int64) * EXPERTS_PER_TOKEN + place
        chosen = tl.load(experts + pair).to(tl.int32) - first
        here = (chosen >= 0) & (chosen < held)
        value = tl.load(y + pair * width + column, mask=here & (column < width), other=0.0)
        total += tl.load(weights + pair) * value.to(tl.float32)
    tl.store(out + token.to(tl.int64) * width + column, total.to(out.dtype.element_ty), mask=column < width)


def grouped(
    x_TH: Tensor,
    weights_TX: Tensor,
    experts_TX: Tensor,
    gate_up: Tiles,
    down: Tiles,
    first_expert: int,
    limit: float,
    shapes: tuple[Shape, Shape] | None = None,
) -> Tensor:
    """`experts.experts` for any number of tokens. shapes: of gate_up and down; None: by pairs an expert."""
    tokens, width = x_TH.shape
    per_token = experts_TX.shape[1]
    pairs = tokens * per_token
    held, rows = gate_up.bias.shape
    device = x_TH.device
    order_P = torch.empty(pairs, dtype=torch.int32, device=device)
    starts = torch.empty(held + 1, dtype=torch.int32, device=device)
    _sort[held,](experts_TX, order_P, starts, first_expert, held, pairs, BLOCK=SORT_PAIRS, num_warps=8)
    steps, inner_steps = gate_up.blocks.shape[2], down.blocks.shape[2]
    wide, inner_wide = steps * TILE_COLUMNS, inner_steps * TILE_COLUMNS
    ordered_TH = torch.empty((tokens, wide), dtype=x_TH.dtype, device=device)
    _reorder[tokens, triton.cdiv(wide, 1024)](x_TH, ordered_TH, width, wide, COLUMNS=1024)
    inner_PI = torch.empty((pairs, inner_wide), dtype=x_TH.dtype, device=device)
    y_PH = torch.empty((pairs, width), dtype=x_TH.dtype, device=device)
    for x, packed, y, is_gate_up, shape in (
        (ordered_TH, gate_up, inner_PI, True, _shape(pairs, held) if shapes is None else shapes[0]),
        (inner_PI, down, y_PH, False, _shape(pairs, held) if shapes is None else shapes[1]),
    ):
        _, tiles, steps, *_ = packed.blocks.shape
        # gate_up also writes the zeros that fill up the last 64 columns of its result
        outputs = 2 * inner_wide if is_gate_up else width
        _grouped[triton.cdiv(outputs, shape.tiles * 16), _blocks(pairs, held, shape.rows)](
            x,
            packed.blocks,
            packed.scales.view(torch.int32),
            packed.bias,
            order_P,
            starts,
            y,
            held,
            tiles,
            steps,
            packed.bias.shape[1],
            y.shape[1],
            limit,
            ALPHA=SWIGLU_ALPHA,
            GATE_UP=is_gate_up,
            EXPERTS_PER_TOKEN=per_token,
            EXPERTS=max(MOST_EXPERTS, triton.next_power_of_2(held)),
            ROWS=shape.rows,
            LEAST_ROWS=shape.least_rows,
            SIZES=shape.sizes,
            TILES=shape.tiles,
            PLAIN=not x_TH.is_cuda,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    out_TH = torch.empty_like(x_TH)
    _sum[tokens, triton.cdiv(width, SUM_COLUMNS)](
        y_PH,
        weights_TX,
        experts_TX,
        out_TH,
        first_expert,
        held,
        width,
        EXPERTS_PER_TOKEN=per_token,
        COLUMNS=SUM_COLUMNS,
    )
    return out_TH


def _blocks(pairs: int, held: int, rows: int) -> int:
    """The most groups of `rows` that the pairs can fill, however they fall: every expert may leave one unfilled."""
    return min(pairs, pairs // rows + held)


def _shape(pairs: int, held: int) -> Shape:
    """By how many pairs an expert has on average."""
    return next(shape for most, shape in _SHAPES if pairs <= most * held)


_SHAPES = (  # as tests/benchmarks/kernels_experts.py found them on an H200
    (12, Shape(rows=16, least_rows=16, tiles=16, warps=4, stages=4)),
    (40, Shape(rows=32, least_rows=32, tiles=8, warps=4, stages=5)),
    (96, Shape(rows=64, least_rows=16, tiles=8, warps=4, stages=5)),
    (math.inf, Shape(rows=128, least_rows=32, tiles=8, warps=4, stages=4)),
)

"""Experts for few tokens: two kernels that read each needed expert once, by programs of one warp, and one that sums up.

A program owns 16 rows (a tile) of one expert, a slot, and all tokens that chose it: 8 or so are the columns of the
tensor core's product. So many tokens fill no wgmma, and what is left is to keep the memory busy: all loads of a few
steps, then a barrier that they may not sink below, then their use. With one token the columns are steps: x of up to 8
of them is one operand, and of a step's product the column of that step counts. K is then split over more programs,
whose sum is done by the last to arrive, always in the same order: runs repeat bit for bit.

T tokens, X experts a token, P = T X pairs (token, expert); pair = token * X + place.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOptionalOperand=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import sums
from .experts import SWIGLU_ALPHA
from .triton_launch import MOST_REGISTERS, arrive, at_once, capped, constants, early
from .triton_mxfp4 import HALVES, MAX_SLOTS, TILE_COLUMNS, TILE_ROWS, Tiles, planes, swiglu
from .triton_parts import Parts, sum_up, terms_of
from .triton_route import choice, leave_choice

MAX_PAIRS = 256
COLUMNS = 8  # rows of x in one product
CHUNK_PAIRS = 64  # pairs that a program looks at together
_UP = tl.constexpr(2.0**100)  # what x is multiplied with (exact in bf16), as weights come times 2**-126
_BACK = tl.constexpr(2.0**26)
_UP_ASM = tl.constexpr("{ .reg .b32 f, z; mov.b32 f, 0x71807180; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, f, z; }")
_CODES, _HALVES = tl.constexpr(TILE_COLUMNS), tl.constexpr(HALVES)
_NO_PAIR = tl.constexpr(MAX_PAIRS)


@triton.jit
def _scaled_up(x, PLAIN: tl.constexpr):
    if PLAIN:
        return x.to(tl.float32) * _UP
    else:
        return tl.inline_asm_elementwise(_UP_ASM, "=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _operands(x, COLUMNS: tl.constexpr):
    """x [(columns, 4 t), 8 (q kh h)] -> the two operands [16 (kh t h), columns] of q = 0 and 1."""
    x_0, x_1 = x.reshape(COLUMNS, 4, 2, 2, 2).permute(0, 1, 3, 4, 2).split()
    return x_0.permute(2, 1, 3, 0).reshape(16, COLUMNS), x_1.permute(2, 1, 3, 0).reshape(16, COLUMNS)


@triton.jit
def _weights(plane):
    """[32 (g t), 8 (kh rh h)] -> [16 (rh g), 16 (kh t h)]: for one warp, other names of the same registers."""
    return plane.reshape(8, 4, 2, 2, 2).permute(3, 0, 2, 1, 4).reshape(16, 16)


@triton.jit
def _factors(word, SHIFT: tl.constexpr):
    """Words [8 g] of scale bytes (rh b) -> [2 rh, 8 g, 1]: one block's scales, each the exponent of an fp32."""
    if SHIFT == 0:
        even, odd = word << 23, word << 7
    else:
        even, odd = word << 15, word >> 1
    return (tl.join(even, odd) & 0x7F800000).to(tl.float32, bitcast=True).permute(1, 0)[:, :, None]


@triton.jit
def _asked(block, scale, step, end, UNROLL: tl.constexpr, EVEN: tl.constexpr):
    """Halves and scale words of the next UNROLL steps, zeros from `end` on. EVEN: all of them are there. They pass by
    the L1 cache, which x is to stay in."""
    halves = ()
    words = ()
    for i in tl.static_range(UNROLL):
        if EVEN:
            halves += (tl.load(block + i * _HALVES, cache_modifier=".cg"),)
            words += (tl.load(scale + i * 8, cache_modifier=".cg"),)
        else:
            more = step + i < end
            halves += (tl.load(block + i * _HALVES, mask=more, other=0, cache_modifier=".cg"),)
            words += (tl.load(scale + i * 8, mask=more, other=0, cache_modifier=".cg"),)
    return halves, words


@triton.jit
def _all_operands(x_0, x_1, SCALE_X: tl.constexpr, COLUMNS: tl.constexpr, PLAIN: tl.constexpr):
    """The four operands of a step, two of each of its blocks."""
    b_0, b_1 = _operands(x_0, COLUMNS)
    b_2, b_3 = _operands(x_1, COLUMNS)
    if SCALE_X:
        b_0, b_1 = _scaled_up(b_0, PLAIN), _scaled_up(b_1, PLAIN)
        b_2, b_3 = _scaled_up(b_2, PLAIN), _scaled_up(b_3, PLAIN)
    return b_0, b_1, b_2, b_3


@triton.jit
def _blocks(half, b, PLAIN: tl.constexpr):
    """A step's two blocks by their operands, [16, columns] each, without scales."""
    v_0, v_1, v_2, v_3 = planes(half, PLAIN)
    first = tl.dot(_weights(v_1), b[1].to(v_1.dtype), tl.dot(_weights(v_0), b[0].to(v_0.dtype)))
    second = tl.dot(_weights(v_3), b[3].to(v_3.dtype), tl.dot(_weights(v_2), b[2].to(v_2.dtype)))
    return first, second


@triton.jit
def _product(
    x,
    row_N,
    blocks,
    scales,
    tile,
    steps,
    begin,
    end,
    width,
    SCALE_X: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    WAIT: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Steps begin to end of one tile by `COLUMNS` rows of x: [2 rh, 8 g, columns] fp32.

    row_N: where each row of x begins; where a column is of no token, any row: what comes of it is not stored. width:
    columns of x. EVEN: UNROLL divides the steps, and x has 64 columns for each. WAIT: x may be of a kernel that still
    runs.
    """
    lane = tl.arange(0, 32)[:, None] * 8 + tl.arange(0, 8)[None, :]
    blocks += tile * steps * _HALVES + lane
    scales += tile * steps * 8 + tl.arange(0, 8)
    row_L = row_N[:, None].broadcast_to(COLUMNS, 4).reshape(COLUMNS * 4)
    x += (row_L + tl.arange(0, COLUMNS * 4) % 4 * 8)[:, None] + tl.arange(0, 8)[None, :]
    x = tl.multiple_of(x, (2, 16))  # in bytes; what is said of row_L Triton forgets where it changes layouts
    acc = tl.zeros((2, 8, COLUMNS), tl.float32)
    for step in range(begin, end, UNROLL):
        block, scale, row = blocks + step * _HALVES, scales + step * 8, x + step * _CODES
        halves, words = _asked(block, scale, step, end, UNROLL, EVEN)
        # ptxas sinks loads to their use, but not across this; x is read after it, so that no use can climb above it
        tl.debug_barrier()
        if WAIT:
            gdc_wait()
        for i in tl.static_range(UNROLL):
            if EVEN:
                x_0, x_1 = tl.load(row + i * _CODES), tl.load(row + i * _CODES + 32)
            else:
                more = step + i < end
                x_0 = tl.load(row + i * _CODES, mask=more, other=0.0)
                x_1 = tl.load(row + i * _CODES + 32, mask=more & ((step + i) * _CODES + 32 < width), other=0.0)
            b = _all_operands(x_0, x_1, SCALE_X, COLUMNS, PLAIN)
            first, second = _blocks(halves[i], b, PLAIN)
            acc += first.reshape(2, 8, COLUMNS) * _factors(words[i], 0)
            acc += second.reshape(2, 8, COLUMNS) * _factors(words[i], 1)
    return acc * _BACK


@triton.jit
def _product_of_one(
    x,
    blocks,
    scales,
    tile,
    steps,
    begin,
    end,
    width,
    SCALE_X: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    EVEN: tl.constexpr,
    WAIT: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """`_product` by one row of x, in all columns. Column i of an operand is x of the i-th step of UNROLL."""
    tl.static_assert(UNROLL <= COLUMNS)
    lane = tl.arange(0, 32)[:, None] * 8 + tl.arange(0, 8)[None, :]
    blocks += tile * steps * _HALVES + lane
    scales += tile * steps * 8 + tl.arange(0, 8)
    place = tl.arange(0, COLUMNS * 4)
    ahead = (tl.minimum(place // 4, UNROLL - 1) * _CODES + place % 4 * 8)[:, None]
    x += ahead + tl.arange(0, 8)[None, :]
    column = tl.arange(0, COLUMNS)[None, None, :]
    acc = tl.zeros((2, 8, COLUMNS), tl.float32)
    for step in range(begin, end, UNROLL):
        block, scale, row = blocks + step * _HALVES, scales + step * 8, x + step * _CODES
        halves, words = _asked(block, scale, step, end, UNROLL, EVEN)
        tl.debug_barrier()  # as in `_product`
        if WAIT:
            gdc_wait()
        if EVEN:
            x_0, x_1 = tl.load(row), tl.load(row + 32)
        else:
            left = width - step * _CODES - ahead
            x_0, x_1 = tl.load(row, mask=left > 0, other=0.0), tl.load(row + 32, mask=left > 32, other=0.0)
        b = _all_operands(x_0, x_1, SCALE_X, COLUMNS, PLAIN)
        for i in tl.static_range(UNROLL):
            first, second = _blocks(halves[i], b, PLAIN)
            y = first.reshape(2, 8, COLUMNS) * _factors(words[i], 0)
            y += second.reshape(2, 8, COLUMNS) * _factors(words[i], 1)
            acc += tl.where(column == i, y, 0.0)
    return (tl.sum(acc, 2) * _BACK)[:, :, None].broadcast_to(2, 8, COLUMNS)


@triton.jit
def _members(
    experts,
    logits,
    slot,
    first,
    held,
    pairs,
    by_expert,
    begin,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    SINGLE: tl.constexpr,
    PLACES: tl.constexpr,
    EXPERTS_PER_TOKEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
):
    """(the slot's expert, COLUMNS of its pairs from the begin-th on, which of them there are, where they end).

    A slot is an expert, or (not by_expert) a pair, of which the first of an expert stands for all. SINGLE: one token,
    whose experts differ; with EXPERTS they do not stand in experts yet, but are those of its best logits. PLACES: a
    power of two from EXPERTS_PER_TOKEN on where each token has a column of its own, so that no pair has to be counted;
    else 0. None for an expert that is not held here.
    """
    column = begin + tl.arange(0, COLUMNS)
    expert = slot
    if SINGLE and EXPERTS > 0:
        expert = choice(logits, slot, EXPERTS, EXPERTS_2, EXPERTS_PER_TOKEN) - first
    elif SINGLE or by_expert == 0:
        expert = tl.load(experts + slot).to(tl.int32) - first
    if SINGLE:
        pair_N = column * 0 + slot
        live_N = column < 1
        count = 1
    elif PLACES > 0:
        place = tl.arange(0, PLACES)
        pair = tl.arange(0, COLUMNS)[:, None] * EXPERTS_PER_TOKEN + place[None, :]
        there = (pair < pairs) & (place < EXPERTS_PER_TOKEN)[None, :]
        mine = (tl.load(experts + pair, mask=there, other=-1).to(tl.int32) - first == expert) & there
        pair_N = tl.sum(tl.where(mine, pair, 0), 1)
        live_N = tl.sum(mine.to(tl.int32), 1) > 0
        earliest = tl.min(tl.where(live_N, pair_N, _NO_PAIR), 0)
        count = tl.where((earliest < _NO_PAIR) & ((by_expert != 0) | (earliest == slot)), COLUMNS, 0)
    else:
        pair_N = tl.zeros((COLUMNS,), tl.int32)
        count = 0
        earlier = 0
        for at in range(0, pairs, CHUNK):
            pair = at + tl.arange(0, CHUNK)
            chosen = tl.load(experts + pair, mask=pair < pairs, other=-1).to(tl.int32) - first
            mine = (chosen == expert) & (pair < pairs)
            rank = count + tl.cumsum(mine.to(tl.int32), 0) - 1
            wanted = mine[None, :] & (rank[None, :] == column[:, None])
            pair_N += tl.sum(tl.where(wanted, pair[None, :], 0), 1)
            count += tl.sum(mine.to(tl.int32), 0)
            earlier += tl.sum((mine & (pair < slot)).to(tl.int32), 0)
        count = tl.where((by_expert != 0) | (earlier == 0), count, 0)
        live_N = column < count
    return expert, pair_N, live_N, tl.where((expert >= 0) & (expert < held), count, 0)


@triton.jit
def _biases(bias, expert, tile, rows):
    """Of a tile's even and odd rows, gates and ups, [8] each."""
    unit = tile * 8 + tl.arange(0, 8)
    bias += expert.to(tl.int64) * rows + unit * 2
    return tl.load(bias, mask=unit * 2 < rows, other=0.0), tl.load(bias + 1, mask=unit * 2 < rows, other=0.0)


@triton.jit
def _store_inner(y, inner, biases, tile, pair_N, live_N, rows, limit, ALPHA: tl.constexpr):
    """y [2 rh, 8 g, columns] -> SwiGLU of its even and odd rows, times _UP, in the rows pair_N of inner."""
    gate, up = y.permute(1, 2, 0).split()
    unit = tile * 8 + tl.arange(0, 8)
    gate += biases[0].to(tl.float32)[:, None]
    up += biases[1].to(tl.float32)[:, None]
    value = swiglu(gate, up, limit, ALPHA) * _UP
    at = pair_N.to(tl.int64)[None, :] * (rows // 2) + unit[:, None]
    tl.store(inner + at, value.to(inner.dtype.element_ty), mask=live_N[None, :] & (unit * 2 < rows)[:, None])


@triton.jit(do_not_specialize=["first", "held", "pairs", "by_expert"])
def _gate_up(
    x,
    blocks,
    scales,
    bias,
    experts,
    weights,
    logits,
    inner,
    partial,
    arrivals,
    first,
    held,
    pairs,
    by_expert,
    tiles,
    steps,
    width,
    rows,
    limit,
    ALPHA: tl.constexpr,
    EXPERTS_PER_TOKEN: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
    SINGLE: tl.constexpr,
    PLACES: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    PLAIN: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
):
    """inner [P, rows / 2] in the dtype of x, times _UP; rows of pairs that are not here stay as they were.

    partial: fp32 [SPLIT, P, tiles * 16]. With SPLIT the tokens must be at most COLUMNS. EXPERTS: of the model, whose
    logits are there in place of one token's choice: each program makes it, which is faster than to wait for one that
    has, and the first one leaves it in experts and weights for `_down`'s sum. 0: it is made.
    """
    if EARLY:
        gdc_wait()  # the routes are of the kernel before, and where experts are fetched so are the weights
        gdc_launch_dependents()  # not earlier, as elsewhere: `_down` and who sums up read these before they wait
    part, tile, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)  # the parts of a tile soon meet
    expert, pair_N, live_N, count = _members(
        experts,
        logits,
        slot,
        first,
        held,
        pairs,
        by_expert,
        0,
        COLUMNS,
        CHUNK,
        SINGLE,
        PLACES,
        EXPERTS_PER_TOKEN,
        EXPERTS,
        EXPERTS_2,
    )
    if EXPERTS > 0:
        if (part == 0) & (tile == 0) & (slot == 0):
            leave_choice(logits, weights, experts, EXPERTS, EXPERTS_2, EXPERTS_PER_TOKEN)
    share = tl.cdiv(steps, SPLIT)
    for begin in range(0, count, COLUMNS):
        if begin > 0:
            _, pair_N, live_N, _ = _members(
                experts,
                logits,
                slot,
                first,
                held,
                pairs,
                by_expert,
                begin,
                COLUMNS,
                CHUNK,
                SINGLE,
                PLACES,
                EXPERTS_PER_TOKEN,
                EXPERTS,
                EXPERTS_2,
            )
        if SPLIT == 1:  # ahead of the product, after which there is nothing else to wait for
            biases = _biases(bias, expert, tile, rows)
        if SINGLE:
            y = _product_of_one(
                x,
                blocks,
                scales,
                expert.to(tl.int64) * tiles + tile,
                steps,
                part * share,
                tl.minimum((part + 1) * share, steps),
                width,
                True,
                COLUMNS,
                UNROLL,
                EVEN,
                False,
                PLAIN,
            )
        else:
            y = _product(
                x,
                (pair_N // EXPERTS_PER_TOKEN).to(tl.int64) * width,
                blocks,
                scales,
                expert.to(tl.int64) * tiles + tile,
                steps,
                part * share,
                tl.minimum((part + 1) * share, steps),
                width,
                True,
                COLUMNS,
                UNROLL,
                EVEN,
                False,
                PLAIN,
            )
        if SPLIT == 1:
            _store_inner(y, inner, biases, tile, pair_N, live_N, rows, limit, ALPHA)
        else:
            row = tile * 16 + tl.arange(0, 2)[:, None] + tl.arange(0, 8)[None, :] * 2
            at = partial + pair_N[None, None, :] * (tiles * 16) + row[:, :, None]
            tl.store(at + part * pairs * tiles * 16, y, mask=live_N[None, None, :])
            if arrive(arrivals + slot * tiles + tile, SPLIT):
                y = tl.zeros((2, 8, COLUMNS), tl.float32)
                for i in tl.static_range(SPLIT):
                    part_y = at + i * pairs * tiles * 16
                    y += tl.load(part_y, mask=live_N[None, None, :], other=0.0, cache_modifier=".cg")
                biases = _biases(bias, expert, tile, rows)
                _store_inner(y, inner, biases, tile, pair_N, live_N, rows, limit, ALPHA)


@triton.jit(do_not_specialize=["first", "held", "pairs", "by_expert"])
def _down(
    inner,
    blocks,
    scales,
    bias,
    experts,
    weights,
    logits,
    out,
    partial,
    arrivals,
    first,
    held,
    pairs,
    by_expert,
    tiles,
    steps,
    rows,
    width,
    EXPERTS_PER_TOKEN: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
    SINGLE: tl.constexpr,
    PLACES: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    PLAIN: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    counts=None,
    addresses=None,
    RANK: tl.constexpr = 0,
):
    """partial: fp32 [SPLIT, P, tiles * 16]; rows of pairs that are not here stay as they were. SINGLE: the last program
    of a tile sums up, which is faster where there is a chain of few; else `triton_parts` does."""
    if EARLY:
        gdc_launch_dependents()
    tile, slot, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert, pair_N, live_N, count = _members(
        experts,
        logits,
        slot,
        first,
        held,
        pairs,
        by_expert,
        0,
        COLUMNS,
        CHUNK,
        SINGLE,
        PLACES,
        EXPERTS_PER_TOKEN,
        EXPERTS,
        EXPERTS_2,
    )
    share = tl.cdiv(steps, SPLIT)
    for begin in range(0, count, COLUMNS):
        if begin > 0:
            _, pair_N, live_N, _ = _members(
                experts,
                logits,
                slot,
                first,
                held,
                pairs,
                by_expert,
                begin,
                COLUMNS,
                CHUNK,
                SINGLE,
                PLACES,
                EXPERTS_PER_TOKEN,
                EXPERTS,
                EXPERTS_2,
            )
        if SINGLE:
            y = _product_of_one(
                inner + slot * width,
                blocks,
                scales,
                expert.to(tl.int64) * tiles + tile,
                steps,
                part * share,
                tl.minimum((part + 1) * share, steps),
                width,
                False,
                COLUMNS,
                UNROLL,
                EVEN,
                EARLY,
                PLAIN,
            )
        else:
            y = _product(
                inner,
                pair_N.to(tl.int64) * width,
                blocks,
                scales,
                expert.to(tl.int64) * tiles + tile,
                steps,
                part * share,
                tl.minimum((part + 1) * share, steps),
                width,
                False,
                COLUMNS,
                UNROLL,
                EVEN,
                EARLY,
                PLAIN,
            )
        if EARLY:
            gdc_wait()  # a part without steps has not: where an expert is cut over ranks there are some
        row = tile * 16 + tl.arange(0, 2)[:, None] + tl.arange(0, 8)[None, :] * 2
        at = (part * pairs + pair_N)[None, None, :] * (tiles * 16) + row[:, :, None]
        tl.store(partial + at, y, mask=live_N[None, None, :])
    if EARLY:
        gdc_wait()  # programs without work too: that this kernel is over has to mean that those before it are
    if SINGLE:
        if arrive(arrivals + tile, EXPERTS_PER_TOKEN * SPLIT):
            row = tile * 16 + tl.arange(0, 16)
            sum_up(
                terms_of(bias, experts, weights, first, held, rows, 0, row, EXPERTS_PER_TOKEN),
                out,
                partial,
                pairs,
                rows,
                0,
                row,
                tiles * 16,
                EXPERTS_PER_TOKEN,
                SPLIT,
                tile,
                counts,
                addresses,
                RANK,
            )


@dataclass(frozen=True)
class Cut:
    """How a product is cut: K into `split` parts; `unroll` steps whose loads are in flight together. early: the kernel
    is launched while the one before it still runs (programmatic dependent launch, from sm_90 on), and waits inside.
    by_token: each of at most COLUMNS tokens has a column of its own. registers: the most of a lane; with 64 there are
    as many programs of one warp at a time as can be, 32."""

    split: int
    unroll: int
    early: bool = True
    by_token: bool = False
    registers: int | None = None


_CUTS = (  # up to so many tokens, gate_up, down; the fastest on an H200 of those in tests/benchmarks/kernels_experts.py
    (1, Cut(split=5, unroll=3), Cut(split=5, unroll=3, registers=64)),
    (2, Cut(split=1, unroll=3), Cut(split=3, unroll=3)),
    (4, Cut(split=1, unroll=9, by_token=True), Cut(split=1, unroll=3)),
    (COLUMNS, Cut(split=1, unroll=9, by_token=True), Cut(split=1, unroll=3, by_token=True, registers=64)),
    (MAX_PAIRS, Cut(split=1, unroll=9), Cut(split=1, unroll=3)),
)
# of down, where ranks share the columns of an expert: for one token K in three parts, each at one go
_FEW_STEPS = 3 * COLUMNS


def _cuts(experts_TX: Tensor, down: Tiles) -> tuple[Cut, Cut]:
    tokens, per_token = experts_TX.shape
    if tokens * per_token > MAX_PAIRS:
        raise ValueError(f"{tokens} tokens of {per_token} experts are more than {MAX_PAIRS} pairs")
    first, second = next((first, second) for most, first, second in _CUTS if tokens <= most)
    steps = down.blocks.shape[2]
    if tokens == 1 and steps <= _FEW_STEPS:
        second = Cut(split=3, unroll=-(-steps // 3))
    return first, second


def decode(
    x_TH: Tensor,
    weights_TX: Tensor,
    experts_TX: Tensor,
    gate_up: Tiles,
    down: Tiles,
    first_expert: int,
    limit: float,
    cuts: tuple[Cut, Cut] | None = None,
    exchange: sums.Exchange | None = None,
    logits_1E: Tensor | None = None,
) -> Tensor:
    """`experts.experts` for at most MAX_PAIRS pairs. cuts: of gate_up and down; None: by the number of tokens.
    exchange: of `one_message`, for one token; the sum over its ranks. logits_1E: of one token, whose choice is made
    here (`triton_route.choice`), and left in weights_TX and experts_TX."""
    first, second = cuts or _cuts(experts_TX, down)
    inner_PI = gate_up_inner(x_TH, experts_TX, gate_up, first_expert, limit, first, weights_TX, logits_1E)
    return down_sum(inner_PI, weights_TX, experts_TX, down, first_expert, second, exchange, logits_1E)


def decode_parts(
    x_TH: Tensor,
    weights_TX: Tensor,
    experts_TX: Tensor,
    gate_up: Tiles,
    down: Tiles,
    first_expert: int,
    limit: float,
    cuts: tuple[Cut, Cut] | None = None,
) -> Parts:
    """`decode` of several tokens, but for the sum."""
    first, second = cuts or _cuts(experts_TX, down)
    inner_PI = gate_up_inner(x_TH, experts_TX, gate_up, first_expert, limit, first)
    return down_parts(inner_PI, weights_TX, experts_TX, down, first_expert, second)


def one_message(x_1H: Tensor, down: Tiles) -> sums.Message:
    """What `_down` would exchange for one token, the last program of each tile: if all of these wait, one more of any
    is there."""
    rows, tiles = down.bias.shape[1], down.blocks.shape[1]
    processors = -(-(tiles + 1) // at_once(1, MOST_REGISTERS))
    return sums.Message("experts", rows, x_1H.dtype, tiles, TILE_ROWS, processors)


def gate_up_inner(
    x_TH: Tensor,
    experts_TX: Tensor,
    packed: Tiles,
    first_expert: int,
    limit: float,
    cut: Cut,
    weights_1X: Tensor | None = None,
    logits_1E: Tensor | None = None,
) -> Tensor:
    """SwiGLU of the first product, [P, I] times 2**100 in the dtype of x; undefined for experts that are not here.
    logits_1E: experts_TX, and weights_1X, are chosen by these, not before."""
    tokens, width = x_TH.shape
    pairs = experts_TX.numel()
    held, rows = packed.bias.shape
    _, tiles, steps, *_ = packed.blocks.shape
    slots = _slots(experts_TX, held)
    split = cut.split if tokens <= COLUMNS and slots <= MAX_SLOTS else 1
    inner_PI = torch.empty((pairs, rows // 2), dtype=x_TH.dtype, device=x_TH.device)
    _gate_up[split, tiles, slots](
        x_TH,
        packed.blocks,
        packed.scales.view(torch.int32),
        packed.bias,
        experts_TX,
        experts_TX if weights_1X is None else weights_1X,
        experts_TX if logits_1E is None else logits_1E,
        inner_PI,
        torch.empty((split if split > 1 else 0, pairs, tiles * TILE_ROWS), dtype=torch.float32, device=x_TH.device),
        packed.arrivals,
        first_expert,
        held,
        pairs,
        int(slots == held),
        tiles,
        steps,
        width,
        rows,
        limit,
        ALPHA=SWIGLU_ALPHA,
        **_constants(experts_TX, logits_1E, steps, width, cut, split),
    )
    return inner_PI


def down_sum(
    inner_PI: Tensor,
    weights_TX: Tensor,
    experts_TX: Tensor,
    packed: Tiles,
    first_expert: int,
    cut: Cut,
    exchange: sums.Exchange | None = None,
    logits_1E: Tensor | None = None,
) -> Tensor:
    """The second product of what `gate_up_inner` gave, and its weighted sum, [T, H] in the dtype of inner."""
    given = inner_PI, weights_TX, experts_TX, packed, first_expert, cut
    if len(experts_TX) != 1:
        assert exchange is None
        return down_parts(*given).summed()
    out_1H = torch.empty((1, packed.bias.shape[1]), dtype=inner_PI.dtype, device=inner_PI.device)
    down_parts(*given, out_1H, exchange, logits_1E)
    return out_1H


def down_parts(
    inner_PI: Tensor,
    weights_TX: Tensor,
    experts_TX: Tensor,
    packed: Tiles,
    first_expert: int,
    cut: Cut,
    out_1H: Tensor | None = None,
    exchange: sums.Exchange | None = None,
    logits_1E: Tensor | None = None,
) -> Parts:
    """The second product. out_1H: of one token, where it is summed up too."""
    pairs, width = inner_PI.shape
    held, rows = packed.bias.shape
    _, tiles, steps, *_ = packed.blocks.shape
    slots = _slots(experts_TX, held)
    partial = torch.empty((cut.split, pairs, tiles * TILE_ROWS), dtype=torch.float32, device=inner_PI.device)
    _down[tiles, slots, cut.split](
        inner_PI,
        packed.blocks,
        packed.scales.view(torch.int32),
        packed.bias,
        experts_TX,
        weights_TX,
        experts_TX if logits_1E is None else logits_1E,
        inner_PI if out_1H is None else out_1H,
        partial,
        packed.arrivals,
        first_expert,
        held,
        pairs,
        int(slots == held),
        tiles,
        steps,
        rows,
        width,
        **_constants(experts_TX, logits_1E, steps, width, cut, cut.split),
        **sums.arguments(exchange),
    )
    starts_early = cut.early and early(experts_TX)
    return Parts(partial, packed.bias, experts_TX, weights_TX, first_expert, inner_PI.dtype, starts_early)


def _slots(experts_TX: Tensor, held: int) -> int:
    """One for each pair, or one for each expert if these are fewer."""
    tokens, per_token = experts_TX.shape
    return per_token if tokens == 1 else min(held, tokens * per_token)


def _constants(
    experts_TX: Tensor, logits_1E: Tensor | None, steps: int, width: int, cut: Cut, split: int
) -> dict[str, Any]:
    """Few values of each, as each combination is compiled."""
    tokens, per_token = experts_TX.shape
    by_token = cut.by_token and 1 < tokens <= COLUMNS
    experts = 0 if logits_1E is None else logits_1E.shape[1]
    return constants(
        EXPERTS_PER_TOKEN=per_token,
        CHUNK=CHUNK_PAIRS,
        COLUMNS=COLUMNS,
        UNROLL=cut.unroll,
        SPLIT=split,
        SINGLE=tokens == 1,
        PLACES=triton.next_power_of_2(per_token) if by_token else 0,
        EVEN=steps % (split * cut.unroll) == 0 and width == steps * TILE_COLUMNS,
        EARLY=cut.early and early(experts_TX),
        PLAIN=not experts_TX.is_cuda,
        EXPERTS=experts,
        EXPERTS_2=triton.next_power_of_2(experts),
        num_warps=1,
        **capped(experts_TX, cut.registers),
    )

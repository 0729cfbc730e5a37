"""The draw of `sample` with its passes over the logits in one Triton kernel: see sample.sample for what is drawn.

One pass reads the logits once: temperature, noise, min_p's floor, the first to finish, and for top_p and top_k the
weight of all tokens. The bits are those of hash.mix, in registers. A row is shared out among programs, so that a single
sequence fills the GPU too; the result does not depend on how. It equals that of sample.race in fp32 except where two
tokens finish within a rounding error of each other. A second kernel compares what programs and ranks have found, and
writes the winner to where the next step and the host look for it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import hash as hashing
from . import sample as plain
from .sample import AllGather, Drawn, Draws, Kept, Wanted
from .triton_launch import constants, early

BLOCK = 1024  # tokens a program looks at together
WARPS = 4
PROGRAMS = 2048  # at most as many as this in all, and one a row at least: some waves over the GPU
ROW_PROGRAMS = 256  # at most as many for a row: with BLOCK tokens each they hold the whole vocabulary

STEP = tl.constexpr(hashing.STEP % 2**64)
MULTIPLY_1 = tl.constexpr(hashing.MULTIPLY_1 % 2**64)
MULTIPLY_2 = tl.constexpr(hashing.MULTIPLY_2 % 2**64)
SHIFT = tl.constexpr(64 - plain.EXPONENTIAL_BITS)
UNIFORM_UNIT = tl.constexpr(2.0**-plain.EXPONENTIAL_BITS)
UNIFORM_MOST = tl.constexpr(1.0 - 2.0**-24)
WEIGHT_UNIT = tl.constexpr(2.0**plain.WEIGHT_BITS)


def sample(
    logits_SV: Tensor, first_token: int, all_gather: AllGather, draws: Draws, wanted: Wanted, kept: Kept | None = None
) -> Drawn:
    """As sample.sample, for bf16, fp16 and fp32. Can be captured in a CUDA graph if all_gather can."""
    return plain.sample(logits_SV, first_token, all_gather, draws, wanted, kept, FAST)


def sample_exact(
    logits_SV: Tensor, first_token: int, all_gather: AllGather, draws: Draws, kept: Kept | None = None
) -> Tensor:
    """As sample.sample_exact, and equal to `sample` here where that is complete."""
    return plain.sample_exact(logits_SV, first_token, all_gather, draws, kept, FAST)


def race(logits_SV: Tensor, first_token: int, draws: Draws, floor_S: Tensor | None, top_S: Tensor | None) -> Tensor:
    """As sample.race, in as many parts as there are programs of a row: that depends on how many rows there are, and not
    on how much of the vocabulary is here. ValueError for fp64, which is raced in fp64 and not here."""
    if logits_SV.dtype == torch.float64 or logits_SV.stride(1) != 1:
        raise ValueError(f"logits of {logits_SV.dtype} with strides {logits_SV.stride()}: rows of at most fp32 wanted")
    rows, vocab = logits_SV.shape
    parts = min(ROW_PROGRAMS, max(1, PROGRAMS // rows))
    found_SPX = torch.empty((rows, parts, 2 if top_S is None else 3), dtype=torch.int64, device=logits_SV.device)
    _race[(rows, parts)](
        logits_SV,
        logits_SV.stride(0),
        draws.temperature_S,
        draws.seed_S,
        draws.position_S,
        floor_S if floor_S is not None else logits_SV,
        top_S if top_S is not None else logits_SV,
        found_SPX,
        vocab,
        first_token,
        -(-vocab // (parts * BLOCK)),
        **_launch(HAS_FLOOR=floor_S is not None, HAS_TOP=top_S is not None, EARLY=early(logits_SV)),
    )
    return found_SPX


def first(found_RSPX: Tensor, kept: Kept | None) -> Drawn:
    """As sample.first, of a contiguous tensor."""
    ranks, rows, parts, columns = found_RSPX.shape
    tokens_S = torch.empty(rows, dtype=torch.int64, device=found_RSPX.device)
    complete_S = torch.empty(rows, dtype=torch.bool, device=found_RSPX.device)
    _first[(rows,)](
        found_RSPX,
        rows,
        parts,
        ranks * parts,
        tokens_S,
        complete_S.view(torch.uint8),
        **_places(kept, tokens_S),
        **constants(
            COLUMNS=columns,
            FOUND=triton.next_power_of_2(ranks * parts),
            EARLY=early(found_RSPX),
            num_warps=WARPS,
        ),
    )
    return Drawn(tokens_S, complete_S)


def keep(drawn: Drawn, kept: Kept) -> None:
    """As sample.keep; outs_NS2 may be pinned memory of the host."""
    _keep[(len(drawn.tokens_S),)](
        drawn.tokens_S,
        drawn.complete_S.view(torch.uint8),
        **_places(kept, drawn.tokens_S),
        **constants(num_warps=1),
    )


def _places(kept: Kept | None, tokens_S: Tensor) -> dict[str, Any]:
    """Arguments of a kernel that keeps draws, of rows that there is room for; anything where nothing is kept."""
    if kept is None:
        return {**dict.fromkeys(("row_of", "last", "step", "outs"), tokens_S), "room": 0, "KEPT_STEPS": 0}
    steps, room, _ = kept.outs_NS2.shape
    if not kept.outs_NS2.is_contiguous() or len(tokens_S) > min(room, len(kept.row_S)):
        raise ValueError(f"{len(tokens_S)} draws of {len(kept.row_S)} rows, and there is room for {room}")
    where = {"row_of": kept.row_S, "last": kept.last_R, "step": kept.step_1, "outs": kept.outs_NS2}
    return {**where, "room": room, "KEPT_STEPS": steps}


def log_times(draws: Draws, token_SX: Tensor, precision: torch.dtype) -> Tensor:
    """As sample.log_times, of contiguous ids [S, X], in fp32."""
    if precision != torch.float32 or not token_SX.is_contiguous():
        raise ValueError(f"times in {precision} of ids with strides {token_SX.stride()}: fp32, contiguous wanted")
    rows, columns = token_SX.shape
    out_SX = torch.empty((rows, columns), dtype=precision, device=token_SX.device)
    _log_times[(rows, -(-columns // BLOCK))](
        token_SX, draws.temperature_S, draws.seed_S, draws.position_S, out_SX, columns, **_launch()
    )
    return out_SX


FAST = plain.Local(race, first, log_times, keep)


def _launch(**constants: bool) -> dict[str, Any]:
    return {"BLOCK": BLOCK, "num_warps": WARPS, **constants}


@triton.jit(do_not_specialize=["first_token", "blocks"])
def _race(
    logits,
    row_stride,
    temperatures,
    seeds,
    positions,
    floors,
    tops,
    found,
    vocab,
    first_token,
    blocks,
    HAS_FLOOR: tl.constexpr,
    HAS_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    row, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    temperature = tl.load(temperatures + row)
    is_cold = temperature == 0
    divisor = tl.where(is_cold, 1.0, temperature)
    stream = _stream(seeds + row, positions + row) + first_token.to(tl.uint64)
    start = part * (blocks * BLOCK)
    end = tl.minimum(start + blocks * BLOCK, vocab)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = start + lane
    total = tl.zeros((BLOCK,), tl.int64)
    next_time = tl.zeros((BLOCK,), tl.float32)  # of a block, worked out before its logits are there
    if not is_cold and start < end:
        next_time = _log_time(stream + at.to(tl.uint64))
    if EARLY:
        gdc_wait()
    floor = tl.load(floors + row) if HAS_FLOOR else 0.0
    top = tl.load(tops + row) if HAS_TOP else 0.0
    for begin in range(start, end, BLOCK):
        column = begin + lane
        here = column < vocab
        x = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=here, other=float("-inf")).to(tl.float32)
        log_time = next_time
        if not is_cold and begin + BLOCK < end:
            next_time = _log_time(stream + (column + BLOCK).to(tl.uint64))
        x = tl.div_rn(x, tl.full((BLOCK,), 1.0, tl.float32) * divisor)
        finish = x - log_time
        if HAS_TOP:
            total += (tl.exp(x - top) * WEIGHT_UNIT).to(tl.int64)
        if HAS_FLOOR:
            finish = tl.where(x < floor, float("-inf"), finish)
        is_better = finish > best  # an equal one of a higher id is not
        best = tl.where(is_better, finish, best)
        at = tl.where(is_better, column, at)
    first = tl.max(best, 0)
    found += (row * tl.num_programs(1) + part) * (3 if HAS_TOP else 2)
    tl.store(found, first.to(tl.float64).to(tl.int64, bitcast=True))
    tl.store(found + 1, tl.min(tl.where(best == first, at, 0x7FFFFFFF), 0).to(tl.int64) + first_token)
    if HAS_TOP:
        tl.store(found + 2, tl.sum(total, 0))


@triton.jit(do_not_specialize=["rows", "parts", "count", "room"], do_not_specialize_on_alignment=["row_of", "step"])
def _first(
    found,
    rows,
    parts,
    count,
    tokens,
    completes,
    row_of,
    last,
    step,
    outs,
    room,
    COLUMNS: tl.constexpr,
    FOUND: tl.constexpr,
    KEPT_STEPS: tl.constexpr,
    EARLY: tl.constexpr,
):
    row, number = tl.program_id(0), tl.arange(0, FOUND)
    at = ((number // parts * rows + row) * parts + number % parts) * COLUMNS
    there = number < count
    if KEPT_STEPS > 0:
        state_row, place = tl.load(row_of + row), tl.load(step) % KEPT_STEPS
    if EARLY:
        tl.debug_barrier()  # ptxas would read these after the wait
        gdc_wait()
    best = tl.load(found + at, mask=there, other=0).to(tl.float64, bitcast=True)
    best = tl.where(there, best, float("-inf"))
    token = tl.load(found + at + 1, mask=there, other=0x7FFFFFFF)
    token = tl.min(tl.where(best == tl.max(best, 0), token, 0x7FFFFFFF), 0)
    tl.store(tokens + row, token)
    tl.store(completes + row, 1)
    if KEPT_STEPS > 0:
        _write(token, 1, last + state_row, outs + (place * room + row) * 2)


@triton.jit(do_not_specialize=["room"], do_not_specialize_on_alignment=["row_of", "step"])
def _keep(tokens, completes, row_of, last, step, outs, room, KEPT_STEPS: tl.constexpr):
    row = tl.program_id(0)
    place, complete = tl.load(step) % KEPT_STEPS, tl.load(completes + row)
    _write(tl.load(tokens + row), complete, last + tl.load(row_of + row), outs + (place * room + row) * 2)


@triton.jit
def _write(token, complete, last, out):
    """As sample.keep, one draw, to where these two point."""
    tl.store(last, token)
    tl.store(out, token)
    tl.store(out + 1, complete)


@triton.jit
def _log_times(tokens, temperatures, seeds, positions, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * columns + column
    token = tl.load(tokens + at, mask=column < columns, other=0).to(tl.uint64)
    log_time = _log_time(_stream(seeds + row, positions + row) + token)
    tl.store(out + at, tl.where(tl.load(temperatures + row) == 0, 0.0, log_time), mask=column < columns)


@triton.jit
def _stream(seed, position):
    """sample.stream of what two pointers show, [1] uint64: on a scalar the interpreter would warn of overflow."""
    one = tl.arange(0, 1)
    return _mix(_mix(tl.load(seed + one).to(tl.uint64)) + tl.load(position + one).to(tl.uint64))


@triton.jit
def _mix(x):
    """hash.mix of uint64."""
    x = x + STEP
    x = (x ^ (x >> 30)) * MULTIPLY_1
    x = (x ^ (x >> 27)) * MULTIPLY_2
    return x ^ (x >> 31)


@triton.jit
def _log_time(state):
    """sample.log_times: ln(-ln(1 - u)). The rounding error of 1 - u is divided out again (Kahan's log1p)."""
    u = ((_mix(state) >> SHIFT).to(tl.int64).to(tl.float32) + 0.5) * UNIFORM_UNIT
    u = tl.minimum(u, UNIFORM_MOST)
    rest = 1.0 - u
    lost = tl.where(rest == 1.0, 1.0, 1.0 - rest)
    return tl.log(tl.where(rest == 1.0, u, -tl.log(rest) * u / lost))

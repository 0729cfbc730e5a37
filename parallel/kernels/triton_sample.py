"""The draw of `sample` with its passes over the logits in one Triton kernel: see sample.sample for what is drawn.

One pass reads the logits once: temperature, noise, min_p's floor, the first to finish, and for top_p and top_k the
weight of all tokens. The bits are those of hash.mix, in registers. A row is shared out among programs, so that a single
sequence fills the GPU too; the result does not depend on how. It equals that of sample.race in fp32 except where two
tokens finish within a rounding error of each other.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hash as hashing
from . import sample as plain
from .sample import AllGather, Drawn, Draws, Wanted
from .triton_launch import constants

BLOCK = 1024  # tokens a program looks at together
WARPS = 4
PROGRAMS = 2048  # at most as many as this in all, and one a row at least: some waves over the GPU

STEP = tl.constexpr(hashing.STEP % 2**64)
MULTIPLY_1 = tl.constexpr(hashing.MULTIPLY_1 % 2**64)
MULTIPLY_2 = tl.constexpr(hashing.MULTIPLY_2 % 2**64)
SHIFT = tl.constexpr(64 - plain.EXPONENTIAL_BITS)
UNIFORM_UNIT = tl.constexpr(2.0**-plain.EXPONENTIAL_BITS)
UNIFORM_MOST = tl.constexpr(1.0 - 2.0**-24)
WEIGHT_UNIT = tl.constexpr(2.0**plain.WEIGHT_BITS)


def sample(logits_SV: Tensor, first_token: int, all_gather: AllGather, draws: Draws, wanted: Wanted) -> Drawn:
    """As sample.sample, for bf16, fp16 and fp32. Can be captured in a CUDA graph if all_gather can."""
    return plain.sample(logits_SV, first_token, all_gather, draws, wanted, FAST)


def sample_exact(logits_SV: Tensor, first_token: int, all_gather: AllGather, draws: Draws) -> Tensor:
    """As sample.sample_exact, and equal to `sample` here where that is complete."""
    return plain.sample_exact(logits_SV, first_token, all_gather, draws, FAST)


def race(logits_SV: Tensor, first_token: int, draws: Draws, floor_S: Tensor | None, top_S: Tensor | None) -> Tensor:
    """As sample.race. ValueError for fp64, which is raced in fp64 and not here."""
    if logits_SV.dtype == torch.float64 or logits_SV.stride(1) != 1:
        raise ValueError(f"logits of {logits_SV.dtype} with strides {logits_SV.stride()}: rows of at most fp32 wanted")
    rows, vocab = logits_SV.shape
    blocks = -(-vocab // (max(1, PROGRAMS // rows) * BLOCK))  # of one program
    parts = -(-vocab // (blocks * BLOCK))
    device = logits_SV.device
    best_SP = torch.empty((rows, parts), dtype=torch.float32, device=device)
    token_SP = torch.empty((rows, parts), dtype=torch.int64, device=device)
    total_SP = torch.empty((rows, parts) if top_S is not None else (0, 0), dtype=torch.int64, device=device)
    _race[(rows, parts)](
        logits_SV,
        logits_SV.stride(0),
        draws.temperature_S,
        draws.seed_S,
        draws.position_S,
        floor_S if floor_S is not None else best_SP,
        top_S if top_S is not None else best_SP,
        best_SP,
        token_SP,
        total_SP,
        vocab,
        first_token,
        blocks,
        **_launch(HAS_FLOOR=floor_S is not None, HAS_TOP=top_S is not None),
    )
    found_SX = torch.empty((rows, 2 if top_S is None else 3), dtype=torch.int64, device=device)
    _first[(rows,)](
        best_SP,
        token_SP,
        total_SP,
        found_SX,
        parts,
        **constants(PARTS=triton.next_power_of_2(parts), HAS_TOP=top_S is not None, num_warps=WARPS),
    )
    return found_SX


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


FAST = plain.Local(race, log_times)


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
    bests,
    tokens,
    totals,
    vocab,
    first_token,
    blocks,
    HAS_FLOOR: tl.constexpr,
    HAS_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    temperature = tl.load(temperatures + row)
    is_cold = temperature == 0
    divisor = tl.where(is_cold, 1.0, temperature)
    stream = _stream(seeds + row, positions + row) + first_token.to(tl.uint64)
    floor = tl.load(floors + row) if HAS_FLOOR else 0.0
    top = tl.load(tops + row) if HAS_TOP else 0.0
    start = part * (blocks * BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = start + lane
    total = tl.zeros((BLOCK,), tl.int64)
    for block in range(0, blocks):
        column = start + block * BLOCK + lane
        here = column < vocab
        x = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=here, other=float("-inf")).to(tl.float32)
        x = tl.div_rn(x, tl.full((BLOCK,), 1.0, tl.float32) * divisor)
        finish = x
        if not is_cold:
            finish = x - _log_time(stream + column.to(tl.uint64))
        if HAS_TOP:
            total += (tl.exp(x - top) * WEIGHT_UNIT).to(tl.int64)
        if HAS_FLOOR:
            finish = tl.where(x < floor, float("-inf"), finish)
        is_better = finish > best  # an equal one of a higher id is not
        best = tl.where(is_better, finish, best)
        at = tl.where(is_better, column, at)
    first = tl.max(best, 0)
    out = row * tl.num_programs(1) + part
    tl.store(bests + out, first)
    tl.store(tokens + out, tl.min(tl.where(best == first, at, 0x7FFFFFFF), 0).to(tl.int64) + first_token)
    if HAS_TOP:
        tl.store(totals + out, tl.sum(total, 0))


@triton.jit
def _first(bests, tokens, totals, found, parts, PARTS: tl.constexpr, HAS_TOP: tl.constexpr):
    """What `race` returns of one row, from its parts; of equals the lowest id."""
    row = tl.program_id(0)
    at = row * parts + tl.arange(0, PARTS)
    there = tl.arange(0, PARTS) < parts
    best = tl.load(bests + at, mask=there, other=float("-inf"))
    token = tl.load(tokens + at, mask=there, other=0x7FFFFFFF)
    first = tl.max(best, 0)
    found += row * (3 if HAS_TOP else 2)
    tl.store(found, first.to(tl.float64).to(tl.int64, bitcast=True))
    tl.store(found + 1, tl.min(tl.where(best == first, token, 0x7FFFFFFF), 0))
    if HAS_TOP:
        tl.store(found + 2, tl.sum(tl.load(totals + at, mask=there, other=0), 0))


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

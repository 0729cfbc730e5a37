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

from . import sample as plain
from .hash import MULTIPLY_1, MULTIPLY_2, STEP
from .sample import EXPONENTIAL_BITS, WEIGHT_BITS, AllGather, Drawn, Draws, Raced, Wanted

BLOCK = 1024  # tokens a program looks at together
WARPS = 4
PROGRAMS = 2048  # at most as many as this in all, and one a row at least: some waves over the GPU


def sample(logits_SV: Tensor, first_token: int, all_gather: AllGather, draws: Draws, wanted: Wanted) -> Drawn:
    """As sample.sample, for bf16, fp16 and fp32. Can be captured in a CUDA graph if all_gather can."""
    return plain.sample(logits_SV, first_token, all_gather, draws, wanted, race)


def sample_exact(logits_SV: Tensor, first_token: int, all_gather: AllGather, draws: Draws) -> Tensor:
    """As sample.sample_exact, and equal to `sample` here where that is complete."""
    return plain.sample_exact(logits_SV, first_token, all_gather, draws, race)


def race(logits_SV: Tensor, first_token: int, draws: Draws, floor_S: Tensor | None, top_S: Tensor | None) -> Raced:
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
    constants: dict[str, Any] = {
        "HAS_FLOOR": floor_S is not None,
        "HAS_TOP": top_S is not None,
        "STEP": STEP % 2**64,
        "MULTIPLY_1": MULTIPLY_1 % 2**64,
        "MULTIPLY_2": MULTIPLY_2 % 2**64,
        "SHIFT": 64 - EXPONENTIAL_BITS,
        "UNIFORM_UNIT": 2.0**-EXPONENTIAL_BITS,
        "UNIT": 2.0**WEIGHT_BITS,
        "BLOCK": BLOCK,
        "num_warps": WARPS,
    }
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
        **constants,
    )
    best_S, part_S = best_SP.max(-1)  # the first of equals: the lowest ids
    token_S = token_SP.gather(1, part_S[:, None])[:, 0]
    return Raced(best_S, token_S, total_SP.sum(-1) if top_S is not None else None)


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
    STEP: tl.constexpr,
    MULTIPLY_1: tl.constexpr,
    MULTIPLY_2: tl.constexpr,
    SHIFT: tl.constexpr,
    UNIFORM_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    temperature = tl.load(temperatures + row)
    is_cold = temperature == 0
    divisor = tl.where(is_cold, 1.0, temperature)
    # a block of one, since arithmetic on a scalar warns of overflow in the interpreter
    one = tl.arange(0, 1)
    seed = tl.load(seeds + row + one).to(tl.uint64)
    stream = _mix(seed, STEP, MULTIPLY_1, MULTIPLY_2) + tl.load(positions + row + one).to(tl.uint64)
    stream = _mix(stream, STEP, MULTIPLY_1, MULTIPLY_2) + first_token.to(tl.uint64)
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
            bits = _mix(stream + column.to(tl.uint64), STEP, MULTIPLY_1, MULTIPLY_2) >> SHIFT
            finish = x - tl.log(_exponential(bits.to(tl.int64), UNIFORM_UNIT))
        if HAS_TOP:
            total += (tl.exp(x - top) * UNIT).to(tl.int64)
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
def _mix(x, STEP: tl.constexpr, MULTIPLY_1: tl.constexpr, MULTIPLY_2: tl.constexpr):
    """hash.mix of uint64."""
    x = x + STEP
    x = (x ^ (x >> 30)) * MULTIPLY_1
    x = (x ^ (x >> 27)) * MULTIPLY_2
    return x ^ (x >> 31)


@triton.jit
def _exponential(bits, UNIFORM_UNIT: tl.constexpr):
    """sample.exponential_times: -ln(1 - u). The rounding error of 1 - u is divided out again (Kahan's log1p)."""
    u = (bits.to(tl.float32) + 0.5) * UNIFORM_UNIT
    u = tl.minimum(u, 1.0 - 0.5**24)
    rest = 1.0 - u
    lost = tl.where(rest == 1.0, 1.0, 1.0 - rest)
    return tl.where(rest == 1.0, u, -tl.log(rest) * u / lost)

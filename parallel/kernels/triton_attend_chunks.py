"""Attention of chunks: many tokens of a sequence over its pages, in Triton, block by block with a running softmax.

FlashAttention-2 (https://arxiv.org/abs/2307.08691), algorithm 1. The rows of a program's tile are (token, query head)
pairs of one KV head, token after token, so that a key that is read serves all its query heads. The sink is where the
running softmax starts: a key that every row has seen, with no value. Nothing about the launch depends on what is on the
device but how many tiles there may be: those that are none leave at once, and so do splits of few keys. Knows nothing
of decodes.
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .batch import TILE_TOKENS, Batch, PageView
from .triton_attend_merge import LOWEST, merge, parts, store_part
from .triton_launch import capped, constants
from .triton_pages import as_operand, as_stored, entry, operand, stored_factor


@dataclass(frozen=True)
class Tuning:
    """Constants that a benchmark found (tests/benchmarks/kernels_attention.py)."""

    rows: int  # (token, query head) pairs of a program
    block_tokens: int  # keys that it handles at a time
    warps: int
    stages: int  # blocks of keys under way at a time
    programs: int  # wanted in all: where full tiles alone do not make as many, the keys are split, too
    least_keys: int  # of a split
    registers: int | None = None  # the most of a lane: fewer, and more programs are there at a time


FULL = Tuning(rows=128, block_tokens=64, warps=8, stages=5, programs=264, least_keys=1024, registers=128)
WINDOW = Tuning(rows=64, block_tokens=64, warps=4, stages=3, programs=1, least_keys=1024)


def attend_chunks(
    q_TND: Tensor, kv_PCSKD: Tensor, sinks_N: Tensor, batch: Batch, pages: PageView, out_TND: Tensor, tuning: Tuning
) -> None:
    """Attention of the tokens of batch.chunks, into out_TND. Arguments as in attention.attend."""
    tokens, heads, head_dim = q_TND.shape
    kv_PCSKD = as_stored(kv_PCSKD)
    page_tokens, kv_heads = kv_PCSKD.shape[2:4]
    group = heads // kv_heads
    group_rows = 1 << (group - 1).bit_length()  # a power of two
    rows = min(max(tuning.rows, group_rows), TILE_TOKENS * group_rows)
    slices = TILE_TOKENS * group_rows // rows
    programs = -(-tokens // TILE_TOKENS) * slices * kv_heads
    most_keys = pages.table_RP.shape[1] * page_tokens if pages.window_tokens is None else pages.window_tokens
    splits = max(1, min(tuning.programs // programs, most_keys // tuning.least_keys))
    mixed_TNSD, stats_TNS2 = parts(out_TND, splits)
    factor = stored_factor(kv_PCSKD)
    _attend_tiles[(len(batch.tiles_X4) * slices, kv_heads, splits)](
        q_TND,
        kv_PCSKD,
        sinks_N,
        pages.table_RP,
        batch.tiles_X4,
        out_TND,
        mixed_TNSD,
        stats_TNS2,
        pages.table_RP.shape[1],
        tuning.least_keys,
        head_dim**-0.5 * factor * math.log2(math.e),
        factor,
        **constants(
            KV_HEADS=kv_heads,
            GROUP=group,
            GROUP_ROWS=group_rows,
            HEAD_DIM=head_dim,
            PAGE_TOKENS=page_tokens,
            WINDOW=pages.window_tokens or 0,
            ROWS=rows,
            SLICES=slices,
            BLOCK=tuning.block_tokens,
            SPLIT=splits > 1,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
            **capped(q_TND, tuning.registers),
        ),
    )
    if splits > 1:
        merge(mixed_TNSD, stats_TNS2, out_TND, batch.decodes_1, factor)


@triton.jit(
    do_not_specialize=["width", "least_keys", "scale", "factor"],
    do_not_specialize_on_alignment=["table", "tiles"],
)
def _attend_tiles(
    q,
    kv,
    sinks,
    table,
    tiles,
    out,
    mixed,
    stats,
    width,
    least_keys,
    scale,
    factor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP_ROWS
    index = tl.num_programs(0) - 1 - tl.program_id(0)  # a chunk's last tiles see most: they start first
    kv_head, split, splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    tile, skipped = index // SLICES, index % SLICES * TOKENS
    first = tl.load(tiles + tile * 4) + skipped
    end = tl.load(tiles + tile * 4 + 1)
    if first >= end:
        return
    table += tl.load(tiles + tile * 4 + 2).to(tl.int64) * width
    low = tl.load(tiles + tile * 4 + 3) + skipped  # position of the first query
    high = low + tl.minimum(end - first, TOKENS)  # and the end of the last

    dim = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, ROWS)
    token, head = row // GROUP_ROWS, kv_head * GROUP + row % GROUP_ROWS
    is_row = (row % GROUP_ROWS < GROUP) & (first + token < end)
    at = (first + token).to(tl.int64) * (KV_HEADS * GROUP) + head
    query = tl.load(q + at[:, None] * HEAD_DIM + dim[None, :], mask=is_row[:, None], other=0.0)
    query = as_operand(query, kv.dtype.element_ty)

    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    if split == 0:
        top = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
        total += 1.0
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(low - WINDOW + 1, 0)
    share = tl.cdiv(tl.maximum(tl.cdiv(high - begin, splits), least_keys), BLOCK) * BLOCK
    begin += split * share
    high = tl.minimum(begin + share, high)
    if WINDOW == 0:
        whole = tl.minimum((low + 1) // BLOCK * BLOCK, high)  # up to here every row sees every key
        top, total, acc = _visit(
            query, kv, table, kv_head, top, total, acc, low + token, begin, whole, scale,
            False, KV_HEADS, HEAD_DIM, PAGE_TOKENS, WINDOW, BLOCK,
        )  # fmt: skip
        begin = tl.maximum(begin, whole)
    top, total, acc = _visit(
        query, kv, table, kv_head, top, total, acc, low + token, begin, high, scale,
        True, KV_HEADS, HEAD_DIM, PAGE_TOKENS, WINDOW, BLOCK,
    )  # fmt: skip
    if SPLIT:
        store_part(mixed, stats, at, split, splits, top, total, acc, is_row, HEAD_DIM)
    else:
        result = (acc * (factor / total)[:, None]).to(out.dtype.element_ty)
        tl.store(out + at[:, None] * HEAD_DIM + dim[None, :], result, mask=is_row[:, None])


@triton.jit
def _visit(
    query,
    kv,
    table,
    kv_head,
    top,
    total,
    acc,
    query_position,
    begin,
    end,
    scale,
    MASKED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The running softmax (maximum and scores in units of log 2) after keys begin to end."""
    dim = tl.arange(0, HEAD_DIM)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        if MASKED:
            page = tl.load(table + position // PAGE_TOKENS, mask=position < end, other=0)
        else:
            page = tl.load(table + position // PAGE_TOKENS)
        where = entry(page, position % PAGE_TOKENS, kv_head, KV_HEADS, HEAD_DIM, PAGE_TOKENS)
        where = where[:, None] + dim[None, :]
        if MASKED:
            key = tl.load(kv + where, mask=(position < end)[:, None], other=0)
            value = tl.load(kv + where + PAGE_TOKENS * KV_HEADS * HEAD_DIM, mask=(position < end)[:, None], other=0)
        else:
            key = tl.load(kv + where)
            value = tl.load(kv + where + PAGE_TOKENS * KV_HEADS * HEAD_DIM)
        scores = tl.dot(query, tl.trans(operand(key, query.dtype)), input_precision="ieee")
        if MASKED:
            seen = position[None, :] <= query_position[:, None]
            if WINDOW > 0:
                seen &= position[None, :] > query_position[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(query.dtype), operand(value, query.dtype), acc * fade[:, None], input_precision="ieee")
        top = higher
    return top, total, acc

"""Attention of decodes: one token of each sequence over its pages, in Triton.

A sequence's keys are split over programs, each with all the query heads of one KV head; a second kernel joins what they
found. Nothing about the launch depends on what is on the device: each sequence shares its own length out over the
splits, and those that get nothing leave at once. In a step that has chunks too, how many decodes there are is on the
device as well, and programs enough for any number find out what they are for.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .batch import Batch, PageView
from .triton_attend_merge import LOWEST, parts, store_part, with_parts
from .triton_launch import constants, early
from .triton_pages import as_operand, as_stored, entry, operand, stored_factor

LEAST_ROWS = 16  # of a tensor core's tile
JOIN_WARPS = 4


@dataclass(frozen=True)
class Tuning:
    """Constants that a benchmark found (tests/benchmarks/kernels_attention.py)."""

    block_tokens: int  # keys that a program handles at a time
    programs: int  # how many there may be, those with nothing to do among them; a longer sequence takes more of them
    most_splits: int
    share_per_program: int  # a split has at least this many keys for each (sequence, KV head): short ones are not split
    warps: int
    stages: int  # blocks of keys under way at a time, once for the page numbers and once for the pages
    together: int  # splits that are read at a time where they are joined


FULL = Tuning(block_tokens=64, programs=4096, most_splits=64, share_per_program=2, warps=2, stages=3, together=32)
WINDOW = Tuning(block_tokens=128, programs=1, most_splits=1, share_per_program=1, warps=4, stages=1, together=1)


def attend_decodes(
    q_TND: Tensor, kv_PCSKD: Tensor, sinks_N: Tensor, batch: Batch, pages: PageView, out_TND: Tensor, tuning: Tuning
) -> None:
    """Attention of the first batch.decodes tokens, or decodes_1 of them, into out_TND. Arguments as in
    attention.attend."""
    decodes, heads, head_dim = batch.decodes, q_TND.shape[1], q_TND.shape[2]
    kv_PCSKD = as_stored(kv_PCSKD)
    page_tokens, kv_heads = kv_PCSKD.shape[2:4]
    group = heads // kv_heads
    width = pages.table_RP.shape[1]
    most_keys = width * page_tokens if pages.window_tokens is None else pages.window_tokens
    counted = len(batch.tiles_X4) > 0
    most_splits = min(tuning.most_splits, -(-most_keys // tuning.block_tokens))
    splits = min(most_splits, -(-tuning.programs // (decodes * kv_heads)))
    grid = decodes, kv_heads, splits
    if counted:  # `_shares` of however many: most_splits each, or no more than this together
        places = min(decodes * most_splits, -(-tuning.programs // kv_heads) + decodes)
        grid, splits = (places, kv_heads), -(-places // decodes)
    shares = tuning.programs, most_splits, tuning.share_per_program
    least_keys = tuning.share_per_program * decodes * kv_heads
    factor = stored_factor(kv_PCSKD)
    mixed_TNSD, stats_TNS2 = parts(out_TND[:decodes], splits)
    _decode[grid](
        q_TND,
        kv_PCSKD,
        sinks_N,
        pages.table_RP,
        batch.rows_T,
        batch.positions_T,
        out_TND,
        mixed_TNSD,
        stats_TNS2,
        batch.decodes_1,
        *shares,
        width,
        least_keys,
        head_dim**-0.5 * factor * math.log2(math.e),
        factor,
        **constants(
            KV_HEADS=kv_heads,
            GROUP=group,
            ROWS=max(LEAST_ROWS, triton.next_power_of_2(group)),
            HEAD_DIM=head_dim,
            PAGE_TOKENS=page_tokens,
            WINDOW=pages.window_tokens or 0,
            BLOCK=tuning.block_tokens,
            SPLIT=splits > 1,
            COUNTED=counted,
            EARLY=early(q_TND) and not counted,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
        ),
    )
    if splits > 1:
        _join[(decodes, heads)](
            mixed_TNSD,
            stats_TNS2,
            batch.positions_T,
            out_TND,
            batch.decodes_1,
            *shares,
            splits,
            least_keys,
            factor,
            **constants(
                KV_HEADS=kv_heads,
                HEAD_DIM=head_dim,
                WINDOW=pages.window_tokens or 0,
                BLOCK=tuning.block_tokens,
                TOGETHER=tuning.together,
                COUNTED=counted,
                EARLY=early(q_TND) and not counted,
                num_warps=JOIN_WARPS,
            ),
        )


@triton.jit
def _places(table, position, seen, kv_head, KV_HEADS, HEAD_DIM, PAGE_TOKENS):
    """Where the keys of these positions lie, [BLOCK, D]."""
    page = tl.load(table + position // PAGE_TOKENS, mask=seen, other=0)
    at = entry(page, position % PAGE_TOKENS, kv_head, KV_HEADS, HEAD_DIM, PAGE_TOKENS)
    return at[:, None] + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def _attended(query, key, value, seen, scale, top, total, acc):
    """The running softmax after these keys."""
    scores = tl.dot(query, tl.trans(operand(key, query.dtype)), input_precision="ieee") * scale
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(query.dtype), operand(value, query.dtype), acc * fade[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _span(length, splits, least_keys, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """(the first key that is seen, how many of them a split has)."""
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0)
    return begin, tl.cdiv(tl.maximum(tl.cdiv(length - begin, splits), least_keys), BLOCK) * BLOCK


@triton.jit
def _shares(decodes, programs, most_splits, share_per_program, KV_HEADS: tl.constexpr):
    """(splits of each of so many sequences, the least keys of one): as `attend_decodes` works them out."""
    return tl.minimum(tl.cdiv(programs, decodes * KV_HEADS), most_splits), share_per_program * decodes * KV_HEADS


@triton.jit(
    do_not_specialize=["programs", "most_splits", "share_per_program", "splits", "least_keys", "factor"],
    do_not_specialize_on_alignment=["positions", "stats", "count"],
)
def _join(
    mixed,
    stats,
    positions,
    out,
    count,
    programs,
    most_splits,
    share_per_program,
    splits,
    least_keys,
    factor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A row of out from its parts, all loads of TOGETHER of them in flight together."""
    if EARLY:
        gdc_launch_dependents()
    token = tl.program_id(0)
    if COUNTED:
        decodes = tl.load(count)
        if token >= decodes:
            return
        splits, least_keys = _shares(decodes, programs, most_splits, share_per_program, KV_HEADS)
    length = tl.load(positions + token).to(tl.int32) + 1
    begin, share = _span(length, splits, least_keys, WINDOW, BLOCK)
    live = tl.cdiv(length - begin, share)
    row = token.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dim = tl.arange(0, HEAD_DIM)
    top = tl.full([], LOWEST, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([HEAD_DIM], tl.float32)
    if EARLY:
        gdc_wait()
    for first in range(0, live, TOGETHER):
        split = first + tl.arange(0, TOGETHER)
        at = row * splits + split
        tops = tl.load(stats + at * 2, mask=split < live, other=LOWEST)
        totals = tl.load(stats + at * 2 + 1, mask=split < live, other=0.0)
        part = tl.load(mixed + at[:, None] * HEAD_DIM + dim[None, :], mask=(split < live)[:, None], other=0.0)
        top, total, acc = with_parts(tops, totals, part, top, total, acc)
    tl.store(out + row * HEAD_DIM + dim, (acc * (factor / total)).to(out.dtype.element_ty))


@triton.jit(
    do_not_specialize=["programs", "most_splits", "share_per_program", "width", "least_keys", "scale", "factor"],
    do_not_specialize_on_alignment=["table", "rows", "positions", "count"],
)
def _decode(
    q,
    kv,
    sinks,
    table,
    rows,
    positions,
    out,
    mixed,
    stats,
    count,
    programs,
    most_splits,
    share_per_program,
    width,
    least_keys,
    scale,
    factor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """COUNTED: not EARLY, as of none all programs would leave before they have waited."""
    VALUES: tl.constexpr = PAGE_TOKENS * KV_HEADS * HEAD_DIM  # from a key to its value
    if EARLY:
        gdc_launch_dependents()
    token, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    if COUNTED:
        decodes = tl.load(count)
        if decodes == 0:
            return
        splits, least_keys = _shares(decodes, programs, most_splits, share_per_program, KV_HEADS)
        token, split = tl.program_id(0) % decodes, tl.program_id(0) // decodes
        if split >= splits:
            return
    length = tl.load(positions + token).to(tl.int32) + 1
    begin, share = _span(length, splits, least_keys, WINDOW, BLOCK)
    first = begin + split * share
    if first >= length:
        return
    last = tl.minimum(first + share, length)
    table += tl.load(rows + token) * width
    dim = tl.arange(0, HEAD_DIM)
    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    is_head = row < GROUP
    sink = tl.load(sinks + head, mask=is_head, other=0.0).to(tl.float32)
    position = first + tl.arange(0, BLOCK)
    place = _places(table, position, position < last, kv_head, KV_HEADS, HEAD_DIM, PAGE_TOKENS)
    # all keys but the newest are older than the kernel before, which has written that one
    old = (position < tl.minimum(last, length - 1))[:, None]
    key = tl.load(kv + place, mask=old, other=0)
    value = tl.load(kv + place + VALUES, mask=old, other=0)
    if EARLY:
        tl.debug_barrier()  # ptxas would read the keys after the wait
        gdc_wait()
    at = token * (KV_HEADS * GROUP) + head
    query = tl.load(q + at[:, None] * HEAD_DIM + dim[None, :], mask=is_head[:, None], other=0.0)
    query = as_operand(query, kv.dtype.element_ty)
    new = ((position == length - 1) & (position < last))[:, None]
    key = tl.load(kv + place, mask=new, other=key)
    value = tl.load(kv + place + VALUES, mask=new, other=value)

    # scores and their maximum are in units of log 2; the sink is a key that the first split has seen
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    if split == 0:
        top = sink * 1.4426950408889634
        total += 1.0
    top, total, acc = _attended(query, key, value, position < last, scale, top, total, acc)
    if WINDOW == 0 or WINDOW > BLOCK:
        for start in range(first + BLOCK, last, BLOCK):
            position = start + tl.arange(0, BLOCK)
            seen = position < last
            place = _places(table, position, seen, kv_head, KV_HEADS, HEAD_DIM, PAGE_TOKENS)
            key = tl.load(kv + place, mask=seen[:, None], other=0)
            value = tl.load(kv + place + VALUES, mask=seen[:, None], other=0)
            top, total, acc = _attended(query, key, value, seen, scale, top, total, acc)
    if SPLIT:
        store_part(mixed, stats, at, split, splits, top, total, acc, is_head, HEAD_DIM)
    else:
        result = (acc * (factor / total)[:, None]).to(out.dtype.element_ty)
        tl.store(out + at[:, None] * HEAD_DIM + dim[None, :], result, mask=is_head[:, None])

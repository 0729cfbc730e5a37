"""What comes before the first layer, a Triton kernel for each function of `begin`: some thirty of torch's in a step
of one token take as long as a layer."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_launch import constants, early
from .triton_pages import operand
from .triton_weight_only import stored
from .weight_only import Weight

TOKENS = 128  # of a program of `locate`
WORDS = 128  # of a program of `upload`: one a lane, so that a warp reads a whole line of host memory at a time


def upload(words_W: Tensor, to_W: Tensor) -> None:
    """As begin.upload. The kernel reads the pinned memory of the host itself, over the link."""
    count = len(words_W)
    _upload[(-(-count // WORDS),)](words_W, to_W, count, **constants(WORDS=WORDS, num_warps=4))


def locate(
    row_T: Tensor, token_T: Tensor, position_T: Tensor, last_R: Tensor, tables_KRP: Tensor, page_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As begin.locate."""
    tokens = len(row_T)
    kinds, rows, width = tables_KRP.shape
    out_XT = torch.empty((3 + kinds, tokens), dtype=torch.int64, device=row_T.device)
    _locate[(-(-tokens // TOKENS),)](
        row_T,
        token_T,
        position_T,
        last_R,
        tables_KRP,
        out_XT,
        tokens,
        rows * width,
        width,
        **constants(KINDS=kinds, PAGE_TOKENS=page_tokens, TOKENS=TOKENS, EARLY=early(row_T), num_warps=4),
    )
    return out_XT[0], out_XT[1], out_XT[2], out_XT[3:]


def embed(
    tokens_T: Tensor,
    positions_T: Tensor,
    embed_VH: Weight,
    first_token: int,
    frequencies: Tensor,
    concentration: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """As begin.embed."""
    tokens, half = len(tokens_T), len(frequencies)
    vocab, hidden = embed_VH.shape
    values, scales, factor = stored(embed_VH)
    embedded_TH = torch.empty((tokens, hidden), dtype=embed_VH.dtype, device=embed_VH.device)
    cos_TD = torch.empty((tokens, half), dtype=torch.float32, device=embed_VH.device)
    sin_TD = torch.empty_like(cos_TD)
    _embed[(tokens,)](
        tokens_T,
        positions_T,
        values,
        scales,
        frequencies,
        embedded_TH,
        cos_TD,
        sin_TD,
        first_token,
        vocab,
        concentration,
        **constants(
            HIDDEN=hidden,
            BLOCK=triton.next_power_of_2(hidden),
            HALF=half,
            HALF_BLOCK=triton.next_power_of_2(half),
            FACTOR=factor,
            EARLY=early(tokens_T),
            num_warps=4,
        ),
    )
    return embedded_TH, (cos_TD, sin_TD)


@triton.jit(do_not_specialize=["count"])
def _upload(words, to, count, WORDS: tl.constexpr):
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    tl.store(to + at, tl.load(words + at, mask=at < count, other=0), mask=at < count)


@triton.jit(
    do_not_specialize=["tokens", "stride", "width"], do_not_specialize_on_alignment=["row", "token", "position"]
)
def _locate(
    row,
    token,
    position,
    last,
    tables,
    out,
    tokens,
    stride,
    width,
    KINDS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = at < tokens
    row_T = tl.load(row + at, mask=there, other=0).to(tl.int64)
    token_T = tl.load(token + at, mask=there, other=0).to(tl.int64)
    position_T = tl.load(position + at, mask=there, other=0).to(tl.int64)
    token_T = tl.where(token_T < 0, tl.load(last + row_T, mask=there & (token_T < 0), other=0), token_T)
    pages = ()
    for kind in tl.static_range(KINDS):  # all that is read before what is written, which would have to wait for it
        entry = tables + kind * stride + row_T * width + position_T // PAGE_TOKENS
        pages += (tl.load(entry, mask=there, other=0).to(tl.int64),)
    tl.store(out + at, row_T, mask=there)
    tl.store(out + tokens + at, token_T, mask=there)
    tl.store(out + 2 * tokens + at, position_T, mask=there)
    for kind in tl.static_range(KINDS):
        slot = pages[kind] * PAGE_TOKENS + position_T % PAGE_TOKENS
        tl.store(out + (3 + kind) * tokens + at, slot, mask=there)


@triton.jit(do_not_specialize=["first", "vocab", "concentration"])
def _embed(
    tokens,
    positions,
    embedding,
    scale,
    frequencies,
    embedded,
    cos,
    sin,
    first,
    vocab,
    concentration,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    FACTOR: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, HALF_BLOCK)
    frequency = tl.load(frequencies + dim, mask=dim < HALF, other=0.0)
    if EARLY:
        gdc_wait()
    local = tl.load(tokens + token) - first
    position = tl.load(positions + token).to(tl.float32)
    here = (local >= 0) & (local < vocab)
    column = tl.arange(0, BLOCK)
    value = tl.load(embedding + local * HIDDEN + column, mask=here & (column < HIDDEN), other=0)
    if FACTOR > 0:
        value = operand(value, tl.float32) * (tl.load(scale + local, mask=here, other=0.0).to(tl.float32) * FACTOR)
    tl.store(embedded + token * HIDDEN + column, value.to(embedded.dtype.element_ty), mask=column < HIDDEN)
    angle = position * frequency
    tl.store(cos + token * HALF + dim, tl.cos(angle) * concentration, mask=dim < HALF)
    tl.store(sin + token * HALF + dim, tl.sin(angle) * concentration, mask=dim < HALF)

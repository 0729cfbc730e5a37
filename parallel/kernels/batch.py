"""One step's work as the operations see it: which tokens, of which sequences, in which pages.

Each sequence has a row in the page tables for as long as it runs. A step holds decodes (one token of a sequence each)
and then chunks (many tokens of a sequence). Fast kernels read all that concerns either on the device alone, so that a
CUDA graph holds whatever the sequences; for the plain ones the host has its numbers too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..planning.spec import LayerKind, Spec

TILE_TOKENS = 64  # queries of a chunk that are attended for together


@dataclass(frozen=True)
class PageView:
    """Where one kind of layer keeps its keys and values.

    table_RP: [rows, pages] int32; entry i of a sequence's row is the page of its positions i * page_tokens and on.
    Window layers have dropped the pages that no later token can see: those entries are never read. slots_T: page *
    page_tokens + offset of each token of the step, int64. window_tokens: how many tokens a query sees, itself included;
    None: all.
    """

    table_RP: Tensor
    slots_T: Tensor
    window_tokens: int | None


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of the step: the next ones of the sequence in `row`, which has `length` when it is done."""

    start: int
    stop: int
    row: int
    length: int


@dataclass(frozen=True)
class Batch:
    """T tokens of some sequences.

    tokens_T, positions_T, rows_T: int64, each token's id, place in its sequence and row in the page tables. The first
    `decodes` tokens are decodes; `chunks` are the others, in order. tiles_X4: int32 [X, 4], the chunks cut into pieces
    of at most TILE_TOKENS: first token and end in the step, row, position of the first token; zeros are none. wanted_S:
    tokens of the step whose logits are wanted, int64; S of them. None: all.

    decodes_1: how many decodes there are, int32, of a step that has tiles. In a CUDA graph of such steps the host knows
    no chunks, and `decodes` is the most that there can be.
    """

    tokens_T: Tensor
    positions_T: Tensor
    rows_T: Tensor
    decodes: int
    decodes_1: Tensor
    chunks: tuple[Chunk, ...]
    tiles_X4: Tensor
    pages: dict[LayerKind, PageView]
    wanted_S: Tensor | None


def tiles(chunks: tuple[Chunk, ...]) -> list[tuple[int, int, int, int]]:
    """The rows of Batch.tiles_X4."""
    return [
        (first, min(first + TILE_TOKENS, chunk.stop), chunk.row, chunk.length - (chunk.stop - first))
        for chunk in chunks
        for first in range(chunk.start, chunk.stop, TILE_TOKENS)
    ]


def most_tiles(tokens: int, chunks: int) -> int:
    """That so many tokens of so many chunks can make."""
    return tokens // TILE_TOKENS + chunks


def one_sequence(tokens_T: Tensor, spec: Spec, page_tokens: int) -> Batch:
    """A step that begins a sequence, in row 0, and wants the logits of all its tokens. Full layers have the first pages
    of the pool, window layers the next ones."""
    device, tokens = tokens_T.device, len(tokens_T)
    kinds: tuple[LayerKind, ...] = ("full", "window")
    pages = -(-tokens // page_tokens)
    positions_T = torch.arange(tokens, device=device)
    chunks = (Chunk(0, tokens, 0, tokens),)
    views: dict[LayerKind, PageView] = {
        kind: PageView(
            torch.arange(place * pages, (place + 1) * pages, dtype=torch.int32, device=device)[None],
            positions_T + place * pages * page_tokens,
            spec.window_tokens if kind == "window" else None,
        )
        for place, kind in enumerate(kinds)
    }
    return Batch(
        tokens_T=tokens_T,
        positions_T=positions_T,
        rows_T=torch.zeros_like(positions_T),
        decodes=0,
        decodes_1=torch.zeros(1, dtype=torch.int32, device=device),
        chunks=chunks,
        tiles_X4=torch.tensor(tiles(chunks), dtype=torch.int32, device=device),
        pages=views,
        wanted_S=positions_T,
    )

"""A record on the device: what each rank keeps there for every row, and the tensors that the forward pass and the draws
read.

Everything here is a view into one static buffer or follows from it on the device, so that a CUDA graph which was
captured for a size reads the next record from the same place. Knows no weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.batch import Batch, Chunk, PageView
from ..kernels.begin import known_tokens
from ..kernels.sample import Draws, Kept
from ..planning.spec import LayerKind, Spec
from .record import DECODES, KINDS, RING_STEPS, Head, Record, Sizes, places
from .request import MOST_BIASES


@dataclass(frozen=True)
class Rows:
    """State by row, scratch row included. R rows, P entries, V vocabulary rows of this rank.

    tables_KRP: page tables in the order of KINDS. last_R: the token drawn last. counts_RV: how often each token was fed
    as part of the answer, and whether as part of the prompt (`adjust`), of requests that want it. bias_*: padded with
    token -1.
    """

    tables_KRP: Tensor
    last_R: Tensor
    counts_RV: Tensor
    bias_tokens_RB: Tensor
    bias_values_RB: Tensor

    @staticmethod
    def empty(sizes: Sizes, vocab_here: int, device: torch.device) -> "Rows":
        rows = sizes.rows + 1
        tables = torch.zeros((len(KINDS), rows, sizes.row_pages), dtype=torch.int32, device=device)
        tables[:, sizes.rows] = sizes.scratch_page
        return Rows(
            tables,
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros((rows, vocab_here), dtype=torch.int16, device=device),
            torch.full((rows, MOST_BIASES), -1, dtype=torch.int64, device=device),
            torch.zeros((rows, MOST_BIASES), dtype=torch.float32, device=device),
        )


class Words:
    """The static buffer that records are copied to, and the host buffers they are copied from."""

    def __init__(self, sizes: Sizes, device: torch.device, upload: Callable[[Tensor, Tensor], None]) -> None:
        """upload: as begin.upload."""
        self._upload = upload
        self.device_W = torch.zeros(sizes.words, dtype=torch.int32, device=device)
        # The device reads pinned memory while the host goes on: the buffer must not be used again before that is done.
        pinned = device.type == "cuda"
        self._host = [torch.zeros(sizes.words, dtype=torch.int32, pin_memory=pinned) for _ in range(RING_STEPS)]

    def upload(self, record: Record) -> None:
        count = record.head.words
        host_W = self._host[record.head.number % len(self._host)]
        host_W[:count] = torch.frombuffer(record.words, dtype=torch.int32)
        self._upload(host_W[:count], self.device_W[:count])


def begin_rows(head: Head, words_W: Tensor, rows: Rows) -> None:
    """What the record changes in the rows' state before its tokens go through the model."""
    at = places(head)
    if head.changes:
        rows.tables_KRP.view(-1).index_copy_(0, words_W[at["entry"]].long(), words_W[at["page"]])
    if head.resets:
        rows.counts_RV.index_fill_(0, words_W[at["reset_row"]].long(), 0)
    if head.biases:
        row, place = words_W[at["bias_row"]].long(), words_W[at["bias_place"]].long()
        rows.bias_tokens_RB.index_fill_(0, row, -1)
        rows.bias_tokens_RB[row, place] = words_W[at["bias_token"]].long()
        rows.bias_values_RB[row, place] = words_W[at["bias_value"]].view(torch.float32)


def batch(
    head: Head,
    chunks: tuple[Chunk, ...],
    words_W: Tensor,
    rows: Rows,
    spec: Spec,
    page_tokens: int,
    locate: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
) -> Batch:
    """The step's tokens; those that are not known to the host are the ones drawn last. locate: as begin.locate."""
    at = places(head)
    words = (words_W[at[name]] for name in ("row", "token", "position"))
    rows_T, tokens_T, positions_T, slots_KT = locate(*words, rows.last_R, rows.tables_KRP, page_tokens)
    views: dict[LayerKind, PageView] = {
        kind: PageView(table_RP, slots_T, spec.window_tokens if kind == "window" else None)
        for kind, table_RP, slots_T in zip(KINDS, rows.tables_KRP, slots_KT, strict=True)
        if spec.layers_of(kind)
    }
    return Batch(
        tokens_T=tokens_T,
        positions_T=positions_T,
        rows_T=rows_T,
        decodes=min(head.decodes, len(rows.last_R)),  # where a graph is captured, all tokens might be decodes
        decodes_1=words_W[DECODES],
        chunks=chunks,
        tiles_X4=words_W[at["tile"]].view(-1, 4),
        pages=views,
        wanted_S=None if head.graph else wanted(head, words_W),  # a graph has all: they may be others next time
    )


def wanted(head: Head, words_W: Tensor) -> Tensor:
    """The tokens of the step that are drawn after, int64 [S]."""
    return words_W[places(head)["at"]].long()


def draws(head: Head, words_W: Tensor) -> Draws:
    """How each draw is made. Views of the record's words, so that nothing is computed here."""
    at = places(head)

    def floats(name: str) -> Tensor:
        return words_W[at[name]].view(torch.float32)

    return Draws(
        temperature_S=floats("temperature"),
        top_p_S=floats("top_p"),
        min_p_S=floats("min_p"),
        presence_S=floats("presence"),
        frequency_S=floats("frequency"),
        repetition_S=floats("repetition"),
        top_k_S=words_W[at["top_k"]],
        seed_S=words_W[at["seed"]].view(torch.int64),
        position_S=words_W[at["draw_position"]],
    )


def kept(head: Head, words_W: Tensor, rows: Rows, outs_NS2: Tensor) -> Kept:
    """Where the draws are written. The record begins with its head, and the head with the step's number."""
    return Kept(words_W[places(head)["draw_row"]], rows.last_R, words_W[:1], outs_NS2)


def fed(head: Head, words_W: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Row, id, and as part of what it counts (`record.ANSWER`, `PROMPT`, 0), of each token of the step."""
    at = places(head)
    rows_T = words_W[at["row"]].long()
    return rows_T, known_tokens(rows_T, words_W[at["token"]], rows.last_R), words_W[at["counted"]]


def biases(head: Head, words_W: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Token ids [S, B], -1 where there is none, and what is added to their logits."""
    at = places(head)
    row_S = words_W[at["draw_row"]].long()
    biased_S1 = words_W[at["biased"]][:, None] != 0
    return rows.bias_tokens_RB[row_S].where(biased_S1, -1), rows.bias_values_RB[row_S]


def allowed(head: Head, words_W: Tensor) -> Tensor | None:
    """int32 [S, words]: a bit a token; all bits for draws without a grammar. None: no draw has one."""
    if not head.masks:
        return None
    at = places(head)
    allowed_SW = torch.full((head.draws, head.mask_words), -1, dtype=torch.int32, device=words_W.device)
    masked = words_W[at["mask"]].view(head.masks, head.mask_words)
    return allowed_SW.index_copy_(0, words_W[at["masked_draw"]].long(), masked)

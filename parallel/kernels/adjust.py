"""What is done to logits before a draw: biases, penalties for tokens of the answer so far, a grammar's mask.

S rows of logits, V vocabulary rows of this rank, R sequences that the step may hold, B biases a row at most, W words of
32 tokens. Each rank treats its own tokens; nothing is exchanged. Knows nothing of requests or grammars.
"""

import torch
from torch import Tensor

from ..planning.memory import DRAW_ELEMENT_BYTES
from .precision import wide
from .sample import NEVER, Draws, tiles

WORD = 32  # tokens in a word of a mask
COUNT, MARK = 0x7FFF, -0x8000  # bits of a held count: how often, and whether it was marked


def adjust(
    logits_SV: Tensor,
    first_token: int,
    draws: Draws,
    counts_RV: Tensor | None = None,
    rows_S: Tensor | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    allowed_SW: Tensor | None = None,
    repeats: bool = False,
) -> Tensor:
    """Logits [S, V] to draw from, a new tensor: fp32, fp64 where they are fp64. No host sync.

    counts_RV, rows_S: from `count_tokens` and `mark_tokens`, and the row there of each row here. draws.presence is
    subtracted where the count is above 0, and draws.frequency times the count; before that, if repeats, a logit of a
    token that was counted or marked is divided by draws.repetition, or multiplied if it is below 0. bias: ids [S, B]
    int64, ended by -1, and values [S, B] to add; tokens of other ranks are passed over. allowed_SW: int32, over the
    whole vocabulary; bit i of word w lets token 32 w + i through. One token of a row at least must be let through.
    """
    precision, vocab = wide(logits_SV.dtype), logits_SV.shape[1]
    out_SV = logits_SV.to(precision, copy=True)
    token_V = torch.arange(first_token, first_token + vocab, device=logits_SV.device)
    if bias is not None:
        local_SB = bias[0] - first_token
        here_SB = (bias[0] >= 0) & (local_SB >= 0) & (local_SB < vocab)
        out_SV.scatter_add_(1, local_SB.masked_fill(~here_SB, 0), bias[1].to(precision).masked_fill(~here_SB, 0.0))
    for rows in tiles(len(logits_SV), vocab * DRAW_ELEMENT_BYTES[precision == torch.float64]):
        tile_SV = out_SV[rows]
        if counts_RV is not None:
            held_SV = counts_RV[rows if rows_S is None else rows_S[rows]]
            counts_SV = held_SV & COUNT
            if repeats:
                penalty_S1 = draws.repetition_S[rows][:, None].to(precision)
                factor_SV = torch.where(tile_SV > 0, 1 / penalty_S1, penalty_S1)
                tile_SV *= factor_SV.masked_fill_(held_SV == 0, 1.0)
            tile_SV -= (counts_SV > 0) * draws.presence_S[rows][:, None].to(precision)
            tile_SV -= counts_SV * draws.frequency_S[rows][:, None].to(precision)
        if allowed_SW is not None:
            bits_SV = allowed_SW[rows][:, token_V // WORD] >> (token_V % WORD).int()
            tile_SV.masked_fill_(bits_SV & 1 == 0, NEVER)
    return out_SV


def count_tokens(counts_RV: Tensor, first_token: int, rows_T: Tensor, tokens_T: Tensor, counted_T: Tensor) -> None:
    """Add one, in place, to counts_RV[row, token - first_token] for every counted token that is held here.

    rows_T, tokens_T: int64. counted_T: bool; which tokens of the step are of an answer, none longer than COUNT tokens.
    counts_RV: int16 or int32; contiguous. No host sync.
    """
    place_T, here_T = _places(counts_RV, first_token, rows_T, tokens_T, counted_T)
    counts_RV.view(-1).index_add_(0, place_T.masked_fill(~here_T, 0), here_T.to(counts_RV.dtype))


def mark_tokens(counts_RV: Tensor, first_token: int, rows_T: Tensor, tokens_T: Tensor, marked_T: Tensor) -> None:
    """Set counts_RV[row, token - first_token] to MARK, in place, for every marked token that is held here: those of a
    prompt, before any of its answer is counted.

    The last row of counts_RV is nobody's, and takes what is not to be marked. The rest as of `count_tokens`.
    """
    place_T, here_T = _places(counts_RV, first_token, rows_T, tokens_T, marked_T)
    counts_RV.view(-1).index_fill_(0, place_T.masked_fill(~here_T, counts_RV.numel() - 1), MARK)


def _places(
    held_RV: Tensor, first_token: int, rows_T: Tensor, tokens_T: Tensor, meant_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Where each token stands in held_RV as one flat row, and which of them are meant and held here."""
    vocab = held_RV.shape[1]
    local_T = tokens_T - first_token
    return rows_T * vocab + local_T, meant_T & (local_T >= 0) & (local_T < vocab)

"""What comes before the first layer of a step: its record on the device, where each token stands, its embedding, and
the turn of its position.

T tokens, R rows of the page tables, in the order of the kinds of layers (K). Knows no requests.
"""

import torch
from torch import Tensor

from .rope import rotation
from .weight_only import Narrow, Weight


def upload(words_W: Tensor, to_W: Tensor) -> None:
    """Copy a record's words to the device, from host memory that is pinned if the device is a GPU: the words must stay
    as they are until the step is over."""
    to_W.copy_(words_W, non_blocking=True)


def known_tokens(rows_T: Tensor, token_T: Tensor, last_R: Tensor) -> Tensor:
    """int64 ids: a token below 0 stands for the one that its row has drawn last."""
    return torch.where(token_T < 0, last_R[rows_T], token_T.long())


def locate(
    row_T: Tensor, token_T: Tensor, position_T: Tensor, last_R: Tensor, tables_KRP: Tensor, page_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows_T, known_tokens, positions_T, slots_KT), int64, from int32; a slot is page * page_tokens + offset."""
    rows_T, positions_T = row_T.long(), position_T.long()
    tokens_T = known_tokens(rows_T, token_T, last_R)
    pages_KT = tables_KRP[:, rows_T, positions_T // page_tokens].long()
    return rows_T, tokens_T, positions_T, pages_KT * page_tokens + positions_T % page_tokens


def embed(
    tokens_T: Tensor,
    positions_T: Tensor,
    embed_VH: Weight,
    first_token: int,
    frequencies: Tensor,
    concentration: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """([T, H], rope.rotation): rows of the tokens held here, zeros for others, so that their sum over ranks is the
    embedding."""
    local_T = tokens_T - first_token
    here_T = (local_T >= 0) & (local_T < len(embed_VH))
    local_T = local_T.where(here_T, 0)
    rows_TH = embed_VH.dense(local_T) if isinstance(embed_VH, Narrow) else embed_VH[local_T]
    return rows_TH * here_T[:, None], rotation(positions_T, frequencies, concentration)

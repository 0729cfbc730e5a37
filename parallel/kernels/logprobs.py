"""Log-probabilities of drawn tokens and of the most likely ones, under the model's own distribution.

S sequences, V vocabulary rows of this rank, R ranks, K tokens asked for. As in `sample`, ranks exchange few numbers,
sums are of whole numbers, and a row's result depends on neither the batch nor the cut.
"""

from math import log

import torch
from torch import Tensor

from ..planning.memory import DRAW_ELEMENT_BYTES
from .precision import wide
from .sample import NEVER, NO_TOKEN, WEIGHT_BITS, AllGather, tiles, weights


def logprobs(
    logits_SV: Tensor, first_token: int, all_gather: AllGather, tokens_S: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(of tokens_S [S] fp32, ids [S, K] int64 of the K = `most` most likely, theirs [S, K] fp32), likeliest first.

    Among equals the lowest ids come first. The same on every rank; no host sync. The whole vocabulary has K tokens at
    least. fp64 logits give fp64.
    """
    precision, vocab = wide(logits_SV.dtype), logits_SV.shape[1]
    local_S = tokens_S - first_token
    here_S = (local_S >= 0) & (local_S < vocab)
    of_token_S = logits_SV.gather(1, local_S.masked_fill(~here_S, 0)[:, None])[:, 0].to(precision)
    out_2SX = torch.zeros((2, len(logits_SV), most + 2), dtype=precision, device=logits_SV.device)
    out_2SX[0, :, :most] = NEVER
    out_2SX[0, :, most] = of_token_S.masked_fill(~here_S, NEVER)
    out_2SX[0, :, most + 1] = logits_SV.amax(-1)
    if most:
        top_SK, ids_SK = highest(logits_SV, min(most, vocab))
        out_2SX[0, :, : top_SK.shape[1]] = top_SK
        out_2SX[1, :, : top_SK.shape[1]] = ids_SK + first_token
    everyone_R2SX = all_gather(out_2SX)
    of_token_S, top_S = everyone_R2SX[:, 0, :, most:].amax(0).unbind(-1)

    totals = [
        weights(logits_SV[rows].to(precision), top_S[rows]).sum(-1)
        for rows in tiles(len(logits_SV), vocab * DRAW_ELEMENT_BYTES[precision == torch.float64])
    ]
    total_S = all_gather(torch.cat(totals)).sum(0)
    normalizer_S = top_S.double() + total_S.double().log() - WEIGHT_BITS * log(2)

    value_SN, id_SN = (everyone_R2SX[:, part, :, :most].transpose(0, 1).flatten(1) for part in (0, 1))
    value_SN, order_SN = value_SN.sort(dim=-1, descending=True, stable=True)  # equals by id: ranks hold ascending ids
    ids_SK = id_SN.gather(1, order_SN)[:, :most].long()
    return (
        (of_token_S.double() - normalizer_S).to(precision),
        ids_SK,
        (value_SN[:, :most].double() - normalizer_S[:, None]).to(precision),
    )


def highest(logits_SV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(logits, columns) [S, count] of the largest, in descending order; the lowest columns of equals, in order.

    topk leaves open which of equals it takes at its lower end, so those are looked up: the lowest columns that hold
    its last value.
    """
    value_SK, column_SK = logits_SV.topk(count, dim=-1)
    last_S1 = value_SK[:, -1:]
    column_SK = column_SK.masked_fill(value_SK <= last_S1, NO_TOKEN)
    column_V = torch.arange(logits_SV.shape[1], dtype=torch.int32, device=logits_SV.device)
    equal = [
        column_V.masked_fill(logits_SV[rows] != last_S1[rows], NO_TOKEN).topk(count, dim=-1, largest=False).values
        for rows in tiles(len(logits_SV), logits_SV.shape[1] * DRAW_ELEMENT_BYTES[0])
    ]
    column_SN = torch.cat((column_SK, torch.cat(equal).long()), dim=-1).sort(dim=-1).values
    value_SN = logits_SV.gather(1, column_SN.masked_fill(column_SN == NO_TOKEN, 0)).masked_fill(
        column_SN == NO_TOKEN, NEVER
    )
    order_SK = value_SN.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return value_SN.gather(1, order_SK), column_SN.gather(1, order_SK)

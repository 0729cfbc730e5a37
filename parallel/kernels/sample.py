"""Drawing the next token from logits whose vocabulary is cut over ranks, without gathering them.

The draw is a race: token i finishes at time E_i / p_i with E_i exponential, and the first one wins, which is exactly a
draw from p (the Gumbel-max trick in another dress). E_i is a pure function of (seed, position, i), so a draw depends
neither on the batch nor on the device nor on how the vocabulary is cut: each rank finds its own winner, and the winners
are compared. For top_p the ranks exchange their most likely tokens, and as many as the nucleus takes.

S sequences, V vocabulary rows of this rank, R ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .hash import mix

FIRST_CANDIDATES = 256  # of each rank, exchanged for top_p; four times as many each time they do not suffice

AllGather = Callable[[Tensor], Tensor]


def sample(
    logits_SV: Tensor,
    first_token: int,
    all_gather: AllGather,
    temperature_S: Tensor,
    top_p_S: Tensor,
    seed_S: Tensor,
    position_S: Tensor,
    any_top_p: bool,
) -> Tensor:
    """Token ids [S] int64, the same on every rank. Temperature 0 takes the largest logit, the lowest id among equals.

    first_token: id of this rank's first row. all_gather: x -> [R, ...]. temperature_S, top_p_S: fp32. seed_S,
    position_S: int64; position is where the drawn token will stand. any_top_p: whether some row has top_p < 1.
    """
    cold_S1 = (temperature_S == 0)[:, None]
    scaled_SV = logits_SV.double() / temperature_S.double()[:, None].masked_fill(cold_S1, 1.0)
    token_V = torch.arange(first_token, first_token + logits_SV.shape[1], device=logits_SV.device)
    race_SV = torch.where(cold_S1, scaled_SV, scaled_SV - exponential_times(seed_S, position_S, token_V).log())
    if any_top_p:
        race_SV = race_SV.masked_fill(~in_nucleus(scaled_SV, token_V, top_p_S, all_gather), float("-inf"))
    best_S, index_S = race_SV.max(-1)
    found_RS2 = all_gather(torch.stack((best_S, token_V[index_S].double()), dim=-1))
    winners_RS = found_RS2[..., 0] == found_RS2[..., 0].amax(0)
    return found_RS2[..., 1].masked_fill(~winners_RS, float("inf")).amin(0).long()


def in_nucleus(scaled_SV: Tensor, token_V: Tensor, top_p_S: Tensor, all_gather: AllGather) -> Tensor:
    """[S, V]: whether a token is in the smallest set of most likely tokens whose probability reaches top_p.

    Equally likely tokens enter by lowest id. Exact: a rank's candidates are complete above its last one, so the merged
    list is complete above the highest of these; where the nucleus goes deeper, more are exchanged.
    """
    total_S = all_gather(scaled_SV.logsumexp(-1)).logsumexp(0)
    sorted_SV, order_SV = scaled_SV.sort(dim=-1, descending=True, stable=True)  # stable: equals stay by id
    largest = int(all_gather(torch.tensor([len(token_V)], device=token_V.device)).max())
    count = FIRST_CANDIDATES
    while True:
        here = min(count, len(token_V))
        padded = torch.full((2, len(scaled_SV), count), float("-inf"), dtype=torch.float64, device=scaled_SV.device)
        padded[0, :, :here] = sorted_SV[:, :here]
        padded[1, :, :here] = token_V[order_SV[:, :here]].double()
        everyone_R2SC = all_gather(padded)
        value_SN, token_SN = (everyone_R2SC[:, part].transpose(0, 1).flatten(1) for part in (0, 1))
        value_SN, order_SN = value_SN.sort(dim=-1, descending=True, stable=True)  # ranks hold ascending ids: as above
        token_SN = token_SN.gather(1, order_SN)
        reached_SN = (value_SN - total_S[:, None]).exp().cumsum(-1) >= top_p_S.double()[:, None]
        # rounding may leave the sum of all a hair under top_p: then the nucleus is everything
        last_S1 = torch.where(reached_SN.any(-1), reached_SN.int().argmax(-1), value_SN.shape[1] - 1)[:, None]
        complete_S = value_SN.gather(1, last_S1)[:, 0] > everyone_R2SC[:, 0, :, -1].amax(0)
        if count >= largest or bool((complete_S & reached_SN.any(-1)).all()):
            break
        count = min(4 * count, largest)
    value_S1, token_S1 = value_SN.gather(1, last_S1), token_SN.gather(1, last_S1)
    return (scaled_SV > value_S1) | ((scaled_SV == value_S1) & (token_V <= token_S1))


def exponential_times(seed_S: Tensor, position_S: Tensor, token_V: Tensor) -> Tensor:
    """Exponential variates [S, V] fp64, strictly positive: -ln(1 - u) with 53 bits of u."""
    stream_S = mix(mix(seed_S) + position_S)
    bits_SV = (mix(stream_S[:, None] + token_V) >> 11) & ((1 << 53) - 1)
    return -torch.log1p(-(bits_SV.double() + 0.5) * 2.0**-53)

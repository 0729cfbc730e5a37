"""Drawing the next token from logits.

The draw is a race: token i finishes at time E_i / p_i with E_i exponential, and the first one wins, which is exactly
a draw from p (the Gumbel-max trick in another dress). E_i is a pure function of (seed, position, i), so a draw does
not depend on the batch, on the device or on how the vocabulary is cut over ranks.
"""

import torch
from torch import Tensor

from .hash import mix


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_p_S: Tensor,
    seed_S: Tensor,
    position_S: Tensor,
    any_top_p: bool,
) -> Tensor:
    """Token ids [S] int64. Temperature 0 takes the largest logit, the lowest id among equals.

    temperature_S, top_p_S: fp32. seed_S, position_S: int64; position is where the drawn token will stand.
    any_top_p: whether some row has top_p < 1, known on the host, so that the sort is skipped when none has.
    """
    logits_SV = logits_SV.float()
    cold_S1 = (temperature_S == 0)[:, None]
    scaled_SV = logits_SV / temperature_S[:, None].masked_fill(cold_S1, 1.0)
    if any_top_p:
        scaled_SV = keep_top_p(scaled_SV, top_p_S)
    race_SV = scaled_SV.double() - exponential_times(seed_S, position_S, logits_SV.shape[1]).log()
    return torch.where(cold_S1, logits_SV.double(), race_SV).argmax(-1)


def keep_top_p(logits_SV: Tensor, top_p_S: Tensor) -> Tensor:
    """-inf for all but the smallest set of most likely tokens whose probability reaches top_p; at least one stays."""
    sorted_SV, order_SV = logits_SV.sort(dim=-1, descending=True, stable=True)
    probability_SV = sorted_SV.double().softmax(-1)
    before_SV = probability_SV.cumsum(-1) - probability_SV  # of all tokens that are more likely
    dropped_SV = before_SV >= top_p_S.double()[:, None]
    dropped_SV[:, 0] = False
    return logits_SV.masked_fill(torch.zeros_like(dropped_SV).scatter(1, order_SV, dropped_SV), float("-inf"))


def exponential_times(seed_S: Tensor, position_S: Tensor, vocab: int) -> Tensor:
    """Exponential variates [S, vocab] fp64, strictly positive: -ln(1 - u) with 53 bits of u."""
    token_V = torch.arange(vocab, device=seed_S.device)
    stream_S = mix(mix(seed_S) + position_S)
    bits_SV = (mix(stream_S[:, None] + token_V) >> 11) & ((1 << 53) - 1)
    return -torch.log1p(-(bits_SV.double() + 0.5) * 2.0**-53)

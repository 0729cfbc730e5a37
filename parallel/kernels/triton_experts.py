"""The mixture of experts in Triton, with the signature and meaning of `experts.experts`: for few and for many tokens.

bf16 on NVIDIA GPUs from sm_80 on; under Triton's interpreter on the CPU, bf16 and fp32, computed in fp32. Nothing here
waits for the device, so all of it can be captured in a CUDA graph.
"""

import torch
from torch import Tensor

from . import sums
from .triton_decode import MAX_PAIRS, decode, decode_parts, one_message
from .triton_grouped import grouped
from .triton_mxfp4 import Tiles
from .triton_parts import Parts
from .triton_route import norm_logits, norm_route, room

FEW_PAIRS = 4  # an expert; on an H200 32 tokens of 32 experts take 147 us in `decode`, 164 in `grouped`; 64 205 and 163


def experts(
    x_TH: Tensor,
    weights_TX: Tensor,
    experts_TX: Tensor,
    gate_up: Tiles,
    down: Tiles,
    first_expert: int,
    limit: float,
    ranks: sums.Ranks | None = None,
) -> Tensor:
    """As `experts.experts`; gate_up and down are what `triton_mxfp4.pack` made. For one token it is summed over ranks
    inside a kernel, if it can be."""
    given = x_TH, weights_TX, experts_TX, gate_up, down, first_expert, limit
    if len(x_TH) == 1:  # all ranks the same, however many experts each holds
        return _one(*given, ranks)
    return sums.over(ranks, (decode if _few(experts_TX, gate_up) else grouped)(*given))


def experts_unsummed(
    x_TH: Tensor,
    weights_TX: Tensor,
    experts_TX: Tensor,
    gate_up: Tiles,
    down: Tiles,
    first_expert: int,
    limit: float,
    ranks: sums.Ranks | None = None,
) -> Tensor | Parts:
    """`experts`, whose sum over each token's experts is left to `triton_norm.add_norm` where it can be: for a few
    tokens, if there is none over ranks to come after it."""
    given = x_TH, weights_TX, experts_TX, gate_up, down, first_expert, limit
    if len(x_TH) > 1 and (ranks is None or ranks.alone) and _few(experts_TX, gate_up):
        return decode_parts(*given)
    return experts(*given, ranks)


def _few(experts_TX: Tensor, gate_up: Tiles) -> bool:
    return experts_TX.numel() <= min(MAX_PAIRS, FEW_PAIRS * len(gate_up.bias))


def norm_experts(
    residual_TH: Tensor,
    delta_TH: Tensor,
    norm_H: Tensor,
    eps: float,
    dtype: torch.dtype,
    router_EH: Tensor,
    router_bias_E: Tensor,
    experts_per_token: int,
    gate_up: Tiles,
    down: Tiles,
    first_expert: int,
    limit: float,
    ranks: sums.Ranks | None = None,
) -> tuple[Tensor, Tensor | Parts]:
    """`Operations.norm_experts`. For one token no kernel chooses: those of the experts do, each program for itself."""
    before = residual_TH, delta_TH, norm_H, eps, dtype, router_EH, router_bias_E
    if len(residual_TH) != 1:
        residual_TH, x_TH, weights_TX, experts_TX = norm_route(*before, experts_per_token)
        given = x_TH, weights_TX, experts_TX, gate_up, down, first_expert, limit
        return residual_TH, experts_unsummed(*given, ranks)
    residual_1H, x_1H, logits_1E = norm_logits(*before)
    routes = room(1, experts_per_token, x_1H.device)
    return residual_1H, _one(x_1H, *routes, gate_up, down, first_expert, limit, ranks, logits_1E)


def _one(
    x_1H: Tensor,
    weights_1X: Tensor,
    experts_1X: Tensor,
    gate_up: Tiles,
    down: Tiles,
    first_expert: int,
    limit: float,
    ranks: sums.Ranks | None,
    logits_1E: Tensor | None = None,
) -> Tensor:
    given = x_1H, weights_1X, experts_1X, gate_up, down, first_expert, limit
    if ranks is not None:
        with ranks.exchange(one_message(x_1H, down)) as exchange:
            if exchange is not None:
                return decode(*given, exchange=exchange, logits_1E=logits_1E)
    return sums.over(ranks, decode(*given, logits_1E=logits_1E))

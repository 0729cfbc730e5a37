"""The mixture of experts in Triton, with the signature and meaning of `experts.experts`: for few and for many tokens.

bf16 on NVIDIA GPUs from sm_80 on; under Triton's interpreter on the CPU, bf16 and fp32, computed in fp32. Nothing here
waits for the device, so all of it can be captured in a CUDA graph.
"""

import torch
from torch import Tensor

from . import sums
from .triton_decode import MAX_PAIRS, decode, one_message
from .triton_grouped import grouped
from .triton_mxfp4 import Tiles
from .triton_route import norm_logits, room

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
    pairs, held = experts_TX.numel(), len(gate_up.bias)
    run = decode if pairs <= min(MAX_PAIRS, FEW_PAIRS * held) else grouped
    return sums.over(ranks, run(*given))


def norm_experts(
    residual_1H: Tensor,
    delta_1H: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """`Operations.norm_experts` of one token. No kernel chooses: those of the experts do, each program for itself."""
    before = residual_1H, delta_1H, norm_H, eps, dtype, router_EH, router_bias_E
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

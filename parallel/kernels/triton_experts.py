"""The mixture of experts in Triton, with the signature and meaning of `experts.experts`: for few and for many tokens.

bf16 on NVIDIA GPUs from sm_80 on; under Triton's interpreter on the CPU, bf16 and fp32, computed in fp32. Nothing here
waits for the device, so all of it can be captured in a CUDA graph.
"""

from torch import Tensor

from . import sums
from .triton_decode import MAX_PAIRS, decode, one_message
from .triton_grouped import grouped
from .triton_mxfp4 import Tiles

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
    if ranks is not None and len(x_TH) == 1:  # all ranks the same, however many experts each holds
        with ranks.exchange(one_message(x_TH, down)) as exchange:
            if exchange is not None:
                return decode(*given, exchange=exchange)
    pairs, held = experts_TX.numel(), len(gate_up.bias)
    run = decode if pairs <= min(MAX_PAIRS, FEW_PAIRS * held) else grouped
    return sums.over(ranks, run(*given))

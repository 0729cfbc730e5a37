"""Add the last half-layer's result to the residual and normalise it for the next one.

RMSNorm as gpt-oss has it: computed in fp32, no bias, eps inside the root (OpenAI's gpt_oss/torch/model.py, RMSNorm).
"""

import torch
from torch import Tensor

from .precision import wide


def add_norm(
    residual_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(residual + delta, its RMSNorm).

    residual_TH: the hidden state in the residual dtype. delta_TH: what to add, in any dtype; None adds nothing.
    weight_H: fp32. dtype: of the normalised result, which matrix products read.
    """
    if delta_TH is not None:
        residual_TH = residual_TH + delta_TH.to(residual_TH.dtype)
    x_TH = residual_TH.to(wide(dtype))
    x_TH = x_TH * torch.rsqrt(x_TH.square().mean(-1, keepdim=True) + eps)
    return residual_TH, (x_TH * weight_H).to(dtype)

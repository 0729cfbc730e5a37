"""Rotary position embedding with YaRN, half-split, as gpt-oss was trained with it.

YaRN: https://arxiv.org/abs/2309.00071, equations 22 to 25, here with untruncated correction bounds. Frequencies are
computed in fp32 on the host in the order of operations of OpenAI's gpt_oss/torch/model.py, since an angle at position
100,000 shows every last bit of them.
"""

import math

import torch
from torch import Tensor

from ..planning.spec import Spec


def inverse_frequencies(spec: Spec) -> Tensor:
    """[D / 2] fp32, on the CPU: radians a token for each pair of columns."""
    half = spec.head_dim / 2
    freq = spec.rope_theta ** (torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim)
    if spec.yarn_factor <= 1.0:
        return 1.0 / freq

    def pair_that_turns(times: float) -> float:
        """Index of the pair that makes `times` full turns over the original context."""
        return half * math.log(spec.yarn_original_tokens / (times * 2 * math.pi)) / math.log(spec.rope_theta)

    low, high = pair_that_turns(spec.yarn_beta_fast), pair_that_turns(spec.yarn_beta_slow)
    ramp = (torch.arange(half, dtype=torch.float32) - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)  # 1: fast pairs stay as they were; 0: slow pairs are stretched by the factor
    return (1.0 / (spec.yarn_factor * freq)) * (1 - keep) + (1.0 / freq) * keep


def concentration(spec: Spec) -> float:
    """What cos and sin are multiplied by: 0.1 ln(factor) + 1, 1.3466 for the published models."""
    return 0.1 * math.log(spec.yarn_factor) + 1.0 if spec.yarn_factor > 1.0 else 1.0


def rotation(positions_T: Tensor, inverse_frequencies: Tensor, concentration: float) -> tuple[Tensor, Tensor]:
    """cos and sin, [T, D / 2] fp32, for every layer of one step."""
    angles = positions_T.float()[:, None] * inverse_frequencies
    return angles.cos() * concentration, angles.sin() * concentration


def rotate(x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Column i turns with column i + D / 2, computed in the precision of x or fp32, whichever is more."""
    left, right = x_TND.to(torch.promote_types(x_TND.dtype, cos.dtype)).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x_TND.dtype)

"""MXFP4: 32 four-bit floats (E2M1) that share one power-of-two scale (E8M0).

OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 5.4.1. As gpt-oss stores it: 16 bytes a block, the low nibble
is the even element; a weight is [..., out, in / 32, 16] with scales [..., out, in / 32], so blocks run along the
input dim.
"""

from functools import cache

import torch
from torch import Tensor

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, sign bit clear
FP4_VALUES = _MAGNITUDES + tuple(-value for value in _MAGNITUDES)  # bit 3 is the sign
BLOCK_BYTES = 16  # without its scale
SCALE_BIAS = 127  # E8M0: 2 ** (byte - 127); 255 is NaN


@cache
def _byte_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 2]: the two values that a byte holds, low nibble first."""
    pairs = [(FP4_VALUES[byte & 15], FP4_VALUES[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=dtype, device=device)


@cache
def _scale_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256]: the scale that a byte stands for."""
    scales = [2.0 ** (byte - SCALE_BIAS) for byte in range(255)] + [float("nan")]
    return torch.tensor(scales, dtype=torch.float64).to(dtype).to(device)


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., B, 16] packed bytes and [..., B] scales -> [..., B * 32] values. Exact in bf16, fp32 and fp64.

    In fp16 values under 2**-24 vanish and those over 65504 overflow.
    """
    pairs = torch.nn.functional.embedding(blocks.int(), _byte_table(dtype, blocks.device))  # [..., B, 16, 2]
    factor = torch.nn.functional.embedding(scales.int(), _scale_table(dtype, scales.device).unsqueeze(1))  # [..., B, 1]
    return (pairs.flatten(-2) * factor).flatten(-2)

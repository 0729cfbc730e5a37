"""Values -> MXFP4.

OCP Microscaling Formats (MX) v1.0, section 6.3, but for the scale: of the two that come into question the one with the
smaller squared error is taken. What is dequantized and quantized again keeps its values exactly.
"""

import torch
from torch import Tensor

from ..planning.spec import MXFP4_BLOCK
from .mxfp4 import SCALE_BIAS, dequantize

LARGEST_EXPONENT = 2  # of E2M1: its largest value is 6 = 1.5 * 2 ** 2
# where |x| passes to the next of 0, 0.5, 1, 1.5, 2, 3, 4, 6; ties go to the even mantissa
_PASSES_ABOVE = (0.25, 1.25, 2.5, 5.0)
_PASSES_AT = (0.75, 1.75, 3.5)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """[..., B * 32] -> (blocks [..., B, 16] uint8, scales [..., B] uint8), as gpt-oss stores a weight."""
    x = values.float().unflatten(-1, (-1, MXFP4_BLOCK))
    largest = x.abs().amax(-1)
    exponent = torch.where(largest > 0, largest.frexp().exponent - 1 - LARGEST_EXPONENT, 0)
    tried = []
    for more in (0, 1):
        scales = (exponent + SCALE_BIAS + more).clamp(0, 254).to(torch.uint8)
        blocks = _pack(x * torch.exp2(SCALE_BIAS - scales.float())[..., None])
        back = dequantize(blocks, scales, torch.float32).unflatten(-1, (-1, MXFP4_BLOCK))
        tried.append((blocks, scales, (back - x).square().sum(-1)))
    (blocks, scales, error), (more_blocks, more_scales, more_error) = tried
    better = more_error < error
    return torch.where(better[..., None], more_blocks, blocks), torch.where(better, more_scales, scales)


def _pack(x: Tensor) -> Tensor:
    """[..., 32] in units of the scale -> [..., 16] bytes, low nibble first."""
    size = x.abs()
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for bound in _PASSES_ABOVE:
        code += size > bound
    for bound in _PASSES_AT:
        code += size >= bound
    code |= (x.signbit() & (code > 0)).to(torch.uint8) << 3
    return code[..., ::2] | code[..., 1::2] << 4

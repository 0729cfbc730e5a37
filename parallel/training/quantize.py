"""Training as if weights had been rounded to MXFP4, which `kernels.quantize` does."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.mxfp4 import dequantize
from ..kernels.quantize import quantize


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return dequantize(*quantize(weight), weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def through_mxfp4(weight: Tensor) -> Tensor:
    """The MXFP4 values nearest to `weight`; its gradient is taken as if nothing had been rounded (straight-through
    estimator, https://arxiv.org/abs/1308.3432)."""
    out: Any = _Straight.apply(weight)
    return out

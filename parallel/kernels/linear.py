"""The matrix products that are not inside another operation: attention's output, whose columns ranks share, and the
head.

T tokens, I columns in, O rows out.
"""

import torch
from torch import Tensor

from . import sums, weight_only
from .weight_only import Narrow, Weight


def linear(x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None, ranks: sums.Ranks | None = None) -> Tensor:
    """x W^T + b, [T, O], in the dtype of x; summed over ranks, where they are given."""
    if isinstance(weight_OI, Narrow):
        return sums.over(ranks, weight_only.linear(x_TI, weight_OI, bias_O))
    return sums.over(ranks, torch.nn.functional.linear(x_TI, weight_OI, bias_O))

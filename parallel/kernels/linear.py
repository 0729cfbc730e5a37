"""The matrix products that are not inside another operation: attention's output and the head.

T tokens, I columns in, O rows out.
"""

import torch
from torch import Tensor

from . import weight_only
from .weight_only import Narrow, Weight


def linear(x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, [T, O], in the dtype of x."""
    if isinstance(weight_OI, Narrow):
        return weight_only.linear(x_TI, weight_OI, bias_O)
    return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

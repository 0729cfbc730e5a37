"""Matrix products that gradients go through: frozen or trained weights, and low-rank additions (LoRA) to either.

Frozen experts stay packed MXFP4: one expert's matrix is dequantized for its product and again for the gradient of its
input, and never kept. W + B A is never formed: an addition costs two thin products (https://arxiv.org/abs/2106.09685).

T tokens (in any order), I columns in, O rows out, E experts, R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.experts import Packed, swiglu
from ..kernels.mxfp4 import dequantize
from ..kernels.precision import wide
from .quantize import through_mxfp4


@dataclass(frozen=True)
class LowRank:
    """Adds scale * B A to a weight. a: [R, I] and b: [O, R]; for experts [E, R, I] and [E, O, R]; fp32, trained."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Linear:
    """weight [O, I] and bias [O], in any dtype: products are computed in that of the input."""

    weight: Tensor
    bias: Tensor
    added: LowRank | None = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        y_TO = linear(x_TI, self.weight.to(x_TI.dtype), self.bias.to(x_TI.dtype))
        if self.added is None:
            return y_TO
        return y_TO + low_rank(x_TI, self.added.a.to(x_TI.dtype), self.added.b.to(x_TI.dtype), self.added.scale)


def low_rank(x_TI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    return linear(linear(x_TI, a_RI) * scale, b_OR)


@dataclass(frozen=True)
class Dense:
    """One product of all experts as it is trained: weight [E, O, I], bias [E, O].

    as_mxfp4: the product is with the nearest MXFP4 values, so that what is trained is what will be stored.
    """

    weight: Tensor
    bias: Tensor
    as_mxfp4: bool


@dataclass(frozen=True)
class Experts:
    base: Packed | Dense
    added: LowRank | None = None

    def in_dtype(self, dtype: torch.dtype) -> Callable[[int, Tensor], Tensor]:
        """(expert, x [T, I]) -> [T, O], for inputs of `dtype`. Casts what is trained once for all experts."""
        base, added = self.base, self.added
        if isinstance(base, Packed):

            def product(expert: int, x_TI: Tensor) -> Tensor:
                out: Any = _PackedLinear.apply(x_TI, base.blocks[expert], base.scales[expert])
                return out + base.bias[expert].to(dtype)
        else:
            weight = through_mxfp4(base.weight) if base.as_mxfp4 else base.weight
            # unbound, not indexed: the gradient of an index is as large as all experts, once for each of them
            weights, biases = weight.to(dtype).unbind(), base.bias.to(dtype).unbind()

            def product(expert: int, x_TI: Tensor) -> Tensor:
                return linear(x_TI, weights[expert], biases[expert])

        if added is None:
            return product
        a, b = added.a.to(dtype).unbind(), added.b.to(dtype).unbind()
        return lambda expert, x_TI: product(expert, x_TI) + low_rank(x_TI, a[expert], b[expert], added.scale)


Mix = Callable[[Experts, Experts, Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
"""(gate_up, down, x [T, H], weights [T, X], experts [T, X], limit of SwiGLU, wanted) -> (weighted sum over a token's
experts [T, H], tokens of each expert [E]), differentiable in x, weights and what is trained. wanted: False where
nobody reads the sum, since all is computed again for its gradients alone: it may then be anything."""


def one_by_one(
    gate_up: Experts,
    down: Experts,
    x_TH: Tensor,
    weights_TX: Tensor,
    experts_TX: Tensor,
    limit: float,
    wanted: bool = True,
) -> tuple[Tensor, Tensor]:
    """One expert after the other: in any dtype, on any device.

    Rows are brought into the order of their experts and back by permutations, and a token's rows are added in one sum:
    no step adds in an order that changes from run to run, on a GPU either.
    """
    tokens, per_token = experts_TX.shape
    order = experts_TX.flatten().argsort(stable=True)
    load_E = torch.bincount(experts_TX.flatten(), minlength=len(gate_up.base.bias))
    rows = x_TH.unsqueeze(1).expand(-1, per_token, -1).flatten(0, 1)[order]
    products = gate_up.in_dtype(x_TH.dtype), down.in_dtype(x_TH.dtype)
    outputs = []
    for expert, part in enumerate(rows.split(load_E.tolist())):
        if len(part):
            outputs.append(products[1](expert, swiglu(products[0](expert, part), limit)))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    y_TXH = torch.cat(outputs)[back].view(tokens, per_token, -1)
    y_TH = (y_TXH.to(wide(x_TH.dtype)) * weights_TX[..., None]).sum(1)
    return y_TH.to(x_TH.dtype), load_E


class _PackedLinear(torch.autograd.Function):
    """x W^T of a packed W, with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(blocks, scales)
        return linear(x_TI, dequantize(blocks, scales, x_TI.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        blocks, scales = ctx.saved_tensors
        return grads[0] @ dequantize(blocks, scales, grads[0].dtype), None, None

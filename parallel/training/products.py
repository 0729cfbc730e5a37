"""Matrix products that gradients go through: frozen or trained weights, and low-rank additions (LoRA) to either.

Frozen experts stay packed MXFP4: one expert's matrix is dequantized for its product and again for the gradient of its
input, and never kept. W + B A is never formed: an addition costs two thin products (https://arxiv.org/abs/2106.09685).

T tokens (in any order), I columns in, O rows out, E experts, R rank.
"""

from collections.abc import Callable, Iterator, Sequence
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
    """weight [O, I] and bias [O], in any dtype: products are computed in that of the input. added: to rows of the
    weight, one after the other: to all of them or to none; the weight is then frozen."""

    weight: Tensor
    bias: Tensor
    added: tuple[LowRank, ...] = ()

    def __call__(self, x_TI: Tensor) -> Tensor:
        weight, bias = self.weight.to(x_TI.dtype), self.bias.to(x_TI.dtype)
        if not self.added:
            return linear(x_TI, weight, bias)
        trained = [tensor for one in self.added for tensor in (one.a, one.b)]
        out: Any = _Adapted.apply(x_TI, weight, bias, tuple(one.scale for one in self.added), *trained)
        return out


class _Adapted(torch.autograd.Function):
    """x W^T + bias, and A x times B for its rows, in few products: the A of all rows are one."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight: Tensor, bias: Tensor, scales: tuple[float, ...], *trained: Tensor
    ) -> Tensor:
        y_TO = linear(x_TI, weight, bias)
        low_TR = linear(x_TI, _stacked(trained[::2], x_TI.dtype))
        for rows, ranks, b, scale in _places(trained, scales):
            y_TO[:, rows].addmm_(low_TR[:, ranks], b.to(x_TI.dtype).T, alpha=scale)
        ctx.save_for_backward(x_TI, low_TR, weight)
        ctx.trained, ctx.scales = trained, scales
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, low_TR, weight = ctx.saved_tensors
        grad_TO, dlow_TR = grads[0], torch.empty_like(low_TR)
        dbs = []
        for rows, ranks, b, scale in _places(ctx.trained, ctx.scales):
            part = dlow_TR[:, ranks]
            torch.addmm(part, grad_TO[:, rows], b.to(x_TI.dtype), beta=0, alpha=scale, out=part)
            db = (grad_TO[:, rows].T @ low_TR[:, ranks]).to(b.dtype)
            dbs.append(db if scale == 1 else db.mul_(scale))
        all_a = ctx.trained[::2]
        dx_TI = (grad_TO @ weight).addmm_(dlow_TR, _stacked(all_a, x_TI.dtype)) if ctx.needs_input_grad[0] else None
        das = (dlow_TR.T @ x_TI).to(all_a[0].dtype).split([len(a) for a in all_a])
        return dx_TI, None, None, None, *(tensor for pair in zip(das, dbs, strict=True) for tensor in pair)


def _stacked(all_a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (all_a[0] if len(all_a) == 1 else torch.cat(list(all_a))).to(dtype)


def _places(trained: Sequence[Tensor], scales: Sequence[float]) -> Iterator[tuple[slice, slice, Tensor, float]]:
    """(rows of the product, ranks among all, B, scale) of each addition."""
    row = place = 0
    for b, scale in zip(trained[1::2], scales, strict=True):
        rows, rank = b.shape
        yield slice(row, row + rows), slice(place, place + rank), b, scale
        row, place = row + rows, place + rank


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
                # experts may wait in host memory
                blocks, scales = (part[expert].to(x_TI.device) for part in (base.blocks, base.scales))
                out: Any = _PackedLinear.apply(x_TI, blocks, scales)
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


Mix = Callable[[Experts, Experts, Tensor, Tensor, Tensor, float, bool], Tensor]
"""(gate_up, down, x [T, H], weights [T, X], experts [T, X], limit of SwiGLU, wanted) -> weighted sum over a token's
experts [T, H], differentiable in x, weights and what is trained. wanted: False where nobody reads the sum, since all is
computed again for its gradients alone: it may then be anything."""


def one_by_one(
    gate_up: Experts,
    down: Experts,
    x_TH: Tensor,
    weights_TX: Tensor,
    experts_TX: Tensor,
    limit: float,
    wanted: bool = True,
) -> Tensor:
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
    return y_TH.to(x_TH.dtype)


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

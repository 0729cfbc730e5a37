"""All experts at once: few kernels, of which the products are torch's grouped_mm, and the host waits for none.

A product of an expert is one matrix, laid out in kernels.triton_mixture: its weights, which are dequantized or cast
together for all experts of a layer, what is added to them, and its bias. One product then computes all three, and its
gradient the gradients of all three. Where it is not large, the matrix of the first product lives until its gradient.

T tokens, X experts a token, P = T X rows in the order of their experts, E experts, I columns in, O rows out, R rank,
W columns of a product.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from ..kernels.experts import Packed
from ..kernels.triton_dequantize import dequantize
from ..kernels.triton_mixture import (
    SPARE,
    Order,
    fill,
    gather,
    gather_back,
    settle,
    sort,
    swiglu,
    swiglu_backward,
    weigh,
)
from ..kernels.triton_round import nearest_mxfp4
from ..planning.training import KEPT_LIMIT_BYTES
from .products import Experts


@dataclass(frozen=True)
class _Product:
    """Of all experts of a layer, as the rows of `order` go through it."""

    experts: Experts
    order: Order

    @property
    def rank(self) -> int:
        return 0 if self.experts.added is None else self.experts.added.a.shape[1]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """[E, O, W]"""
        base, added = self.experts.base, self.experts.added
        if isinstance(base, Packed):
            # experts may wait in host memory
            device = self.order.starts_E.device
            blocks, scales = (part.to(device, non_blocking=True) for part in (base.blocks, base.scales))
            matrix = dequantize(blocks, scales, dtype, self.rank + SPARE)
        else:
            weight, spare = base.weight, self.rank + SPARE
            if base.as_mxfp4:
                matrix = nearest_mxfp4(weight.detach(), dtype, spare)
            else:
                matrix = weight.new_empty((*weight.shape[:2], weight.shape[2] + spare), dtype=dtype)
                matrix[..., : weight.shape[2]] = weight
        fill(matrix, None if added is None else added.b, base.bias, 1.0 if added is None else added.scale)
        return matrix

    def lower(self, rows_PW: Tensor) -> None:
        """Writes A x where rows have room for it."""
        if self.experts.added is not None:
            a_ERI = self.experts.added.a.to(rows_PW.dtype)
            width = a_ERI.shape[2]
            low_PR = grouped_mm(rows_PW[:, :width], a_ERI.transpose(1, 2), offs=self.order.ends_E)
            rows_PW[:, width : width + self.rank] = low_PR

    def raise_gradient(self, dlow_PR: Tensor) -> Tensor | None:
        """Of x, by A."""
        if self.experts.added is None:
            return None
        return grouped_mm(dlow_PR, self.experts.added.a.to(dlow_PR.dtype), offs=self.order.ends_E)

    def gradients(
        self, grad_PO: Tensor, rows_PI: Tensor, dlow_PR: Tensor, low_PR: Tensor, rows_PW: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Of weight, bias, A and B. rows_PW: where the weight is trained."""
        base, added, ends_E = self.experts.base, self.experts.added, self.order.ends_E
        dweight = dbias = da = db = None
        if rows_PW is not None:
            assert not isinstance(base, Packed)
            whole = settle(grouped_mm(grad_PO.T, rows_PW, offs=ends_E), self.order, 1.0, base.weight.dtype)
            width = base.weight.shape[2]
            dweight, dbias = whole[..., :width], whole[..., width + self.rank].to(base.bias.dtype)
        if added is not None:
            da = settle(grouped_mm(dlow_PR.T, rows_PI, offs=ends_E), self.order, 1.0, added.a.dtype)
            db = settle(grouped_mm(grad_PO.T, low_PR, offs=ends_E), self.order, added.scale, added.b.dtype)
        return dweight, dbias, da, db


def _trained(experts: Experts) -> tuple[Tensor | None, ...]:
    """Whatever of a product may get a gradient: weight, bias, A and B."""
    base, added = experts.base, experts.added
    both = (None, None) if isinstance(base, Packed) else (base.weight, base.bias)
    return (*both, None, None) if added is None else (*both, added.a, added.b)


class _AtOnce(torch.autograd.Function):
    """trained: `_trained` of both products, named so that gradients go there."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weights_TX: Tensor,
        experts_TX: Tensor,
        gate_up: Experts,
        down: Experts,
        limit: float,
        wanted: bool,
        *trained: Tensor | None,
    ) -> Tensor:
        order = sort(experts_TX, len(gate_up.base.bias))
        first, second = _Product(gate_up, order), _Product(down, order)
        rows_PW = gather(x_TH, order, first.rank)
        first.lower(rows_PW)
        matrix = first.matrix(x_TH.dtype)
        h_PO = grouped_mm(rows_PW, matrix.transpose(1, 2), offs=order.ends_E)
        inner_PW = swiglu(h_PO, second.rank, limit)
        second.lower(inner_PW)
        kept = matrix if matrix.nbytes <= KEPT_LIMIT_BYTES else None
        ctx.save_for_backward(weights_TX, order.pairs_P, order.rows_P, order.starts_E, rows_PW, kept, h_PO, inner_PW)
        ctx.experts, ctx.limit = (gate_up, down), limit
        if not wanted:
            return torch.empty_like(x_TH)
        del matrix, kept
        y_PH = grouped_mm(inner_PW, second.matrix(x_TH.dtype).transpose(1, 2), offs=order.ends_E)
        return gather_back(y_PH, y_PH.shape[1], order, len(x_TH), weights_TX)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights_TX, pairs_P, rows_P, starts_E, rows_PW, kept, h_PO, inner_PW = ctx.saved_tensors
        order, limit = Order(pairs_P, rows_P, starts_E), ctx.limit
        first, second = (_Product(experts, order) for experts in ctx.experts)
        grad_TH, ends_E = grads[0].contiguous(), order.ends_E
        # of the last product as if every weight were one
        grad_PH = gather(grad_TH, order, None)
        dinner_PW = grouped_mm(grad_PH, second.matrix(grad_PH.dtype), offs=ends_E)
        dweights_TX, dlow_PR, low_PR = weigh(inner_PW, dinner_PW, weights_TX, order, second.rank)
        width = h_PO.shape[1] // 2
        weighed_PW = None
        if not isinstance(second.experts.base, Packed):
            weighed_PW = inner_PW * weights_TX.flatten()[pairs_P, None].to(inner_PW.dtype)
        of_second = second.gradients(grad_PH, inner_PW[:, :width], dlow_PR, low_PR, weighed_PW)
        dh_PO = swiglu_backward(h_PO, dinner_PW, second.raise_gradient(dlow_PR), weights_TX, order, limit)
        del dinner_PW
        matrix = first.matrix(dh_PO.dtype) if kept is None else kept
        drows_PW = grouped_mm(dh_PO, matrix, offs=ends_E)
        del matrix
        width = grad_TH.shape[1]
        low = slice(width, width + first.rank)
        trained = not isinstance(first.experts.base, Packed)
        of_first = first.gradients(
            dh_PO, rows_PW[:, :width], drows_PW[:, low], rows_PW[:, low], rows_PW if trained else None
        )
        added_PH = first.raise_gradient(drows_PW[:, low])
        dx_TH = gather_back(drows_PW, width, order, len(grad_TH), added_PI=added_PH)
        return dx_TH, dweights_TX, None, None, None, None, None, *of_first, *of_second


def at_once(
    gate_up: Experts,
    down: Experts,
    x_TH: Tensor,
    weights_TX: Tensor,
    experts_TX: Tensor,
    limit: float,
    wanted: bool = True,
) -> Tensor:
    """`products.one_by_one`, in bf16 on a GPU."""
    out: Any = _AtOnce.apply(
        x_TH, weights_TX, experts_TX, gate_up, down, limit, wanted, *_trained(gate_up), *_trained(down)
    )
    return out

"""All experts at once: few kernels, of which the products are torch's grouped_mm, and the host waits for none.

A product of an expert is one matrix, laid out in kernels.triton_mixture: its weights, which are dequantized or cast
together for all experts of a layer, what is added to them, and its bias. One product then computes all three, and its
gradient the gradients of all three. Of all matrices of a layer there are only so many rows at a time, or columns for
the gradient, that they are no larger than what else a layer needs: every sum is still the sum of one product.

T tokens, X experts a token, P = T X rows in the order of their experts, E experts, I columns in, O rows out, R rank,
W columns of a product.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from ..planning.training import part_size
from .products import Experts


@dataclass(frozen=True)
class _Product:
    """Of all experts of a layer, as the rows of `order` go through it."""

    experts: Experts
    order: Order

    @property
    def rank(self) -> int:
        return 0 if self.experts.added is None else self.experts.added.a.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, O, I"""
        base = self.experts.base
        if isinstance(base, Packed):
            experts, rows, blocks = base.scales.shape
            return experts, rows, blocks * 32
        experts, rows, columns = base.weight.shape
        return experts, rows, columns

    def brought(self) -> "_Product":
        """With packed experts on the device, if they wait in host memory: before the product goes forth or back."""
        base, device = self.experts.base, self.order.starts_E.device
        if not isinstance(base, Packed):
            return self
        return self.of(*(part.to(device, non_blocking=True) for part in (base.blocks, base.scales)))

    def of(self, blocks: Tensor, scales: Tensor) -> "_Product":
        return replace(self, experts=replace(self.experts, base=Packed(blocks, scales, self.experts.base.bias)))

    def forth(self, rows_PW: Tensor) -> Tensor:
        """[P, O]"""
        (experts, rows, columns), dtype = self.shape, rows_PW.dtype

        def product(some: slice) -> Tensor:
            matrix = self._part(some, slice(0, columns), dtype)
            return grouped_mm(rows_PW, matrix.transpose(1, 2), offs=self.order.ends_E)

        step = part_size(rows, experts * rows_PW.shape[1] * dtype.itemsize)
        return _side_by_side(rows, step, rows, product)

    def back(self, grad_PO: Tensor) -> Tensor:
        """[P, W]: the gradient of the rows that went forth."""
        (experts, rows, columns), dtype = self.shape, grad_PO.dtype

        def product(some: slice) -> Tensor:
            return grouped_mm(grad_PO, self._part(slice(0, rows), some, dtype), offs=self.order.ends_E)

        step = part_size(columns, experts * rows * dtype.itemsize)
        return _side_by_side(columns, step, columns + self.rank + SPARE, product)

    def _part(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """[E, rows, columns]; with the last of the weights' columns come those after them."""
        base, added = self.experts.base, self.experts.added
        spare = self.rank + SPARE if columns.stop == self.shape[2] else 0
        if isinstance(base, Packed):
            here = slice(None), rows, slice(columns.start // 32, columns.stop // 32)
            matrix = dequantize(base.blocks[here], base.scales[here], dtype, spare)
        else:
            weight = base.weight.detach()[:, rows, columns]
            if base.as_mxfp4:
                matrix = nearest_mxfp4(weight, dtype, spare)
            else:
                matrix = weight.new_empty((*weight.shape[:2], weight.shape[2] + spare), dtype=dtype)
                matrix[..., : weight.shape[2]] = weight
        if spare:
            b_EOR, scale = (None, 1.0) if added is None else (added.b[:, rows], added.scale)
            fill(matrix, b_EOR, base.bias[:, rows], scale)
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


def _side_by_side(size: int, step: int, width: int, product: Callable[[slice], Tensor]) -> Tensor:
    """[P, width]: what `product` gives for `step` after `step` of `size`."""
    if step >= size:
        return product(slice(0, size))
    out = None
    for low in range(0, size, step):
        part = product(slice(low, min(low + step, size)))
        out = part.new_empty((len(part), width)) if out is None else out
        out[:, low : low + part.shape[1]] = part
    assert out is not None
    return out


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
        first, second = _Product(gate_up, order).brought(), _Product(down, order)
        rows_PW = gather(x_TH, order, first.rank)
        first.lower(rows_PW)
        h_PO = first.forth(rows_PW)
        inner_PW = swiglu(h_PO, second.rank, limit)
        second.lower(inner_PW)
        base = first.experts.base
        packed = (base.blocks, base.scales) if isinstance(base, Packed) else ()  # need not be brought again
        ctx.save_for_backward(weights_TX, order.pairs_P, order.rows_P, order.starts_E, rows_PW, h_PO, inner_PW, *packed)
        ctx.experts, ctx.limit = (gate_up, down), limit
        if not wanted:
            return torch.empty_like(x_TH)
        y_PH = second.brought().forth(inner_PW)
        return gather_back(y_PH, y_PH.shape[1], order, len(x_TH), weights_TX)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights_TX, pairs_P, rows_P, starts_E, rows_PW, h_PO, inner_PW, *packed = ctx.saved_tensors
        order, limit = Order(pairs_P, rows_P, starts_E), ctx.limit
        first, second = (_Product(experts, order) for experts in ctx.experts)
        if packed:
            first = first.of(*packed)
        grad_TH = grads[0].contiguous()
        # of the last product as if every weight were one
        grad_PH = gather(grad_TH, order, None)
        dinner_PW = second.brought().back(grad_PH)
        dweights_TX, dlow_PR, low_PR = weigh(inner_PW, dinner_PW, weights_TX, order, second.rank)
        width = h_PO.shape[1] // 2
        weighed_PW = None
        if not isinstance(second.experts.base, Packed):
            weighed_PW = inner_PW * weights_TX.flatten()[pairs_P, None].to(inner_PW.dtype)
        of_second = second.gradients(grad_PH, inner_PW[:, :width], dlow_PR, low_PR, weighed_PW)
        dh_PO = swiglu_backward(h_PO, dinner_PW, second.raise_gradient(dlow_PR), weights_TX, order, limit)
        del dinner_PW
        drows_PW = first.back(dh_PO)
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

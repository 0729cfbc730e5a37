"""Cross-entropy over a large vocabulary, a few tokens at a time: logits of a whole pack never exist.

T tokens, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.precision import wide

LOGITS_LIMIT_BYTES = 256 << 20


def cross_entropy(x_TH: Tensor, head_VH: Tensor, targets_T: Tensor, weights_T: Tensor) -> Tensor:
    """Sum over tokens of weight * -ln p(target), a scalar in fp32.

    The gradient of x, and of the head where it is trained, is computed on the way, while a chunk's logits are there.
    """
    out: Any = _CrossEntropy.apply(x_TH, head_VH, targets_T, weights_T)
    return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, head_VH: Tensor, targets_T: Tensor, weights_T: Tensor) -> Tensor:
        precision = wide(x_TH.dtype)
        head = head_VH.to(x_TH.dtype)
        dx_TH = torch.empty_like(x_TH) if ctx.needs_input_grad[0] else None
        dhead_VH = torch.zeros_like(head_VH) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=precision, device=x_TH.device)
        step = max(1, LOGITS_LIMIT_BYTES // (len(head_VH) * precision.itemsize))
        for low in range(0, len(x_TH), step):
            rows = slice(low, low + step)
            logits = linear(x_TH[rows], head).to(precision)
            lse = logits.logsumexp(-1, keepdim=True)
            weights, targets = weights_T[rows, None].to(precision), targets_T[rows, None]
            total += (weights * (lse - logits.gather(1, targets))).sum()
            if dx_TH is None and dhead_VH is None:
                continue
            slopes = logits.sub_(lse).exp_()  # p
            slopes.scatter_add_(1, targets, torch.full_like(weights, -1)).mul_(weights)
            slopes = slopes.to(x_TH.dtype)
            if dx_TH is not None:
                dx_TH[rows] = slopes @ head
            if dhead_VH is not None:
                dhead_VH += (slopes.T @ x_TH[rows]).to(dhead_VH.dtype)
        ctx.save_for_backward(dx_TH, dhead_VH)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_TH, dhead_VH = ctx.saved_tensors
        scale = grads[0]
        return (
            None if dx_TH is None else dx_TH * scale.to(dx_TH.dtype),
            None if dhead_VH is None else dhead_VH * scale.to(dhead_VH.dtype),
            None,
            None,
        )

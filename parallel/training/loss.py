"""Cross-entropy over a large vocabulary, a few tokens at a time: logits of a whole pack never exist.

T tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.precision import wide
from ..planning.training import LOGITS_LIMIT_BYTES

Slopes = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits [T, V], which may be written over, targets [T], weights [T]) -> (weight * -ln p(target) [T], in fp32 at
least; its gradient [T, V] in the dtype of the logits)"""


def slopes(logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor) -> tuple[Tensor, Tensor]:
    wide_TV = logits_TV.to(wide(logits_TV.dtype))
    lse_T1 = wide_TV.logsumexp(-1, keepdim=True)
    weights_T1, targets_T1 = weights_T[:, None].to(wide_TV.dtype), targets_T[:, None]
    losses_T1 = weights_T1 * (lse_T1 - wide_TV.gather(1, targets_T1))
    slopes_TV = (wide_TV - lse_T1).exp_()  # p
    slopes_TV.scatter_add_(1, targets_T1, torch.full_like(weights_T1, -1)).mul_(weights_T1)
    return losses_T1[:, 0], slopes_TV.to(logits_TV.dtype)


def cross_entropy(
    x_TH: Tensor, head_VH: Tensor, targets_T: Tensor, weights_T: Tensor, slopes: Slopes = slopes
) -> Tensor:
    """Sum over tokens of weight * -ln p(target), a scalar in fp32.

    The gradient of x, and of the head where it is trained, is computed on the way, while a chunk's logits are there.
    """
    out: Any = _CrossEntropy.apply(x_TH, head_VH, targets_T, weights_T, slopes)
    return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, head_VH: Tensor, targets_T: Tensor, weights_T: Tensor, slopes: Slopes
    ) -> Tensor:
        head = head_VH.to(x_TH.dtype)
        dx_TH = torch.empty_like(x_TH) if ctx.needs_input_grad[0] else None
        dhead_VH = torch.zeros_like(head_VH) if ctx.needs_input_grad[1] else None
        losses = [torch.zeros(0, dtype=wide(x_TH.dtype), device=x_TH.device)]
        step = max(1, LOGITS_LIMIT_BYTES // (len(head_VH) * x_TH.element_size()))
        for low in range(0, len(x_TH), step):
            rows = slice(low, low + step)
            losses_T, slopes_TV = slopes(linear(x_TH[rows], head), targets_T[rows], weights_T[rows])
            losses.append(losses_T)
            if dx_TH is not None:
                torch.mm(slopes_TV, head, out=dx_TH[rows])
            if dhead_VH is not None:
                dhead_VH += (slopes_TV.T @ x_TH[rows]).to(dhead_VH.dtype)
        ctx.save_for_backward(dx_TH, dhead_VH)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_TH, dhead_VH = ctx.saved_tensors
        scale = grads[0]
        return (
            None if dx_TH is None else dx_TH * scale.to(dx_TH.dtype),
            None if dhead_VH is None else dhead_VH * scale.to(dhead_VH.dtype),
            None,
            None,
            None,
        )

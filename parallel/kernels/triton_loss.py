"""Cross-entropy and its gradient over rows of logits, in one kernel that leaves the gradient where the logits were.

R rows, V vocabulary.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 8192
_LOWEST = tl.constexpr(-3.0e38)  # finite: of what is not there exp(0) is counted, and then multiplied by 0


@triton.jit
def _slopes(logits, targets, weights, losses, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    column = tl.arange(0, BLOCK)
    target, weight = tl.load(targets + row), tl.load(weights + row)
    hit = tl.load(logits + target).to(tl.float32)
    top = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, V, BLOCK):
        value = tl.load(logits + begin + column, mask=begin + column < V, other=_LOWEST).to(tl.float32)
        higher = tl.maximum(top, value)
        total = total * tl.exp(top - higher) + tl.exp(value - higher)
        top = higher
    most = tl.max(top, 0)
    lse = most + tl.log(tl.sum(total * tl.exp(top - most), 0))
    tl.store(losses + row, weight * (lse - hit))
    for begin in range(0, V, BLOCK):
        at = begin + column
        value = tl.load(logits + at, mask=at < V, other=_LOWEST).to(tl.float32)
        slope = (tl.exp(value - lse) - tl.where(at == target, 1.0, 0.0)) * weight
        tl.store(logits + at, slope.to(logits.dtype.element_ty), mask=at < V)


def slopes(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    """As `loss.slopes`. logits: contiguous; written over."""
    rows, vocab = logits_RV.shape
    losses_R = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    targets_R, weights_R = targets_R.contiguous(), weights_R.contiguous()
    _slopes[rows,](logits_RV, targets_R, weights_R, losses_R, V=vocab, BLOCK=COLUMNS, num_warps=16)
    return losses_R, logits_RV

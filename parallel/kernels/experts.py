"""The mixture of experts: the router, then both products, SwiGLU and the weighted sum over a token's experts.

T tokens, H hidden, I intermediate, E experts of this rank, X experts a token. Weights stay packed MXFP4.
Sources: OpenAI's gpt_oss/torch/model.py, MLPBlock and swiglu.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import sums
from .mxfp4 import BLOCK_BYTES, dequantize
from .norm import add_norm
from .precision import wide

SWIGLU_ALPHA = 1.702  # of the published models; config.json does not carry it


@dataclass(frozen=True)
class Packed:
    """One product of all experts here: blocks [E, out, in / 32, 16] and scales [E, out, in / 32] u8, bias [E, out]."""

    blocks: Tensor
    scales: Tensor
    bias: Tensor


Shape = tuple[int, int, int]  # experts, rows (outputs), MXFP4 blocks of a row: of a product's scales


@dataclass(frozen=True)
class Layout:
    """How kernels want packed experts in memory, and how they are brought there from the checkpoint's layout.

    pack(blocks, scales, bias): a whole product, where the bias is; may keep what it is given. Or bit by bit, so that
    nothing else of a product has to be where its kernels read it: room(shape, dtype, device), with a bias of that dtype
    and nothing filled in; then put(packed, place, blocks, scales) for each expert, from wherever it is, [out, in / 32,
    16] and [out, in / 32]. The bias is filled in before.
    """

    pack: Callable[[Tensor, Tensor, Tensor], Packed]
    room: Callable[[Shape, torch.dtype, torch.device], Packed]
    put: Callable[[Packed, int, Tensor, Tensor], None]


def room(shape: Shape, dtype: torch.dtype, device: torch.device) -> Packed:
    blocks = torch.empty((*shape, BLOCK_BYTES), dtype=torch.uint8, device=device)
    scales = torch.empty(shape, dtype=torch.uint8, device=device)
    return Packed(blocks, scales, torch.empty(shape[:2], dtype=dtype, device=device))


def put(packed: Packed, place: int, blocks: Tensor, scales: Tensor) -> None:
    packed.blocks[place].copy_(blocks, non_blocking=True)
    packed.scales[place].copy_(scales, non_blocking=True)


LAYOUT = Layout(Packed, room, put)  # the checkpoint's own


def route(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """(weights_TX fp32, experts_TX int64): softmax over the chosen experts' logits, after the choice.

    Every rank routes for itself among all experts: weight and bias are whole.
    """
    precision = wide(x_TH.dtype)
    logits_TE = torch.nn.functional.linear(x_TH.to(precision), weight_EH.to(precision), bias_E.to(precision))
    chosen_TX, experts_TX = logits_TE.topk(experts_per_token, dim=-1)
    return chosen_TX.softmax(-1), experts_TX


def norm_route(
    residual_TH: Tensor,
    delta_TH: Tensor,
    norm_H: Tensor,
    eps: float,
    dtype: torch.dtype,
    weight_EH: Tensor,
    bias_E: Tensor,
    experts_per_token: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(residual_TH, x_TH, weights_TX, experts_TX): norm.add_norm, and `route` of what it gives."""
    residual_TH, x_TH = add_norm(residual_TH, delta_TH, norm_H, eps, dtype)
    return residual_TH, x_TH, *route(x_TH, weight_EH, bias_E, experts_per_token)


def swiglu(x: Tensor, limit: float) -> Tensor:
    """[..., 2 I] with gate and up columns alternating -> [..., I]. The gate is clamped from above only."""
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


def experts(
    x_TH: Tensor,
    weights_TX: Tensor,
    experts_TX: Tensor,
    gate_up: Packed,
    down: Packed,
    first_expert: int,
    limit: float,
    ranks: sums.Ranks | None = None,
) -> Tensor:
    """Sum over each token's experts that are held here, [T, H] in the dtype of x; over those of all ranks, where they
    are given.

    first_expert: global number of the first expert here. One expert is dequantized at a time.
    """
    out_TH = torch.zeros(x_TH.shape, dtype=wide(x_TH.dtype), device=x_TH.device)
    for expert in experts_TX.unique().tolist():
        local = expert - first_expert
        if not 0 <= local < len(gate_up.blocks):
            continue
        add_expert(out_TH, x_TH, weights_TX, experts_TX == expert, gate_up, down, local, limit)
    return sums.over(ranks, out_TH.to(x_TH.dtype))


def add_expert(
    out_TH: Tensor,
    x_TH: Tensor,
    weights_TX: Tensor,
    chosen_TX: Tensor,
    gate_up: Packed,
    down: Packed,
    place: int,
    limit: float,
) -> None:
    """Add to out, in its own precision, what the expert at `place` of gate_up and down makes of the tokens that chose
    it. chosen_TX: bool."""
    linear = torch.nn.functional.linear
    rows, column = chosen_TX.nonzero(as_tuple=True)
    weight = _weight(gate_up, place, x_TH)
    inner = swiglu(linear(x_TH[rows], weight, gate_up.bias[place]), limit)
    weight = _weight(down, place, x_TH)
    y = linear(inner, weight, down.bias[place])
    out_TH.index_add_(0, rows, y.to(out_TH.dtype) * weights_TX[rows, column, None])


def _weight(packed: Packed, place: int, x_TH: Tensor) -> Tensor:
    """Of the expert at `place`, which may wait in host memory, as x wants it."""
    blocks, scales = (part[place].to(x_TH.device) for part in (packed.blocks, packed.scales))
    return dequantize(blocks, scales, x_TH.dtype)

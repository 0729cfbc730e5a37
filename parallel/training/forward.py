"""The forward pass for training: a pack of documents in, last hidden states out. The mathematics of a layer are the
functions that serving calls; a test holds the two passes equal.

T tokens, H hidden, N query heads, K KV heads, D head_dim, X experts a token, E experts.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.rope import concentration, inverse_frequencies, rotation
from ..planning.spec import LayerKind, Spec
from .attention import Attention
from .batch import Pack
from .loss import cross_entropy
from .model import Layer, Model
from .operations import PLAIN, Operations


@dataclass(frozen=True)
class Precision:
    """compute: of products and what they read. residual: of the hidden state between half-layers."""

    compute: torch.dtype
    residual: torch.dtype


@dataclass(frozen=True)
class Inputs:
    """What the model sees of a pack. tokens: their ids [T], or where the embedding is frozen their rows of it [T, H].
    turn: cos and sin [T, D / 2]. masks: as `attention` has prepared them."""

    tokens: Tensor
    turn: tuple[Tensor, Tensor]
    masks: Mapping[LayerKind, Any]


def inputs_of(spec: Spec, model: Model, pack: Pack, attention: Attention) -> Inputs:
    device = pack.positions_T.device
    turn = rotation(pack.positions_T, inverse_frequencies(spec).to(device), concentration(spec))
    windows: dict[LayerKind, int | None] = {"window": spec.window_tokens, "full": None}
    masks: dict[LayerKind, Any] = {
        kind: attention.prepare(pack.bounds, tokens, device)
        for kind, tokens in windows.items()
        if kind in spec.layer_kinds
    }
    trained = model.embed_VH.requires_grad
    tokens = pack.tokens_T.to(device) if trained else embedded(model.embed_VH, pack.tokens_T, device)
    return Inputs(tokens, turn, masks)


def embedded(embed_VH: Tensor, tokens_T: Tensor, device: torch.device) -> Tensor:
    """Rows [T, H] on `device` of a frozen embedding in host memory, as the tokens are."""
    # torch keeps pinned memory until its copy has been made
    rows_TH = torch.empty((len(tokens_T), embed_VH.shape[1]), dtype=embed_VH.dtype, pin_memory=device.type == "cuda")
    return torch.index_select(embed_VH, 0, tokens_T, out=rows_TH).to(device, non_blocking=True)


def forward(
    spec: Spec,
    model: Model,
    inputs: Inputs,
    attention: Attention,
    precision: Precision,
    recompute: bool = True,
    ops: Operations = PLAIN,
) -> tuple[Tensor, Tensor]:
    """(normalised last hidden state [T, H] in the compute dtype, experts of every token [layers, T, X]).

    recompute: keep only what enters each layer and compute the layer again for its gradient.
    """
    rows_TH = inputs.tokens
    if model.embed_VH.requires_grad:
        rows_TH = model.within("embed", lambda: torch.nn.functional.embedding(inputs.tokens, model.embed_VH))
    residual_TH: Tensor = rows_TH.to(precision.residual)
    experts: list[Tensor] = []
    again = _Again()
    for number, (kind, layer) in enumerate(zip(spec.layer_kinds, model.layers, strict=True)):

        def inside(x_TH: Tensor, layer: Layer = layer, mask: Any = inputs.masks[kind]) -> tuple[Tensor, Tensor]:
            return _layer(spec, layer, x_TH, inputs.turn, attention, mask, ops, precision, wanted=not again.now)

        run = partial(model.within, f"layers.{number}", inside)
        # nothing in a layer draws random numbers, so there is no state to keep for the second time
        result: Any = (
            checkpoint(
                run,
                residual_TH,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), again),
            )
            if recompute
            else run(residual_TH)
        )
        residual_TH, experts_TX = result
        experts.append(experts_TX)
    x_TH: Tensor = model.within(
        "norm", lambda x_TH: ops.add_norm(x_TH, None, model.norm_H, spec.norm_eps, precision.compute)[1], residual_TH
    )
    return x_TH, torch.stack(experts)


def summed_loss(model: Model, pack: Pack, x_TH: Tensor, ops: Operations = PLAIN) -> Tensor:
    """Sum of a pack's weighted losses, fp32. x_TH: from `forward`."""
    loss: Tensor = model.within(
        "head",
        lambda x_RH: cross_entropy(x_RH, model.head_VH, pack.targets_R, pack.weights_R, ops.slopes),
        x_TH[pack.learnt_R],
    )
    return loss


def loads(spec: Spec, experts_LTX: Tensor) -> Tensor:
    """Tokens of each expert [layers, E], fp32; the host does not wait for it."""
    chosen = experts_LTX.flatten(1)
    return chosen.new_zeros((spec.layers, spec.experts), dtype=torch.float32).scatter_add_(
        1, chosen, torch.ones_like(chosen, dtype=torch.float32)
    )


def _layer(
    spec: Spec,
    layer: Layer,
    residual_TH: Tensor,
    turn: tuple[Tensor, Tensor],
    attention: Attention,
    mask: Any,
    ops: Operations,
    precision: Precision,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """(hidden state, experts of every token). wanted: whether anybody reads the hidden state."""
    _, x_TH = ops.add_norm(residual_TH, None, layer.attn_norm_H, spec.norm_eps, precision.compute)
    parts = [part(x_TH) for part in layer.qkv]
    qkv_TQ = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    delta_TH = layer.o(attention.attend(qkv_TQ, turn, layer.sinks_N, mask))
    residual_TH, x_TH = ops.add_norm(residual_TH, delta_TH, layer.mlp_norm_H, spec.norm_eps, precision.compute)
    weights_TX, experts_TX = ops.route(x_TH, layer.router_EH, layer.router_bias_E, spec.experts_per_token)
    delta_TH = ops.mix(layer.gate_up, layer.down, x_TH, weights_TX, experts_TX, spec.swiglu_limit, wanted)
    return residual_TH + delta_TH.to(residual_TH.dtype), experts_TX


class _Again:
    """Entered while a layer is computed a second time, for its gradients."""

    def __init__(self) -> None:
        self.now = False

    def __enter__(self) -> None:
        self.now = True

    def __exit__(self, *_: object) -> None:
        self.now = False

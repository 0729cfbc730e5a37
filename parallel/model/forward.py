"""The forward pass for serving, up to the head: one step of tokens in, rows of hidden states out.

Reads top to bottom. Every rank runs the same lines on its own share of the weights; what each holds is added up once a
half-layer. Knows nothing of requests or of how pages were handed out.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..kernels import Operations
from ..kernels.batch import Batch
from ..kernels.rope import concentration
from ..planning.spec import Spec
from .comm import Comm
from .weights import Layer, Weights


def hidden_states(
    spec: Spec,
    weights: Weights,
    layers: Iterable[Layer],
    ops: Operations,
    comm: Comm,
    frequencies: Tensor,
    kv_LPCSKD: Tensor,
    batch: Batch,
    residual_dtype: torch.dtype,
) -> Tensor:
    """What the head is multiplied with, [S, H] in the plan's dtype, of the rows in batch.wanted_S. layers: those of
    `weights`, or others in their place.

    frequencies: rope.inverse_frequencies(spec) on the device. kv_LPCSKD: the pool [layers of a kind, pages, 2,
    page_tokens, K, D]; window layer i and full layer i share index i of dim 0, their pages never overlap. Written in
    place.
    """
    dtype = weights.embed_VH.dtype
    embedded_TH, turn = ops.embed(
        batch.tokens_T, batch.positions_T, weights.embed_VH, weights.first_token, frequencies, concentration(spec)
    )
    residual_TH = comm.all_reduce(embedded_TH).to(residual_dtype)
    delta_TH = None
    seen = {"window": 0, "full": 0}
    for kind, layer in zip(spec.layer_kinds, layers, strict=True):
        kv_PCSKD, pages = kv_LPCSKD[seen[kind]], batch.pages[kind]
        seen[kind] += 1
        residual_TH, q_TND = ops.norm_qkv_write(
            residual_TH,
            delta_TH,
            layer.attn_norm_H,
            spec.norm_eps,
            dtype,
            layer.qkv_QH,
            layer.qkv_bias_Q,
            turn,
            kv_PCSKD,
            pages.slots_T,
        )
        attended_TQ = ops.attend(q_TND, kv_PCSKD, layer.sinks_N, batch, pages)
        delta_TH = ops.linear(attended_TQ, layer.out_HQ, layer.out_bias_H, comm)
        residual_TH, delta_TH = ops.norm_experts(
            residual_TH,
            delta_TH,
            layer.mlp_norm_H,
            spec.norm_eps,
            dtype,
            layer.router_EH,
            layer.router_bias_E,
            spec.experts_per_token,
            layer.gate_up,
            layer.down,
            weights.first_expert,
            spec.swiglu_limit,
            comm,
        )
    _, x_TH = ops.add_norm(residual_TH, delta_TH, weights.norm_H, spec.norm_eps, dtype)
    return x_TH if batch.wanted_S is None else x_TH[batch.wanted_S]

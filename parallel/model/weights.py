"""One rank's share of the model as tensors. Plain values: no file, no rank number, no device logic.

Shapes are this rank's own: they follow from the shard table and say all that the forward pass needs to know about cuts.
"""

from dataclasses import dataclass

from torch import Tensor

from ..kernels.experts import Packed
from ..kernels.weight_only import Weight


@dataclass(frozen=True)
class Layer:
    attn_norm_H: Tensor  # norms and sinks are fp32, everything else that is not packed has the plan's dtype
    qkv_QH: Weight  # rows of q, then k, then v
    qkv_bias_Q: Tensor
    sinks_N: Tensor
    out_HQ: Weight
    out_bias_H: Tensor
    mlp_norm_H: Tensor
    router_EH: Tensor  # all experts of the model: every rank routes for itself
    router_bias_E: Tensor
    gate_up: Packed
    down: Packed


@dataclass(frozen=True)
class Weights:
    embed_VH: Weight
    layers: tuple[Layer, ...]
    norm_H: Tensor
    head_VH: Weight
    first_token: int  # token id of the first vocabulary row held here
    first_expert: int  # number of the first expert held here

"""What a run begins with: the frozen weights of a checkpoint on one device, or all of its weights as parameters.

Knows nothing of settings, data or the loop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.mxfp4 import dequantize
from ..model.checkpoint import load
from ..model.weights import Weights
from ..planning.headers import check_inventory, read_inventory
from ..planning.plan import DType
from ..planning.shards import Mesh, table
from ..planning.spec import Spec

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class OneDevice:
    """All of the model on one device, as `checkpoint.load` wants to be told."""

    spec: Spec
    dtype: DType
    mesh: Mesh = Mesh()
    expert_order: tuple[tuple[int, ...], ...] = ()


def load_frozen(spec: Spec, folder: Path, dtype: DType, device: torch.device, progress: Progress) -> Weights:
    """Weights in the compute dtype, experts packed as they are in the files. Raises UserError for a broken folder."""
    inventory = read_inventory(folder)
    check_inventory(spec, inventory, folder)
    return load(OneDevice(spec, dtype), 0, inventory, device, progress)


def parameter_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every trained tensor of a full run: the shard table's, with one NAME.weight [E, O, I] for the
    packed pair NAME.blocks and NAME.scales."""
    shapes = {}
    for row in table(spec):
        if row.name.endswith(".blocks"):
            shapes[row.name.removesuffix("blocks") + "weight"] = (*row.shape[:-2], row.shape[-2] * row.shape[-1] * 2)
        elif not row.name.endswith(".scales"):
            shapes[row.name] = row.shape
    return shapes


def load_parameters(spec: Spec, folder: Path, device: torch.device, progress: Progress) -> dict[str, Tensor]:
    """Every weight of the checkpoint as an fp32 leaf, experts dequantized, by the names of `parameter_shapes`."""
    weights = load_frozen(spec, folder, "fp32", device, progress)
    parameters = {"embed": weights.embed_VH, "norm": weights.norm_H, "head": weights.head_VH}
    widths = (spec.heads * spec.head_dim, *[spec.kv_heads * spec.head_dim] * 2)
    for number, layer in enumerate(weights.layers):
        rows, biases = layer.qkv_QH.split(widths), layer.qkv_bias_Q.split(widths)
        here = {f"{name}.weight": part for name, part in zip("qkv", rows, strict=True)}
        here |= {f"{name}.bias": part for name, part in zip("qkv", biases, strict=True)}
        here |= {
            "attn_norm": layer.attn_norm_H,
            "sinks": layer.sinks_N,
            "o.weight": layer.out_HQ,
            "o.bias": layer.out_bias_H,
            "mlp_norm": layer.mlp_norm_H,
            "router.weight": layer.router_EH,
            "router.bias": layer.router_bias_E,
        }
        for name, packed in (("gate_up", layer.gate_up), ("down", layer.down)):
            here[f"{name}.weight"] = dequantize(packed.blocks, packed.scales, torch.float32)
            here[f"{name}.bias"] = packed.bias
        parameters |= {f"layers.{number}.{name}": tensor for name, tensor in here.items()}
    return {name: parameters[name].clone().requires_grad_() for name in parameter_shapes(spec)}

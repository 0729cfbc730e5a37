"""The model as training sees it: the tensors of one device, each with what is trained of it.

Knows two ways to train: low-rank additions to frozen weights (`lora_model`), and all weights (`full_model`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..kernels.weight_only import Weight
from ..model.weights import Weights
from ..planning.spec import Spec
from .products import Dense, Experts, Linear, LowRank

ATTENTION, EXPERTS = ("q", "k", "v", "o"), ("gate_up", "down")


@dataclass(frozen=True)
class Layer:
    attn_norm_H: Tensor
    qkv: tuple[Linear, ...]  # their results side by side
    o: Linear
    sinks_N: Tensor
    mlp_norm_H: Tensor
    router_EH: Tensor
    router_bias_E: Tensor
    gate_up: Experts
    down: Experts


def directly(part: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """For weights that are always there."""
    return function(*arguments)


@dataclass(frozen=True)
class Model:
    """within: (part, function, arguments) -> what the function returns, called while the weights of `part_of` that name
    are on this device. Whoever keeps weights elsewhere brings them for the call and for its gradient."""

    embed_VH: Tensor
    layers: tuple[Layer, ...]
    norm_H: Tensor
    head_VH: Tensor
    within: Callable[..., Any] = directly


def part_of(name: str) -> str:
    """The part of the model that a tensor of this name is needed in: "layers.3", "embed", "norm" or "head"."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "layers" else words[0]


def parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Part of the model -> the names in it, in the order of `names`."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(part_of(name), []).append(name)
    return found


def lora_model(spec: Spec, weights: Weights, added: Mapping[str, LowRank]) -> Model:
    """Frozen `weights` of a single rank, and what is added to them, by name: "layers.3.q", "layers.3.down"."""
    layers = []
    for number, layer in enumerate(weights.layers):
        pairs = {name: added.get(f"layers.{number}.{name}") for name in (*ATTENTION, *EXPERTS)}
        q_k_v = tuple(pair for name in "qkv" if (pair := pairs[name]) is not None)
        o = tuple(pair for pair in (pairs["o"],) if pair is not None)
        layers.append(
            Layer(
                attn_norm_H=layer.attn_norm_H,
                qkv=(Linear(whole(layer.qkv_QH), layer.qkv_bias_Q, q_k_v),),
                o=Linear(whole(layer.out_HQ), layer.out_bias_H, o),
                sinks_N=layer.sinks_N,
                mlp_norm_H=layer.mlp_norm_H,
                router_EH=layer.router_EH,
                router_bias_E=layer.router_bias_E,
                gate_up=Experts(layer.gate_up, pairs["gate_up"]),
                down=Experts(layer.down, pairs["down"]),
            )
        )
    return Model(whole(weights.embed_VH), tuple(layers), weights.norm_H, whole(weights.head_VH))


def whole(weight: Weight) -> Tensor:
    """Training reads checkpoints as they are."""
    assert isinstance(weight, Tensor)
    return weight


def full_model(spec: Spec, parameters: Mapping[str, Tensor]) -> Model:
    """All of it trained. parameters: fp32, by the names of the shard table, where the packed pair NAME.blocks and
    NAME.scales is one tensor NAME.weight [E, O, I]."""
    layers = []
    for number in range(spec.layers):
        here = {
            name.removeprefix(prefix): tensor
            for prefix in (f"layers.{number}.",)
            for name, tensor in parameters.items()
            if name.startswith(prefix)
        }
        q, k, v, o = (Linear(here[f"{name}.weight"], here[f"{name}.bias"]) for name in ATTENTION)
        gate_up, down = (Experts(Dense(here[f"{name}.weight"], here[f"{name}.bias"], True)) for name in EXPERTS)
        layers.append(
            Layer(
                attn_norm_H=here["attn_norm"],
                qkv=(q, k, v),
                o=o,
                sinks_N=here["sinks"],
                mlp_norm_H=here["mlp_norm"],
                router_EH=here["router.weight"],
                router_bias_E=here["router.bias"],
                gate_up=gate_up,
                down=down,
            )
        )
    return Model(parameters["embed"], tuple(layers), parameters["norm"], parameters["head"])

"""LoRA adapters: which tensors are trained, how they begin, and their files in PEFT's format.

PEFT (https://github.com/huggingface/peft) adapts experts with `target_parameters`: A is [R * E, I] with an expert's
rows together, B is [O, R * E] with an expert's columns E apart. Here both are [E, R, I] and [E, O, R]. Knows nothing of
optimizers or of when things are saved.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..planning.spec import Spec
from .model import ATTENTION, EXPERTS, parts
from .products import LowRank

Target = Literal["attention", "experts"]
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_MODULES = {name: f"self_attn.{name}_proj" for name in ATTENTION}
# PEFT wraps an experts module once for each of its parameters: the inner wrapper holds gate_up_proj
_WRAPPERS = {"gate_up": "mlp.experts.base_layer", "down": "mlp.experts"}
_PARAMETERS = {"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}


@dataclass(frozen=True)
class Rank:
    """r: inner width. alpha: what is added is alpha / r * B A."""

    r: int
    alpha: float


Ranks = Mapping[Target, Rank]  # of each target that is adapted


def adapted(spec: Spec, ranks: Ranks) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Name of every adapted product, "layers.3.q" for instance -> shapes of its A and B."""
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    widths = {  # in, out
        "q": (spec.hidden, q_width),
        "k": (spec.hidden, kv_width),
        "v": (spec.hidden, kv_width),
        "o": (q_width, spec.hidden),
        "gate_up": (spec.hidden, 2 * spec.intermediate),
        "down": (spec.intermediate, spec.hidden),
    }
    shapes = {}
    for layer in range(spec.layers):
        for name, (columns, rows) in widths.items():
            target = target_of(name)
            if target in ranks:
                lead = (spec.experts,) if target == "experts" else ()
                r = ranks[target].r
                shapes[f"layers.{layer}.{name}"] = ((*lead, r, columns), (*lead, rows, r))
    return shapes


def target_of(name: str) -> Target:
    return "experts" if name.split(".")[-1] in EXPERTS else "attention"


def new_adapter(spec: Spec, ranks: Ranks, seed: int, device: torch.device) -> dict[str, Tensor]:
    """NAME.a and NAME.b of every adapted product, fp32 leaves: A uniform as PEFT draws it, B zero, so that nothing is
    added at first. The draws are made on the CPU: the same seed gives the same adapter on every device."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (a_shape, b_shape) in adapted(spec, ranks).items():
        bound = 1 / math.sqrt(a_shape[-1])
        a = (torch.rand(a_shape, generator=generator) * 2 - 1) * bound
        tensors[f"{name}.a"] = a.to(device).requires_grad_()
        tensors[f"{name}.b"] = torch.zeros(b_shape, device=device).requires_grad_()
    return tensors


def pairs(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, LowRank]:
    """The adapter as the model reads it."""
    names = [name.removesuffix(".a") for name in tensors if name.endswith(".a")]
    found = {}
    for name in names:
        rank = ranks[target_of(name)]
        found[name] = LowRank(tensors[f"{name}.a"], tensors[f"{name}.b"], rank.alpha / rank.r)
    return found


def by_part(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(part of the model, the tensors in it)"""
    for part, names in parts(tensors).items():
        yield part, {name: tensors[name] for name in names}


def parameter_counts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many values are trained of each target."""
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        target = target_of(name.rpartition(".")[0])
        counts[target] = counts.get(target, 0) + tensor.numel()
    return counts


# --- PEFT's format


def to_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and layout of adapter_model.safetensors."""
    return {_peft_name(name): _peft_layout(name, tensor.detach()) for name, tensor in tensors.items()}


def from_peft(stored: Mapping[str, Tensor], spec: Spec, ranks: Ranks) -> dict[str, Tensor]:
    """The inverse of `to_peft`. Raises UserError where a tensor is missing, left over, or of another shape."""
    tensors, left = {}, dict(stored)
    for name, shapes in adapted(spec, ranks).items():
        for letter, shape in zip("ab", shapes, strict=True):
            key = _peft_name(f"{name}.{letter}")
            wanted = tuple(_peft_layout(f"{name}.{letter}", torch.empty(shape, device="meta")).shape)
            tensor = left.pop(key, None)
            if tensor is None or tuple(tensor.shape) != wanted:
                found = "missing" if tensor is None else str(list(tensor.shape))
                raise UserError(f"adapter: {key} is {found}, wanted {list(wanted)}", "is it of another model or rank?")
            if len(shape) == 3:
                experts, r = shape[0], shape[1] if letter == "a" else shape[2]
                split = tensor.view(experts, r, -1) if letter == "a" else tensor.view(-1, r, experts).permute(2, 0, 1)
                tensor = split
            tensors[f"{name}.{letter}"] = tensor.contiguous()
    if left:
        raise UserError(f"adapter: {len(left)} tensors too many, {min(left)} for one", "is it of another model?")
    return tensors


def _peft_name(name: str) -> str:
    _, layer, product, letter = name.split(".")
    inside = _MODULES.get(product) or _WRAPPERS[product]
    return f"base_model.model.model.layers.{layer}.{inside}.lora_{letter.upper()}.weight"


def _peft_layout(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() == 2:
        return tensor.contiguous()
    if name.endswith(".a"):
        return tensor.flatten(0, 1).contiguous()
    return tensor.permute(1, 2, 0).flatten(1).contiguous()  # [O, R, E]


def peft_config(ranks: Ranks, base_model: str) -> dict[str, Any]:
    """adapter_config.json: what PEFT's LoraConfig reads back."""
    first = ranks.get("attention") or ranks["experts"]
    parameters = sorted(_PARAMETERS.values()) if "experts" in ranks else []
    of_experts = {name: ranks["experts"] for name in parameters}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{name}_proj" for name in ATTENTION] if "attention" in ranks else [],
        "target_parameters": parameters or None,
        "rank_pattern": {name: rank.r for name, rank in of_experts.items()},
        "alpha_pattern": {name: rank.alpha for name, rank in of_experts.items()},
    }


def ranks_of(config: Mapping[str, Any]) -> Ranks:
    """The inverse of `peft_config`, for configurations that it wrote."""
    ranks: dict[Target, Rank] = {}
    if config["target_modules"]:
        ranks["attention"] = Rank(config["r"], config["lora_alpha"])
    for name in config["target_parameters"] or ():
        ranks["experts"] = Rank(config["rank_pattern"][name], config["alpha_pattern"][name])
    return ranks


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks, base_model: str) -> None:
    save_file(to_peft(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(peft_config(ranks, base_model), indent=1, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_adapter(folder: Path, spec: Spec) -> tuple[dict[str, Tensor], Ranks]:
    """(tensors as `new_adapter` names them, ranks) of a folder that `write_adapter` wrote."""
    ranks = ranks_of(json.loads((folder / CONFIG_FILE).read_text("utf-8")))
    return from_peft(load_file(folder / WEIGHTS_FILE), spec, ranks), ranks

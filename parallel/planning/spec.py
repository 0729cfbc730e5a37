"""The numbers of one gpt-oss architecture, read from a checkpoint's config.json.

Knows the two published sizes by heart, so that they can be planned for with no weights and no network. Does not know
where tensors live (`shards`) or what they cost (`memory`).
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError

MXFP4_BLOCK = 32  # FP4 values that share one scale (OCP Microscaling formats, v1.0, table 1)

LayerKind = Literal["window", "full"]


@dataclass(frozen=True)
class Spec:
    """One architecture. Counts are counts, widths are elements."""

    layers: int
    hidden: int
    intermediate: int
    experts: int
    experts_per_token: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window_tokens: int  # a window layer sees this many tokens, the current one included
    layer_kinds: tuple[LayerKind, ...]
    max_context_tokens: int
    rope_theta: float
    yarn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_original_tokens: int
    norm_eps: float
    swiglu_limit: float

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head: with it and their sinks they are the unit that attention is cut in."""
        return self.heads // self.kv_heads

    @property
    def hidden_blocks(self) -> int:
        return self.hidden // MXFP4_BLOCK

    @property
    def intermediate_blocks(self) -> int:
        return self.intermediate // MXFP4_BLOCK

    def layers_of(self, kind: LayerKind) -> int:
        return self.layer_kinds.count(kind)


def _published(layers: int, experts: int) -> Spec:
    """gpt-oss-20b and 120b differ in depth and experts alone (their config.json on the hub)."""
    return Spec(
        layers=layers,
        hidden=2880,
        intermediate=2880,
        experts=experts,
        experts_per_token=4,
        heads=64,
        kv_heads=8,
        head_dim=64,
        vocab=201088,
        window_tokens=128,
        layer_kinds=alternating_kinds(layers),
        max_context_tokens=131072,
        rope_theta=150000.0,
        yarn_factor=32.0,
        yarn_beta_fast=32.0,
        yarn_beta_slow=1.0,
        yarn_original_tokens=4096,
        norm_eps=1e-5,
        swiglu_limit=7.0,
    )


def alternating_kinds(layers: int) -> tuple[LayerKind, ...]:
    """Even layers see the window, odd layers see everything (gpt-oss model card, section 2.2)."""
    return tuple("window" if i % 2 == 0 else "full" for i in range(layers))


PUBLISHED: dict[str, Spec] = {
    "openai/gpt-oss-20b": _published(layers=24, experts=32),
    "openai/gpt-oss-120b": _published(layers=36, experts=128),
}

_KINDS: dict[str, LayerKind] = {"sliding_attention": "window", "full_attention": "full"}
_KIND_NAMES = {kind: name for name, kind in _KINDS.items()}


def read_config(path: Path) -> Spec:
    """Spec of the checkpoint whose config.json is `path`.

    Raises UserError if the file is missing, is no JSON object, or describes anything but gpt-oss.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config.json in {path.parent}", "MODEL is a checkpoint folder, a hub id, or tiny") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}", "fetch the file again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: a JSON {type(config).__name__}, not an object", "fetch the file again")
    return spec_from_config(config, str(path))


def spec_from_config(config: dict[str, Any], where: str) -> Spec:
    """Spec from the fields of a published config.json (transformers 4 and 5 spell the RoPE field differently).

    where: the file's name for error messages.
    """
    if config.get("model_type") != "gpt_oss":
        raise UserError(
            f"{where}: model_type is {config.get('model_type')!r}, not 'gpt_oss'",
            "only gpt-oss checkpoints can be run",
        )

    def get(table: dict[str, Any], key: str, kind: type = int) -> Any:
        value: Any = table.get(key)
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or isinstance(value, bool) or (kind in (int, float) and value <= 0):
            raise UserError(f"{where}: {key} is {value!r}, wanted a positive {kind.__name__}", "fetch the file again")
        return kind(value)

    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type") != "yarn" or rope.get("truncate", True) is not False:
        raise UserError(
            f"{where}: RoPE is {rope!r}, wanted rope_type 'yarn' with truncate false",
            "only gpt-oss checkpoints can be run",
        )
    layers = get(config, "num_hidden_layers")
    kind_names = config.get("layer_types") or [_KIND_NAMES[kind] for kind in alternating_kinds(layers)]
    if not isinstance(kind_names, list) or len(kind_names) != layers or any(name not in _KINDS for name in kind_names):
        raise UserError(f"{where}: layer_types does not name {layers} layers", f"each is one of {', '.join(_KINDS)}")
    spec = Spec(
        layers=layers,
        hidden=get(config, "hidden_size"),
        intermediate=get(config, "intermediate_size"),
        experts=get(config, "num_local_experts"),
        experts_per_token=get(config, "num_experts_per_tok"),
        heads=get(config, "num_attention_heads"),
        kv_heads=get(config, "num_key_value_heads"),
        head_dim=get(config, "head_dim"),
        vocab=get(config, "vocab_size"),
        window_tokens=get(config, "sliding_window"),
        layer_kinds=tuple(_KINDS[name] for name in kind_names),
        max_context_tokens=get(config, "max_position_embeddings"),
        rope_theta=get(rope if "rope_theta" in rope else config, "rope_theta", float),
        yarn_factor=get(rope, "factor", float),
        yarn_beta_fast=get(rope, "beta_fast", float),
        yarn_beta_slow=get(rope, "beta_slow", float),
        yarn_original_tokens=get(rope, "original_max_position_embeddings"),
        norm_eps=get(config, "rms_norm_eps", float),
        swiglu_limit=get(config, "swiglu_limit", float),
    )
    for name, width, unit in (
        ("hidden_size", spec.hidden, MXFP4_BLOCK),
        ("intermediate_size", spec.intermediate, MXFP4_BLOCK),
        ("num_attention_heads", spec.heads, spec.kv_heads),
        ("head_dim", spec.head_dim, 2),
    ):
        if width % unit:
            raise UserError(f"{where}: {name} {width} is no multiple of {unit}", "such a checkpoint cannot be run")
    if spec.experts_per_token > spec.experts:
        raise UserError(
            f"{where}: {spec.experts_per_token} experts a token of {spec.experts}",
            "such a checkpoint cannot be run",
        )
    return spec


def config_from_spec(spec: Spec, *, eos_token_id: int = 200002, pad_token_id: int = 199999) -> dict[str, Any]:
    """The published config.json for `spec`: what `spec_from_config` and transformers (4 and 5) read back."""
    rope = {
        "beta_fast": spec.yarn_beta_fast,
        "beta_slow": spec.yarn_beta_slow,
        "factor": spec.yarn_factor,
        "original_max_position_embeddings": spec.yarn_original_tokens,
        "rope_type": "yarn",
        "truncate": False,
    }
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": eos_token_id,
        "experts_per_token": spec.experts_per_token,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "initial_context_length": spec.yarn_original_tokens,
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate,
        "layer_types": [_KIND_NAMES[kind] for kind in spec.layer_kinds],
        "max_position_embeddings": spec.max_context_tokens,
        "model_type": "gpt_oss",
        "num_attention_heads": spec.heads,
        "num_experts_per_tok": spec.experts_per_token,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "num_local_experts": spec.experts,
        "output_router_logits": False,
        "pad_token_id": pad_token_id,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": spec.norm_eps,
        "rope_scaling": rope,
        "rope_theta": spec.rope_theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": spec.window_tokens,
        "swiglu_limit": spec.swiglu_limit,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": spec.vocab,
    }


def spec_to_json(spec: Spec) -> dict[str, Any]:
    """Plain JSON with the field names of Spec; `spec_from_json` reads it back."""
    return dataclasses.asdict(spec) | {"layer_kinds": list(spec.layer_kinds)}


def spec_from_json(fields: dict[str, Any]) -> Spec:
    values: dict[str, Any] = fields | {"layer_kinds": tuple(fields["layer_kinds"])}
    return Spec(**values)

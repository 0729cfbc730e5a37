"""What a DeepSpeed configuration asks for, and what in it training here cannot honour. No torch and no DeepSpeed.

A configuration is DeepSpeed's own JSON (https://www.deepspeed.ai/docs/config-json/). What the settings of a run say
already must be left out of it, or "auto"; what would silently train something else is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .plan import DType

_SAID_ELSEWHERE = {
    "optimizer": "learning_rate, beta1, beta2 and weight_decay",
    "scheduler": "schedule, warmup_fraction and floor_fraction",
    "train_batch_size": "packs_per_step",
    "train_micro_batch_size_per_gpu": "packs_per_step",
    "gradient_accumulation_steps": "packs_per_step",
    "gradient_clipping": "clip",
    "checkpoint": "save_every and keep_last",
    "tensorboard": "trackers",
    "wandb": "trackers",
    "csv_monitor": "trackers",
    "comet": "trackers",
}
_REFUSED = {
    "fp16": "gpt-oss overflows it; dtype=bf16 or fp32",
    "amp": "dtype=bf16 or fp32",
    "torch_autocast": "dtype=bf16 or fp32",
    "expert_parallel": "AutoEP knows no biases of experts: it would train another function",
    "tensor_parallel": "gpt-oss has no plan for AutoTP",
    "sequence_parallel_size": "documents of a pack are not cut over ranks",
    "pipeline": "layers are not cut over ranks",
    "sparse_attention": "attention is gpt-oss's own",
    "compression_training": "experts are trained as the MXFP4 values that are stored, without it",
    "elasticity": "a run goes on with any number of ranks, without it",
}
_ZERO_REFUSED = {
    "leaf_module": "whole layers are the leaves here, with all of their experts",
    "zero_quantized_weights": "weights would be rounded on their way",
    "zero_quantized_gradients": "gradients would be rounded on their way",
    "zero_quantized_nontrainable_weights": "weights would be rounded on their way",
    "zero_hpz_partition_size": "checkpoints by parameter name do not know it",
    "mics_shard_size": "checkpoints by parameter name do not know it",
    "zenflow": "its late updates are not those of AdamW",
}
_OFFLOAD_KEYS = ("offload_optimizer", "offload_param")


@dataclass(frozen=True)
class Zero:
    """stage: 0 replicates all; 1 cuts moments and fp32 values over ranks; 2 gradients too; 3 weights too
    (https://arxiv.org/abs/1910.02054). on_host: share of moments and fp32 values that the host keeps.
    weights_on_host: with stage 3. pinned: host memory of gradients, which torch rounds up to powers of two."""

    stage: int
    on_host: float
    weights_on_host: bool
    pinned: bool = False


def read_zero(config: Mapping[str, Any], dtype: DType) -> Zero:
    """Raises UserError for what cannot be honoured, by the name of its key."""
    for key, setting in _SAID_ELSEWHERE.items():
        if config.get(key, "auto") != "auto":
            raise UserError(f"deepspeed: {key} is not taken from it", f'set {setting}; leave {key} out, or "auto"')
    for key, why in _REFUSED.items():
        value = config.get(key)
        asked = value.get("enabled", True) if isinstance(value, Mapping) else value
        if _asked(asked):
            raise UserError(f"deepspeed: {key} cannot be used here", why)
    bf16 = config.get("bf16")
    wanted = bf16.get("enabled", "auto") if isinstance(bf16, Mapping) else "auto"
    if wanted not in ("auto", dtype == "bf16"):
        raise UserError(f"deepspeed: bf16.enabled is {wanted}, and dtype={dtype}", 'make it "auto", or set dtype')
    if dtype == "fp16":
        raise UserError("deepspeed with dtype=fp16", "dtype=bf16 or fp32")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise UserError("deepspeed: zero_optimization is no object", '{"zero_optimization": {"stage": 2}}')
    for key, why in _ZERO_REFUSED.items():
        if _asked(zero.get(key)):
            raise UserError(f"deepspeed: zero_optimization.{key} cannot be used here", why)
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"deepspeed: zero_optimization.stage is {stage!r}", "0, 1, 2 or 3")
    if stage == 0 and dtype == "bf16":
        raise UserError("deepspeed: stage 0 with dtype=bf16 keeps no fp32 values to update", "stage 1, 2 or 3")
    devices = {key: _device(zero, key) for key in _OFFLOAD_KEYS}
    if devices["offload_optimizer"] and stage == 0:
        raise UserError("deepspeed: offload_optimizer with stage 0", "stage 1, 2 or 3")
    if devices["offload_param"] and stage != 3:
        raise UserError(f"deepspeed: offload_param with stage {stage}", "stage 3")
    optimizer = zero.get("offload_optimizer") or {}
    ratio = optimizer.get("ratio", 1.0)
    if ratio != 1.0 and stage != 3:
        raise UserError(f"deepspeed: offload_optimizer.ratio with stage {stage}", "stage 3")
    if optimizer.get("super_offload"):
        raise UserError("deepspeed: offload_optimizer.super_offload cannot be used here", "ratio does without it")
    on_host = devices["offload_optimizer"]
    pinned = on_host and bool(optimizer.get("pin_memory", False))
    return Zero(stage, float(ratio) if on_host else 0.0, devices["offload_param"], pinned)


def _asked(value: Any) -> bool:
    """Sizes of 1 and less are DeepSpeed's way to say no."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value > 1
    return value not in (None, False, "auto")


def _device(zero: Mapping[str, Any], key: str) -> bool:
    """Whether a part lies in host memory."""
    where = (zero.get(key) or {}).get("device", "none")
    if where not in ("cpu", "none"):
        raise UserError(f"deepspeed: {key}.device is {where!r}", "cpu or none")
    return where == "cpu"

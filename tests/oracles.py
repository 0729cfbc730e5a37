"""Two implementations of gpt-oss that import nothing of ours, and the checkpoints to run them on.

transformers' GptOss reads the published layout. OpenAI's own torch model comes as the wheel gpt-oss from PyPI,
unpacked and not installed; it reads the "original" layout, so the tensors are renamed and q, k, v fused first.
"""

import functools
import importlib
import json
import subprocess
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

OPENAI_WHEEL = "gpt-oss==0.0.9"
QUERIES = 1024  # that attention is computed for together: scores of 64 heads over 32,768 keys are 9 GB in fp32


def load_transformers(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """GptOssForCausalLM with dequantized experts, everything in `dtype`."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=Mxfp4Config(dequantize=True),
            dtype=torch.bfloat16,
            attn_implementation="eager",
            device_map={"": device} if device != "cpu" else None,  # dequantizes there: minutes less for a whole model
        )
    # 5.17 keeps the dequantized experts in bf16 whatever dtype says: convert after loading
    return model.to(device=device, dtype=dtype).eval()


@dataclass(frozen=True)
class Run:
    """Over one sequence: logits [tokens, vocab]; the experts of every token [layers, tokens, experts a token]; and how
    far the last chosen expert's router logit is from the first one left out [layers, tokens]."""

    logits: Tensor
    routes: Tensor
    margins: Tensor


def transformers_run(folder: Path, tokens: list[int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Run:
    (run,) = transformers_runs(folder, [tokens], [list(range(len(tokens)))], dtype, device)
    return run


@torch.no_grad()
def transformers_runs(
    folder: Path, sequences: list[list[int]], wanted: list[list[int]], dtype: torch.dtype, device: str
) -> list[Run]:
    """Of each sequence by itself, at its wanted places."""
    from transformers.models.gpt_oss import modeling_gpt_oss

    model = load_transformers(folder, dtype, device)
    routes: list[Tensor] = []
    margins: list[Tensor] = []

    def record(module, inputs, outputs) -> None:
        logits, _, chosen = outputs
        routes.append(chosen)
        best = logits.sort(dim=-1, descending=True).values
        left_out = best[..., chosen.shape[-1] :]  # nothing, where all experts are chosen
        margins.append(best[..., chosen.shape[-1] - 1] - left_out[..., 0] if left_out.numel() else best[..., 0] * 0)

    for module in model.modules():
        if isinstance(module, modeling_gpt_oss.GptOssTopKRouter):
            module.register_forward_hook(record)
    in_parts = functools.partial(_eager_in_parts, modeling_gpt_oss.eager_attention_forward)
    runs = []
    with mock.patch.object(modeling_gpt_oss, "eager_attention_forward", in_parts):
        for tokens, places in zip(sequences, wanted, strict=True):
            routes.clear()
            margins.clear()
            at = torch.tensor(places, device=device)
            logits = model(torch.tensor([tokens], device=device), use_cache=False, logits_to_keep=at).logits[0]
            chosen = torch.stack([part.flatten(0, -2)[at] for part in routes])
            runs.append(Run(logits, chosen, torch.stack([part.flatten()[at] for part in margins])))
    return runs


def _eager_in_parts(
    eager, module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **others
) -> tuple[Tensor, None]:
    """transformers' own attention, some queries at a time and over no keys that the mask hides from all of these: each
    of them would have the weight exp(-inf) = 0. All scores of 32,768 tokens together would be 275 GB."""
    parts = []
    for start in range(0, query.shape[2], QUERIES):
        part = slice(start, start + QUERIES)
        mask = attention_mask[..., part, :]
        seen = (mask > torch.finfo(mask.dtype).min / 2).flatten(0, -2).any(0).nonzero()
        keys = slice(int(seen[0]), int(seen[-1]) + 1)
        given = query[:, :, part], key[:, :, keys], value[:, :, keys], mask[..., keys]
        parts.append(eager(module, *given, scaling, **others)[0])
    return torch.cat(parts, dim=1), None


@torch.no_grad()
def transformers_greedy(folder: Path, tokens: list[int], new: int) -> list[int]:
    model = load_transformers(folder)
    prompt = torch.tensor([tokens])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=[],
        )
    return out[0, len(tokens) :].tolist()


@functools.cache
def openai_module(cache: Path):
    """gpt_oss.torch.model from the unpacked wheel; OSError if it cannot be fetched."""
    if not list(cache.glob("*.whl")):
        # the wheel says Python >= 3.12, but the part used here runs on 3.11
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", "3.12", "-d", str(cache), OPENAI_WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{OPENAI_WHEEL}: {done.stderr.strip().splitlines()[-1]}")
    site = cache / "site"
    if not site.exists():
        with zipfile.ZipFile(next(cache.glob("*.whl"))) as wheel:
            wheel.extractall(site)
    sys.path.insert(0, str(site))
    try:
        return importlib.import_module("gpt_oss.torch.model")
    finally:
        sys.path.remove(str(site))


def to_original_layout(published: Path, original: Path) -> None:
    """Rename the published tensors to OpenAI's own names and fuse q, k, v."""
    config = json.loads((published / "config.json").read_text("utf-8"))
    with safe_open(published / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    out = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "unembedding.weight": tensors["lm_head.weight"],
        "norm.scale": tensors["model.norm.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        theirs, block = f"model.layers.{layer}.", f"block.{layer}."
        attention, experts = theirs + "self_attn.", theirs + "mlp.experts."
        for part in ("weight", "bias"):
            out[block + f"attn.qkv.{part}"] = torch.cat([tensors[attention + f"{x}_proj.{part}"] for x in "qkv"])
            out[block + f"attn.out.{part}"] = tensors[attention + f"o_proj.{part}"]
            out[block + f"mlp.gate.{part}"] = tensors[theirs + f"mlp.router.{part}"]
        out[block + "attn.norm.scale"] = tensors[theirs + "input_layernorm.weight"]
        out[block + "mlp.norm.scale"] = tensors[theirs + "post_attention_layernorm.weight"]
        out[block + "attn.sinks"] = tensors[attention + "sinks"]
        for number, name in ((1, "gate_up_proj"), (2, "down_proj")):
            out[block + f"mlp.mlp{number}_weight.blocks"] = tensors[experts + name + "_blocks"]
            out[block + f"mlp.mlp{number}_weight.scales"] = tensors[experts + name + "_scales"]
            out[block + f"mlp.mlp{number}_bias"] = tensors[experts + name + "_bias"]
    original.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, original / "model.safetensors")
    fields = {
        "num_hidden_layers": config["num_hidden_layers"],
        "num_experts": config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "swiglu_limit": config["swiglu_limit"],
        "head_dim": config["head_dim"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "sliding_window": config["sliding_window"],
        "initial_context_length": config["initial_context_length"],
        "rope_theta": config["rope_theta"],
        "rope_scaling_factor": config["rope_scaling"]["factor"],
        "rope_ntk_alpha": config["rope_scaling"]["beta_slow"],
        "rope_ntk_beta": config["rope_scaling"]["beta_fast"],
    }
    (original / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def _keep_fp32(module, model) -> None:
    """Everything to fp32; the model's own code casts activations to what its weights are."""
    model.float()
    for part in model.modules():
        if isinstance(part, module.RMSNorm):
            part.scale.data = part.scale.data.float()


@torch.no_grad()
def openai_logits(module, original: Path, tokens: list[int]) -> Tensor:
    """[tokens, vocab] in fp32 from a folder in the original layout."""
    model = module.Transformer.from_checkpoint(str(original), device=torch.device("cpu"))
    _keep_fp32(module, model)
    return model(torch.tensor(tokens))


def same_routes(routes: Tensor, oracle: Run) -> Tensor:
    """[layers, tokens]: whether the same experts were chosen, in whatever order."""
    return (routes.sort(-1).values == oracle.routes.sort(-1).values).all(-1)


def compare(logits: Tensor, routes: Tensor, oracle: Run) -> tuple[float, float]:
    """(largest error on unflipped tokens, share of flipped tokens) against the oracle."""
    same = same_routes(routes, oracle).all(0)  # [tokens]
    error = (logits.float() - oracle.logits).abs().amax(-1)
    return error[same].max().item(), 1 - same.float().mean().item()


def tokens_before_a_tie(routes: Tensor, oracle: Run, tie: float) -> int:
    """How many tokens come before the first whose routing differs from the oracle's: later ones attend to it.

    In exact arithmetic nothing would differ; in fp32 a choice may, if it was a tie: AssertionError unless the margin of
    the first choice that differs is at most `tie`.
    """
    same = same_routes(routes, oracle)
    if same.all():
        return same.shape[1]
    token = int((~same.all(0)).nonzero()[0])
    layer = int((~same[:, token]).nonzero()[0])
    margin = oracle.margins[layer, token].item()
    assert margin <= tie, f"layer {layer} routes token {token} differently, and its margin is {margin:.2e}"
    return token

"""Small random checkpoints and plain one-rank engines for tests."""

import dataclasses
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

import pytest
import torch
from gptoss_launch.configs import make_tiny
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.kernels import PLAIN, Operations
from gptoss_launch.parallel.model.checkpoint import load
from gptoss_launch.parallel.model.comm import Alone
from gptoss_launch.parallel.model.random_checkpoint import write_checkpoint
from gptoss_launch.parallel.planning.headers import check_inventory, read_inventory
from gptoss_launch.parallel.planning.plan import DType, Plan
from gptoss_launch.parallel.planning.spec import Spec, alternating_kinds, read_config

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
TINY = Path(str(files("gptoss_launch.configs") / "tiny"))

_TINY_SPEC = read_config(TINY / "config.json")
SPECS: dict[str, Spec] = {
    "tiny": _TINY_SPEC,
    # 3 MXFP4 blocks a row, three heads a KV group, a window that a short prompt passes
    "three_blocks": dataclasses.replace(
        _TINY_SPEC, hidden=96, intermediate=96, heads=12, kv_heads=4, head_dim=32, window_tokens=16
    ),
    # one layer as the published models have it, but for the number of experts and the vocabulary
    "true_width": dataclasses.replace(
        _TINY_SPEC,
        layers=1,
        layer_kinds=alternating_kinds(1),
        hidden=2880,
        intermediate=2880,
        experts=4,
        heads=64,
        kv_heads=8,
        head_dim=64,
    ),
}


def checkpoint(name: str, base: Path) -> Path:
    """Folder of random weights of SPECS[name], written below `base`; those of tiny are what its training began with."""
    folder = base / name
    if not folder.exists():
        seed = make_tiny.SEED if name == "tiny" else 1
        write_checkpoint(folder, SPECS[name], TINY / "tokenizer.json", seed, device=torch.device("cpu"))
    return folder


def plain_plan(
    folder: Path,
    dtype: DType = "fp32",
    context_tokens: int = 1024,
    step_tokens: int = 512,
    device: Literal["cuda", "cpu"] = "cpu",
    sequences: int = 4,
) -> Plan:
    return Plan(
        model=folder.name,
        checkpoint=str(folder),
        spec=read_config(folder / "config.json"),
        machine="test",
        device=device,
        dp=1,
        ranks=1,
        ep=1,
        dtype=dtype,
        residual_dtype=dtype,
        kv_dtype=dtype,
        kernels="plain",
        offload="none",
        context_tokens=context_tokens,
        sequences=sequences,
        kv_tokens=context_tokens,
        page_tokens=16,
        step_tokens=step_tokens,
        memory=(),
        why=(),
    )


def plain_engine(
    plan: Plan, ops: Operations = PLAIN, decodes: Sequence[int] = (), chunks: Sequence[int] = ()
) -> Engine:
    """decodes, chunks: tokens of its CUDA graphs."""
    assert plan.checkpoint is not None
    folder = Path(plan.checkpoint)
    inventory = read_inventory(folder)
    check_inventory(plan.spec, inventory, folder)
    weights = load(plan, 0, inventory, torch.device(plan.device), layout=ops.layout, kept=plan.kept)
    return Engine(plan, 0, weights, ops, Alone(), (decodes, chunks))


def prompt(spec: Spec, count: int, seed: int = 0) -> list[int]:
    """Token ids below the special tokens of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, (count,), generator=generator).tolist()

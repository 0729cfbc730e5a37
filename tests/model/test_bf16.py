"""bf16 against the fp32 oracle, beside what transformers in bf16 does on the same weights (README, "What equal means").

Teacher-forced on fixed tokens. A token whose routing flipped in some layer says nothing about arithmetic, so it counts
as a flip and not as an error. Bounds: at most 1.5 times transformers' largest error on unflipped tokens, and at most
1.2 times its share of flipped tokens.
"""

import dataclasses
from pathlib import Path

import oracles
import pytest
import torch
from forced import Forced
from gptoss_launch.parallel.kernels import PLAIN, Operations
from gptoss_launch.parallel.kernels.choose import triton_operations
from gptoss_launch.parallel.model.random_checkpoint import write_checkpoint
from gptoss_launch.parallel.planning.spec import PUBLISHED, alternating_kinds
from small_models import SPECS, TINY, checkpoint, plain_engine, plain_plan, prompt
from torch import Tensor


def our_logits(
    folder: Path, tokens: list[int], dtype, device, step_tokens: int, ops: Operations
) -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocab] and experts [layers, tokens, experts a token], step_tokens at a time through the cache."""
    routes: list[Tensor] = []

    def recording_route(*inputs):
        *others, experts = ops.norm_route(*inputs)
        routes.append(experts)
        return *others, experts

    plan = plain_plan(folder, dtype, context_tokens=len(tokens), step_tokens=step_tokens, device=device)
    engine = plain_engine(plan, dataclasses.replace(ops, norm_route=recording_route))
    forced = Forced(engine)
    logits = [
        forced.step(tokens[start : start + step_tokens], slice(None)) for start in range(0, len(tokens), step_tokens)
    ]
    layers = plan.spec.layers
    by_layer = [torch.cat(routes[layer::layers]) for layer in range(layers)]
    return torch.cat(logits), torch.stack(by_layer)


def check(folder: Path, tokens: list[int], device, step_tokens: int, what: str, ops: Operations = PLAIN) -> None:
    with torch.inference_mode():
        oracle = oracles.transformers_run(folder, tokens, torch.float32, device)
        bf16 = oracles.transformers_run(folder, tokens, torch.bfloat16, device)
        theirs = oracles.compare(bf16.logits, bf16.routes, oracle)
        ours = oracles.compare(*our_logits(folder, tokens, "bf16", device, step_tokens, ops), oracle)
    for name, (error, flipped) in (("transformers", theirs), ("gptoss-launch", ours)):
        print(f"{what}, {len(tokens)} tokens, {name}: largest error {error:.3f}, flipped {flipped:.1%}")
    assert ours[0] <= 1.5 * theirs[0]
    assert ours[1] <= 1.2 * theirs[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "three_blocks"])
def test_bf16_on_the_cpu(name: str, tmp_path: Path) -> None:
    check(checkpoint(name, tmp_path), prompt(SPECS[name], 3000), "cpu", 1000, f"{name} on the CPU")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("kernels", "step_tokens"),
    [("plain", 1024), ("plain", 1), ("triton", 1024), ("triton", 48), ("triton", 8), ("triton", 3), ("triton", 1)],
)
def test_bf16_at_the_true_width(kernels: str, step_tokens: int, tmp_path: Path) -> None:
    """Four layers of gpt-oss-20b as published: 32 experts, 201,088 tokens of vocabulary."""
    spec = dataclasses.replace(PUBLISHED["openai/gpt-oss-20b"], layers=4, layer_kinds=alternating_kinds(4))
    write_checkpoint(tmp_path / "20b-4", spec, TINY / "tokenizer.json", 0, torch.device("cuda"))
    what = f"four layers of 20b, {kernels}, {step_tokens} a step"
    ops = triton_operations() if kernels == "triton" else PLAIN
    check(tmp_path / "20b-4", prompt(spec, 1024), "cuda", step_tokens, what, ops)

"""The model against two implementations that share no line with it (README: "What equal means", exact).

fp32 compute on packed weights: every logit within 1e-5 of the largest one, every argmax equal, 64 greedy tokens
identical.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NoReturn

import oracles
import pytest
import torch
from forced import Forced, answers, prefill
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.kernels import PLAIN, experts, mxfp4
from gptoss_launch.parallel.kernels.cpu_products import cpu_operations
from gptoss_launch.parallel.kernels.weight_only import Narrow
from small_models import GPU, SPECS, checkpoint, plain_engine, plain_plan, prompt

# OpenAI's model copies every token's experts in fp32: 400 MB a token at the true width
PROMPT_TOKENS = {"tiny": 140, "three_blocks": 120, "true_width": 12}
GREEDY_TOKENS = 64


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def all_logits(engine, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocab]: the last row of every prefix, one step a token, through the cache."""
    forced = Forced(engine)
    rows = [forced.step(tokens[index : index + 1])[0] for index in range(len(tokens))]
    return torch.stack(rows)


def assert_exact(ours: torch.Tensor, oracle: torch.Tensor, what: str) -> None:
    error = (ours - oracle).abs().max().item() / oracle.abs().max().item()
    print(f"{what}: largest error {error:.2e} of the largest logit, {len(ours)} tokens")
    assert error <= 1e-5
    assert torch.equal(ours.argmax(-1), oracle.argmax(-1))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("name", SPECS)
def test_logits_equal_transformers(name: str, device: Literal["cpu", "cuda"], checkpoints: Path) -> None:
    folder = checkpoint(name, checkpoints)
    tokens = prompt(SPECS[name], PROMPT_TOKENS[name])
    oracle = oracles.transformers_run(folder, tokens, device=device).logits
    engine = plain_engine(plain_plan(folder, device=device))
    assert_exact(all_logits(engine, tokens), oracle, f"{name}, token by token, against transformers")
    for chunk in (512, 7):  # whole, and in chunks that cut pages and windows unevenly
        last = prefill(engine, tokens, chunk)
        assert_exact(last, oracle[-1:], f"{name}, prefill by {chunk}, against transformers")


@pytest.mark.parametrize("name", SPECS)
def test_logits_by_cpu_products_equal_transformers(name: str, checkpoints: Path) -> None:
    folder = checkpoint(name, checkpoints)
    tokens = prompt(SPECS[name], PROMPT_TOKENS[name], seed=2)
    oracle = oracles.transformers_run(folder, tokens).logits
    engine = plain_engine(dataclasses.replace(plain_plan(folder), kernels="cpu"), cpu_operations())
    assert isinstance(engine.weights.head_VH, Narrow)
    assert_exact(all_logits(engine, tokens), oracle, f"{name}, CPU products, token by token, against transformers")
    assert_exact(prefill(engine, tokens, 512), oracle[-1:], f"{name}, CPU products, prefill, against transformers")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "true_width" else []) for name in SPECS]
)
def test_logits_equal_openai(
    name: str, checkpoints: Path, tmp_path: Path, skip_or_fail: Callable[[str], NoReturn]
) -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptoss-launch" / "tests"
    try:
        module = oracles.openai_module(cache / "gpt-oss")
    except OSError as error:
        skip_or_fail(f"OpenAI's torch model cannot be fetched: {error}")
    folder = checkpoint(name, checkpoints)
    oracles.to_original_layout(folder, tmp_path)
    tokens = prompt(SPECS[name], PROMPT_TOKENS[name], seed=1)
    oracle = oracles.openai_logits(module, tmp_path, tokens)
    engine = plain_engine(plain_plan(folder))
    assert_exact(all_logits(engine, tokens), oracle, f"{name}, token by token, against OpenAI's model")


@pytest.mark.parametrize("name", ["tiny", "three_blocks"])
def test_greedy_tokens_equal_transformers(name: str, checkpoints: Path) -> None:
    """Prompt and answer together pass the window, so pages are dropped on the way."""
    folder, spec = checkpoint(name, checkpoints), SPECS[name]
    tokens = prompt(spec, 100)
    assert len(tokens) + GREEDY_TOKENS > spec.window_tokens
    engine = plain_engine(plain_plan(folder))
    request = Request("a", tuple(tokens), GREEDY_TOKENS, Sampling(temperature=0.0))
    ours = [token.id for token in answers(engine, [request])["a"]]
    assert ours == oracles.transformers_greedy(folder, tokens, GREEDY_TOKENS)


def test_transposed_down_proj_cannot_pass(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """down_proj is square at the true width, so a transposed one fits everywhere and must be told by its values."""
    folder = checkpoint("true_width", checkpoints)
    tokens = prompt(SPECS["true_width"], 8)
    oracle = oracles.transformers_run(folder, tokens).logits

    def transposed(blocks, scales, dtype):
        weight = mxfp4.dequantize(blocks, scales, dtype)
        return weight.T if weight.shape[0] == weight.shape[1] else weight

    monkeypatch.setattr(experts, "dequantize", transposed)
    ours = all_logits(plain_engine(plain_plan(folder), PLAIN), tokens)
    error = (ours - oracle).abs().max().item() / oracle.abs().max().item()
    print(f"true_width with a transposed down_proj: largest error {error:.2e}")
    assert error > 1e-2

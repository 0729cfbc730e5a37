"""8 bits for attention, embedding and head: a whole model with them against one on the dequantized weights; what the
comparison at the start finds against plain sums; and that its limit refuses."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch
from forced import Forced
from gptoss_launch.parallel.engine import rest
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.engine.start import Options, start
from gptoss_launch.parallel.engine.trace import Trace
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.kernels import PLAIN
from gptoss_launch.parallel.kernels.choose import triton_operations
from gptoss_launch.parallel.kernels.weight_only import Narrow
from gptoss_launch.parallel.model.comm import Alone
from gptoss_launch.parallel.planning.headers import read_inventory
from gptoss_launch.parallel.planning.memory import weights_bytes
from gptoss_launch.parallel.planning.plan import DType, Plan, Rest
from small_models import GPU, TINY, checkpoint, plain_engine, plain_plan
from thread_ranks import run_ranks, with_ranks
from torch import Tensor

BITS = pytest.mark.parametrize("bits", ("int8", "fp8"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("three_blocks", tmp_path_factory.mktemp("checkpoints"))


def narrow(folder: Path, bits: Rest, dtype: DType = "fp32", device: Literal["cpu", "cuda"] = "cpu") -> Plan:
    return dataclasses.replace(plain_plan(folder, dtype, device=device), rest=bits)


def logits(engine: Engine, tokens: list[int]) -> Tensor:
    """After each token, in one step."""
    return Forced(engine).step(tokens, slice(None)).double()


def tensors(value: object) -> list[Tensor]:
    """Every tensor in a frozen value."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for one in value for tensor in tensors(one)]
    if dataclasses.is_dataclass(value):
        return [tensor for one in dataclasses.fields(value) for tensor in tensors(getattr(value, one.name))]
    return []


def dequantized(value):
    """The same weights, with what the codes stand for in their place."""
    if isinstance(value, Narrow):
        return (value.codes_OI.double() * value.scale_O.double()[:, None]).to(value.dtype)
    if isinstance(value, tuple):
        return tuple(dequantized(one) for one in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{one.name: dequantized(getattr(value, one.name)) for one in dataclasses.fields(value)}
        )
    return value


@BITS
def test_a_model_computes_with_what_the_codes_stand_for(bits: Rest, folder: Path) -> None:
    engine, tokens = plain_engine(narrow(folder, bits)), rest.fixed_tokens(TINY)[:200]
    plain = Engine(engine.plan, 0, dequantized(engine.weights), PLAIN, Alone())
    found, wanted = logits(engine, tokens), logits(plain, tokens)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    one_by_one = Forced(engine)
    step = torch.cat([one_by_one.step(tokens[place : place + 1]) for place in range(9)])
    assert (step - wanted[:9]).abs().max() <= 1e-5 * wanted.abs().max()
    assert (wanted - logits(plain_engine(plain_plan(folder)), tokens)).abs().max() > 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
@BITS
def test_the_plan_counts_its_bytes(bits: Rest, dtype: DType, folder: Path) -> None:
    plan = narrow(folder, bits, dtype)
    engine = plain_engine(plan)
    held = sum(tensor.nbytes for tensor in tensors(engine.weights))
    assert held == weights_bytes(plan.spec, plan.mesh, 0, dtype, bits) < weights_bytes(plan.spec, plan.mesh, 0, dtype)


@BITS
def test_drift_is_that_of_plain_sums(bits: Rest, folder: Path) -> None:
    plan = narrow(folder, bits)
    tokens = rest.fixed_tokens(TINY)[:70]
    engine = plain_engine(plan)
    found = rest.drift(engine, 0, read_inventory(folder), tokens)
    # pages that were written for it must not matter afterwards
    given, wanted = logits(engine, tokens), logits(plain_engine(plain_plan(folder)), tokens)
    p, q = wanted.log_softmax(-1), given.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.tokens == len(tokens)
    assert found.mean_kl == pytest.approx(float(kl.mean()), rel=1e-2, abs=1e-6) and found.mean_kl > 0
    assert found.most_kl == pytest.approx(float(kl.max()), rel=1e-2, abs=1e-6)
    assert found.same_top1 == int((given.argmax(-1) == wanted.argmax(-1)).sum())


def test_there_is_no_drift_from_itself(folder: Path) -> None:
    engine = plain_engine(plain_plan(folder))
    found = rest.drift(engine, 0, read_inventory(folder), rest.fixed_tokens(TINY))
    assert found.same_top1 == found.tokens > 200 and abs(found.most_kl) < 1e-5


@pytest.mark.parametrize(("ranks", "ep"), [(2, 1), (3, 3)])
def test_ranks_agree_on_the_drift(ranks: int, ep: int, folder: Path) -> None:
    """Near that of one rank: attention's output is cut along its columns, each part with scales of its own."""
    plan, tokens, inventory = narrow(folder, "int8"), rest.fixed_tokens(TINY)[:40], read_inventory(folder)
    alone = rest.drift(plain_engine(plan), 0, inventory, tokens)
    found = run_ranks(with_ranks(plan, ranks, ep), lambda engine: rest.drift(engine, _rank(engine), inventory, tokens))
    assert all(one == found[0] for one in found)
    assert found[0].mean_kl == pytest.approx(alone.mean_kl, rel=0.5) and found[0].tokens == 40


def _rank(engine: Engine) -> int:
    """By the rows of the vocabulary that it has."""
    return round(engine.weights.first_token * engine.plan.ranks / engine.plan.spec.vocab)


def test_a_rank_says_what_it_found_and_refuses_too_much(tmp_path: Path) -> None:
    plan = narrow(TINY, "int8", "bf16")

    def started(plan: Plan) -> tuple[str, ...]:
        return start(plan, 0, Options(), Trace(tmp_path / "trace"), lambda done, total: None)[2].notes

    (note,) = started(plan)
    assert note.startswith("rest int8 against bf16 on fixed prompts: mean KL divergence 0.0")
    assert note.endswith("; the limit is 0.05") and "the same likeliest token after" in note
    with pytest.raises(UserError, match="more than the limit of 1e-06") as refused:
        started(dataclasses.replace(plan, rest_kl=1e-6))
    assert "--rest bf16" in refused.value.hint
    assert started(dataclasses.replace(plan, rest="bf16")) == ()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@BITS
def test_triton_computes_so_too(bits: Rest, device: Literal["cuda"], tmp_path: Path) -> None:
    """In steps of a token and of many, against the plain operations on the same codes."""
    plan = narrow(checkpoint("true_width", tmp_path), bits, "bf16", device)
    ops, tokens = triton_operations(), rest.fixed_tokens(TINY)[:60]
    engine = plain_engine(dataclasses.replace(plan, kernels="triton"), ops)
    wanted = logits(plain_engine(plan), tokens)
    assert (logits(engine, tokens) - wanted).norm() <= 0.03 * wanted.norm()
    forced = Forced(engine)
    step = torch.cat([forced.step(tokens[place : place + 1]) for place in range(20)]).double()
    assert (step - wanted[:20]).norm() <= 0.03 * wanted[:20].norm()

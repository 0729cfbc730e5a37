"""The whole engine with all of Triton's operations, under the interpreter, against the same engine with plain ones.

Steps of all sizes that a server has, those in the middle of a long prompt among them, which draw nothing. Beside this
kernels are tested one by one; here is seen that they are given no size that they cannot do. fp16, as the interpreter's
products of bf16 are wrong, but for the experts, whose numbers between their products exceed it: there fp32.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from forced import answers
from gptoss_launch.parallel.engine import graphs, rest
from gptoss_launch.parallel.engine.constraint import Constraint, Section
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.engine.record import Head
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.kernels import (
    Mixture,
    Operations,
    Unsummed,
    triton_decode,
    triton_experts,
    triton_linear,
    triton_sample,
)
from gptoss_launch.parallel.kernels.choose import triton_operations
from gptoss_launch.parallel.kernels.triton_decode import Cut
from gptoss_launch.parallel.model.random_checkpoint import write_checkpoint
from gptoss_launch.parallel.planning.headers import read_inventory
from gptoss_launch.parallel.planning.plan import Plan
from gptoss_launch.parallel.planning.spec import alternating_kinds
from small_models import SPECS, TINY, plain_engine, plain_plan, prompt
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter; see tests/engine/test_gpu_engine.py")

SPEC = dataclasses.replace(
    SPECS["tiny"],
    layers=2,
    layer_kinds=alternating_kinds(2),
    hidden=32,
    intermediate=32,
    experts=4,
    experts_per_token=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    window_tokens=16,
)
# Hot, so that what rounding does to a logit moves a race by a sixteenth of it, and hardly ever another token wins.
HOT = Sampling(temperature=16.0)
SURE = ((7, 300.0),)
WAYS = (
    Sampling(temperature=0.0, logit_bias=SURE),
    HOT,
    dataclasses.replace(HOT, top_p=0.1),
    dataclasses.replace(HOT, top_k=9),
    dataclasses.replace(HOT, min_p=0.8),
    dataclasses.replace(HOT, presence=300.0, logit_bias=SURE),
    dataclasses.replace(HOT, repetition=50.0, frequency=1.0, logit_bias=SURE),
)
WORDS = Constraint((Section(headers=((5, 6), (70, 6)), ends=(3,)),), opening=(9,))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("interpreted") / "small"
    write_checkpoint(folder, SPEC, TINY / "tokenizer.json", 1, torch.device("cpu"))
    plan = plain_plan(folder, "fp16", context_tokens=64, step_tokens=32, sequences=17)
    return dataclasses.replace(plan, kv_tokens=256)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and larger programs than a GPU wants, as they run one after the other; and no integer is watched for
    overflow, which takes a third of the time and is done in the kernels' own tests."""
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(triton_decode, "_CUTS", ((1, Cut(2, 1), Cut(2, 1)), (256, Cut(1, 1), Cut(1, 1))))
    monkeypatch.setattr(triton_linear, "ONE", triton_linear.Rows(warps=128, ahead=1))
    monkeypatch.setattr(triton_sample, "ROW_PROGRAMS", 2)
    unwatched = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter_builder, "options", unwatched)


def operations() -> Operations:
    ops = triton_operations()

    def experts(x_TH: Tensor, *others: Any) -> Tensor:
        return ops.experts(x_TH.float(), *others).to(x_TH.dtype)

    def norm_experts(*given: Any) -> tuple[Tensor, Tensor | Unsummed]:
        """What `triton_experts.norm_experts` does for several tokens."""
        before, mixed = given[:8], given[8:]
        residual_TH, x_TH, *routes = ops.norm_route(*before)
        y_TH = triton_experts.experts_unsummed(x_TH.float(), *routes, *mixed)
        if isinstance(y_TH, Tensor):
            return residual_TH, y_TH.to(x_TH.dtype)
        return residual_TH, dataclasses.replace(y_TH, dtype=x_TH.dtype)

    return dataclasses.replace(ops, experts=experts, mixture=Mixture(ops.norm_route, experts, norm_experts))


def engines(plan: Plan, decodes: tuple[int, ...] = (), chunks: tuple[int, ...] = ()) -> tuple[Engine, Engine]:
    """Triton's, and the plain one. decodes, chunks: of graphs, whose steps are run as those hold them."""
    ours = plain_engine(dataclasses.replace(plan, kernels="triton"), operations(), decodes, chunks)
    plain = plain_engine(plan)
    for layer in (*ours.weights.layers, *plain.weights.layers):
        layer.router_bias_E[::2] += 8.0  # no two experts so near that rounding chooses; and some have no tokens
    ours.graphs.has = lambda head: True
    ours.graphs.replay = lambda head: ours._captured(graphs._plain(head), graphs._key(head)[2])
    return ours, plain


def agree(ours: Engine, plain: Engine, asked: list[Request], tolerance: float, *, ahead: bool = False) -> list[Head]:
    """The same tokens, and log probabilities within a tolerance; the heads of the steps."""
    heads: list[Head] = []
    launch = ours.launch
    ours.launch = lambda record: (heads.append(record.head), launch(record))[1]
    found, wanted = answers(ours, asked, ahead=ahead), answers(plain, asked, ahead=ahead)
    for name, tokens in wanted.items():
        assert [one.id for one in found[name]] == [one.id for one in tokens], name
        for one, other in zip(found[name], tokens, strict=True):
            values = [[token.logprob, *(value for _, value in token.top)] for token in (one, other)]
            assert values[0] == (values[1] if one.logprob is None else pytest.approx(values[1], abs=tolerance)), name
    return heads


@pytest.mark.parametrize(
    ("narrow", "graphs"),
    [(False, False), (False, True), (True, True)],
    ids=["eager", "padded", "padded, fp8 pages and int8 weights"],
)
def test_prompts_longer_than_a_step(narrow: bool, graphs: bool, plan: Plan) -> None:
    """Longer than the window too. As graphs hold them the third step is padded with a chunk of the scratch row. In fp16
    rounding moves a logit of 2 to 4 by up to 2**-10, and what it is made of a few times; in fp8 it may move a key by a
    sixteenth. A draw is made again with more candidates."""
    if narrow:
        plan = dataclasses.replace(plan, kv_dtype="fp8", rest="int8")
    asked = [
        Request("a", tuple(prompt(SPEC, 46)), 4, HOT, logprobs=0),
        Request("b", tuple(prompt(SPEC, 36, seed=1)), 2, dataclasses.replace(HOT, top_p=0.9, seed=1), logprobs=3),
    ]
    both = engines(plan, chunks=(16, 24, 32)) if graphs else engines(plan)
    heads = agree(*both, asked, 2**-4 if narrow else 2**-6, ahead=True)
    made = [(head.decodes, head.chunks, head.tokens, head.draws) for head in heads]
    third = (1, 2, 24, 2) if graphs else (1, 1, 19, 2)
    assert made[:4] == [(0, 1, 32, 0), (0, 2, 32, 1), third, (2, 0, 2, 2)] and made[-1] == (1, 0, 1, 1)
    assert any(head.exact for head in heads)


@pytest.mark.parametrize("padded", ((), (1, 4, 8, 12, 16, 17)), ids=["eager", "padded"])
def test_decodes_of_every_number(padded: tuple[int, ...], plan: Plan) -> None:
    """Either side of where one kernel takes over from another: at 16 tokens in products, at 8 here in experts (16
    pairs), at 2 in both. As graphs hold them steps are padded with tokens of the scratch row."""
    sizes = (17, 16, 9, 8, 2, 1)
    ways = (*WAYS, *(dataclasses.replace(HOT, seed=i) for i in range(sizes[0] - len(WAYS))))
    asked = [
        Request(f"{i}", (i,), sum(size > i for size in sizes), way, logprobs=(None, 0, 3)[i % 3])
        for i, way in enumerate(ways)
    ]
    asked[1] = dataclasses.replace(asked[1], stop_tokens=(3,), constraint=WORDS)
    heads = agree(*engines(plan, padded), asked, 2**-6)
    assert [head.tokens for head in heads] == ([17, 16, 12, 8, 4, 1] if padded else list(sizes))
    assert all(head.tokens == head.decodes for head in heads)


def test_what_narrow_weights_change_is_the_same(plan: Plan) -> None:
    """What a rank says of them before the first request: in one step, with the original weights too."""
    both, tokens = engines(dataclasses.replace(plan, rest="int8")), prompt(SPEC, 17)
    found, wanted = (rest.drift(one, 0, read_inventory(Path(str(plan.checkpoint))), tokens) for one in both)
    assert found.tokens == 17 and found.mean_kl == pytest.approx(wanted.mean_kl, rel=0.2) and wanted.mean_kl > 0

"""Watching the router: counts of each expert's use, the comparison across ranks, and a plan made from the counts."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forced import Forced
from gptoss_launch.launch.cli import run
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.engine.routes import Recorder, checked
from gptoss_launch.parallel.kernels import PLAIN, Operations
from gptoss_launch.parallel.planning.plan import Plan
from rank_work import gathered_logits
from small_models import TINY, plain_engine, plain_plan, prompt
from thread_ranks import run_ranks, with_ranks
from torch import Tensor

SPEC = plain_plan(TINY).spec
TOKENS = prompt(SPEC, 135)  # past the window of 128
ORDER = tuple(
    tuple((3 * place + layer) % SPEC.experts for place in range(SPEC.experts)) for layer in range(SPEC.layers)
)
DEVICE = torch.device("cpu")


def overheard(ops: Operations, routes: list[Tensor]) -> Operations:
    """`ops` whose every router choice goes into `routes` too."""

    def norm_route(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        residual_TH, x_TH, weights_TX, experts_TX = ops.norm_route(*inputs)
        routes.append(experts_TX.clone())
        return residual_TH, x_TH, weights_TX, experts_TX

    return dataclasses.replace(ops, norm_route=norm_route)


def recorded(plan: Plan, path: Path) -> tuple[list[list[int]], list[Tensor]]:
    """Counts as the file has them, and every choice, of a forward pass over TOKENS in three steps."""
    recorder, routes = Recorder(path, plan, DEVICE), []
    engine = plain_engine(plan, recorder.counted(overheard(PLAIN, routes)))
    gathered_logits(engine, TOKENS)
    recorder.write(at_once=True)
    fields = json.loads(path.read_text())
    assert fields.keys() == {"model", "counts"} and fields["model"] == "tiny"
    return fields["counts"], routes


@pytest.fixture(scope="module")
def routing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routing") / "routing.json"
    recorded(plain_plan(TINY), path)
    return path


def test_order_is_a_true_permutation() -> None:
    assert all(sorted(order) == list(range(SPEC.experts)) for order in ORDER)
    assert all(order != tuple(range(SPEC.experts)) for order in ORDER)


def test_counts_are_those_of_the_forward_pass(tmp_path: Path, routing: Path) -> None:
    counts, routes = recorded(plain_plan(TINY), tmp_path / "routing.json")
    assert len(routes) == 3 * SPEC.layers
    for layer in range(SPEC.layers):
        chosen = Counter(expert for route in routes[layer :: SPEC.layers] for expert in route.flatten().tolist())
        assert counts[layer] == [chosen[expert] for expert in range(SPEC.experts)]
        assert sum(counts[layer]) == len(TOKENS) * SPEC.experts_per_token
    assert json.loads(routing.read_text())["counts"] == counts


def test_counts_are_of_published_experts_whatever_their_order(tmp_path: Path, routing: Path) -> None:
    plan = dataclasses.replace(plain_plan(TINY), expert_order=ORDER)
    counts, routes = recorded(plan, tmp_path / "routing.json")
    assert counts == json.loads(routing.read_text())["counts"]
    placed = [Counter(torch.cat(routes[layer :: SPEC.layers]).flatten().tolist()) for layer in range(SPEC.layers)]
    assert [[count[place] for place in range(SPEC.experts)] for count in placed] != counts  # the order was in use


def test_every_rank_counts_the_same(tmp_path: Path, routing: Path) -> None:
    """Any one of them can write the file: each routes all tokens among all experts."""
    plan = dataclasses.replace(with_ranks(plain_plan(TINY), 2, 2), expert_order=ORDER)

    def work(engine: Engine) -> list[list[int]]:
        path = tmp_path / f"{engine.weights.first_expert}.json"
        recorder = Recorder(path, plan, DEVICE)
        engine.ops = recorder.counted(engine.ops)
        gathered_logits(engine, TOKENS)
        recorder.write(at_once=True)
        return json.loads(path.read_text())["counts"]

    assert run_ranks(plan, work) == [json.loads(routing.read_text())["counts"]] * 2


def test_reset_forgets_and_writes_are_spaced(tmp_path: Path) -> None:
    plan, path = plain_plan(TINY), tmp_path / "routing.json"
    recorder = Recorder(path, plan, DEVICE)
    engine = plain_engine(plan, recorder.counted(PLAIN))

    def count() -> int:
        return sum(map(sum, json.loads(path.read_text())["counts"]))

    def one_step() -> None:
        Forced(engine).step(TOKENS[:5])

    one_step()
    recorder.reset()
    recorder.write(at_once=True)
    assert count() == 0
    one_step()
    recorder.write()  # too soon
    assert count() == 0
    recorder.write(at_once=True)
    assert count() == 5 * SPEC.layers * SPEC.experts_per_token
    assert list(tmp_path.iterdir()) == [path]  # no draft is left


# --- the comparison across ranks


def tampered(ops: Operations, rank: int, wrong: dict[int, int]) -> Operations:
    """`ops` that, on `rank`, takes other experts in the layers of `wrong`, at its step."""
    calls = iter(range(10**9))

    def norm_route(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        residual_TH, x_TH, weights_TX, experts_TX = ops.norm_route(*inputs)
        step, layer = divmod(next(calls), SPEC.layers)
        if rank == 1 and wrong.get(layer) == step:
            experts_TX = experts_TX.clone()
            experts_TX[-1, 0] = next(e for e in range(SPEC.experts) if e not in experts_TX[-1])
        return residual_TH, x_TH, weights_TX, experts_TX

    return dataclasses.replace(ops, norm_route=norm_route)


def said(wrong: dict[int, int], ranks: int = 2) -> list[str]:
    """What each rank raises; an empty text if nothing."""

    def work(engine: Engine) -> str:
        # of ep = ranks, the first expert tells the rank
        rank = engine.weights.first_expert * ranks // SPEC.experts
        engine.ops = checked(tampered(engine.ops, rank, wrong), engine.comm, SPEC.layers)
        try:
            gathered_logits(engine, TOKENS)
        except RuntimeError as error:
            return str(error)
        return ""

    return run_ranks(with_ranks(plain_plan(TINY), ranks, ranks), work)


def test_ranks_that_agree_are_left_alone() -> None:
    assert said({}) == ["", ""]


@pytest.mark.parametrize(("layer", "step"), [(0, 0), (2, 1), (3, 2)])
def test_a_rank_that_routes_differently_is_named_by_all(layer: int, step: int) -> None:
    expected = f"the router's choice in layer {layer} differs between rank 0 and ranks [1]"
    assert said({layer: step}) == [expected] * 2


def test_the_odd_one_of_four_is_named() -> None:
    assert said({1: 0}, ranks=4) == ["the router's choice in layer 1 differs between rank 0 and ranks [1]"] * 4


def test_checking_changes_no_logits() -> None:
    def work(check: bool) -> Callable[[Engine], Tensor]:
        def logits(engine: Engine) -> Tensor:
            if check:
                engine.ops = checked(engine.ops, engine.comm, SPEC.layers)
            return gathered_logits(engine, TOKENS)

        return logits

    plan = with_ranks(plain_plan(TINY), 2, 2)
    assert torch.equal(run_ranks(plan, work(True))[0], run_ranks(plan, work(False))[0])


# --- a plan from the counts


def test_a_plan_places_experts_by_the_counts_and_computes_the_same(
    routing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "tiny", "--machine", "cpu", "--ranks", "2", "--ep", "2", "--routing", str(routing), "--json"]
    assert run(arguments) == 0
    plan = Plan.from_json(json.loads(capsys.readouterr().out))
    assert (plan.ranks, plan.ep, plan.dtype) == (2, 2, "fp32")
    assert len(plan.expert_order) == SPEC.layers
    assert all(sorted(order) == list(range(SPEC.experts)) for order in plan.expert_order)
    assert any(order != tuple(range(SPEC.experts)) for order in plan.expert_order)

    # the busiest rank has less to do than in the published order, or as little
    half = SPEC.experts // 2
    for counts, order in zip(json.loads(routing.read_text())["counts"], plan.expert_order, strict=True):
        placed = [counts[expert] for expert in order]
        assert max(sum(placed[:half]), sum(placed[half:])) <= max(sum(counts[:half]), sum(counts[half:]))

    small = dataclasses.replace(plan, dp=1, context_tokens=1024, kv_tokens=1024)  # the planner takes all that fits
    oracle = gathered_logits(plain_engine(plain_plan(TINY)), TOKENS)
    for logits in run_ranks(small, lambda engine: gathered_logits(engine, TOKENS)):
        assert (logits - oracle).abs().max() <= 1e-5 * oracle.abs().max()
        assert torch.equal(logits.argmax(-1), oracle.argmax(-1))

"""Every way of cutting the model gives what one rank gives, for R = 1 to 8 and every ep that divides R."""

import pytest
import torch
from gptoss_launch.parallel.engine import kv
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.engine.request import Request, Sampling
from small_models import TINY, plain_engine, plain_plan, prompt
from thread_ranks import run_ranks, with_ranks
from torch import Tensor

LAYOUTS = [(ranks, ep) for ranks in range(1, 9) for ep in range(1, ranks + 1) if ranks % ep == 0]
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "drawn": Sampling(temperature=1.0, seed=7),
    "nucleus": Sampling(temperature=0.8, top_p=0.9, seed=8),
    "deep nucleus": Sampling(temperature=8.0, top_p=0.999, seed=9),  # deeper than the first candidates
}


def gathered_logits(engine: Engine, tokens: list[int]) -> Tensor:
    """[tokens, whole vocabulary], in steps of 50."""
    sequence = kv.Sequence()
    parts = []
    for start in range(0, len(tokens), 50):
        local = engine.step(sequence, tokens[start : start + 50], slice(None))
        widest = int(engine.comm.all_gather(torch.tensor([local.shape[1]])).max())
        padded = torch.full((len(local), widest), float("nan"), dtype=local.dtype)
        padded[:, : local.shape[1]] = local
        everyone = torch.cat(engine.comm.all_gather(padded).unbind(), dim=1)
        parts.append(everyone[:, ~everyone[0].isnan()])
    kv.release(engine.pool, sequence)
    return torch.cat(parts)


def draws(engine: Engine, tokens: list[int]) -> dict[str, list[int]]:
    requests = [Request(name, tuple(tokens[:20]), 6, sampling) for name, sampling in SAMPLINGS.items()]
    return {request.id: [token.id for token in engine.generate(request)] for request in requests}


def work(engine: Engine) -> tuple[Tensor, dict[str, list[int]]]:
    tokens = prompt(engine.plan.spec, 140)
    return gathered_logits(engine, tokens), draws(engine, tokens)


@pytest.fixture(scope="module")
def one_rank() -> tuple[Tensor, dict[str, list[int]]]:
    return work(plain_engine(plain_plan(TINY)))


@pytest.mark.parametrize(("ranks", "ep"), LAYOUTS)
def test_logits_and_draws_equal_one_rank(ranks: int, ep: int, one_rank: tuple[Tensor, dict[str, list[int]]]) -> None:
    oracle, draws = one_rank
    results = run_ranks(with_ranks(plain_plan(TINY), ranks, ep), work)
    error = max((logits - oracle).abs().max().item() for logits, _ in results) / oracle.abs().max().item()
    print(f"R = {ranks}, ep = {ep}: largest error {error:.2e} of the largest logit")
    assert error <= 1e-5
    for logits, drawn in results:
        assert torch.equal(logits, results[0][0])  # the same bits on every rank
        assert torch.equal(logits.argmax(-1), oracle.argmax(-1))
        assert drawn == draws

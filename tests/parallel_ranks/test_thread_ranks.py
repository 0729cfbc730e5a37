"""Every way of cutting the model gives what one rank gives, for R = 1 to 8 and every ep that divides R."""

import pytest
import torch
from rank_work import work
from small_models import TINY, plain_engine, plain_plan
from thread_ranks import run_ranks, with_ranks
from torch import Tensor

LAYOUTS = [(ranks, ep) for ranks in range(1, 9) for ep in range(1, ranks + 1) if ranks % ep == 0]


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

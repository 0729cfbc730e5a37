"""Real processes, real torchrun, gloo: every ep of R = 2, 3 and 4 ranks gives what one rank gives.

The ranks compare every all-reduce and every router choice among themselves meanwhile (--check-ranks).
"""

from pathlib import Path

import pytest
import rank_work
import torch
from small_models import TINY, plain_engine, plain_plan
from thread_ranks import with_ranks
from torchrun import torchrun


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))])
def test_every_layout_over_gloo(ranks: int, tmp_path: Path) -> None:
    plans = [with_ranks(plain_plan(TINY), ranks, ep) for ep in range(1, ranks + 1) if ranks % ep == 0]
    files = []
    for plan in plans:
        files.append(tmp_path / f"{plan.digest}.json")
        plan.save(files[-1])
    torchrun(ranks, rank_work.__file__, tmp_path, *files, timeout_s=240)
    oracle, draws = rank_work.work(plain_engine(plain_plan(TINY)))
    for plan in plans:
        logits, drawn = torch.load(tmp_path / f"{plan.digest}.pt")
        error = (logits - oracle).abs().max().item() / oracle.abs().max().item()
        print(f"gloo, R = {ranks}, ep = {plan.ep}: largest error {error:.2e} of the largest logit")
        assert error <= 1e-5
        assert torch.equal(logits.argmax(-1), oracle.argmax(-1))
        assert drawn == draws

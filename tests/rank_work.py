"""What a rank is asked in tests of several ranks: logits over the whole vocabulary, and draws of each kind.

Under torchrun: `python rank_work.py OUT PLAN...` runs the plans one after the other on real process groups; rank 0
writes OUT/<digest>.pt for each.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forced import Forced, answers
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.engine.start import Options, join, start
from gptoss_launch.parallel.engine.trace import Trace
from gptoss_launch.parallel.planning.plan import Plan
from small_models import prompt
from torch import Tensor

SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "drawn": Sampling(temperature=1.0, seed=7),
    "nucleus": Sampling(temperature=0.8, top_p=0.9, seed=8),
    "deep nucleus": Sampling(temperature=8.0, top_p=0.999, seed=9),  # deeper than the first candidates
}


def gathered_logits(engine: Engine, tokens: list[int]) -> Tensor:
    """[tokens, whole vocabulary], in steps of 50."""
    forced = Forced(engine)
    parts = []
    for first in range(0, len(tokens), 50):
        local = forced.step(tokens[first : first + 50], slice(None))
        widest = int(engine.comm.all_gather(torch.tensor([local.shape[1]])).max())
        padded = torch.full((len(local), widest), float("nan"), dtype=local.dtype)
        padded[:, : local.shape[1]] = local
        everyone = torch.cat(engine.comm.all_gather(padded).unbind(), dim=1)
        parts.append(everyone[:, ~everyone[0].isnan()])
    return torch.cat(parts)


def draws(engine: Engine, tokens: list[int]) -> dict[str, list[int]]:
    requests = [Request(name, tuple(tokens[:20]), 6, sampling) for name, sampling in SAMPLINGS.items()]
    return {name: [token.id for token in several] for name, several in answers(engine, requests).items()}


def work(engine: Engine) -> tuple[Tensor, dict[str, list[int]]]:
    tokens = prompt(engine.plan.spec, 135)  # past the window of 128
    return gathered_logits(engine, tokens), draws(engine, tokens)


def main(out: Path, plans: list[Path]) -> None:
    rank = int(os.environ["RANK"])
    trace = Trace(out / f"rank-{rank}.trace")
    join(Plan.load(plans[0]))
    for path in plans:
        plan = Plan.load(path)
        engine, _, _ = start(plan, rank, Options(check_ranks=True), trace, lambda done_bytes, total_bytes: None)
        result = work(engine)
        if rank == 0:
            torch.save(result, out / f"{plan.digest}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])

"""Two linked GPUs: steps as CUDA graphs, those with prompts too, give the tokens of kernels launched one by one.

Sums over ranks are inside the graphs, by each way that is chosen for their sizes.
"""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch
from forced import answers
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.engine.graphs import Graphs
from gptoss_launch.parallel.engine.record import Record
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.model.random_checkpoint import write_checkpoint
from gptoss_launch.parallel.planning.plan import Plan
from gptoss_launch.parallel.planning.spec import PUBLISHED, alternating_kinds
from small_models import TINY, plain_plan, prompt
from thread_ranks import with_ranks
from torchrun import torchrun

STEP_TOKENS, SEQUENCES = 512, 8
SPEC = dataclasses.replace(PUBLISHED["openai/gpt-oss-20b"], layers=2, layer_kinds=alternating_kinds(2))


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("ep", [1, 2])
def test_graphs_of_two_ranks_give_the_same_tokens(ep: int, tmp_path: Path) -> None:
    folder = tmp_path / "20b-2"
    write_checkpoint(folder, SPEC, TINY / "tokenizer.json", 0, torch.device("cuda"))
    plan = plain_plan(folder, "bf16", 2048, STEP_TOKENS, "cuda", SEQUENCES)
    plan = dataclasses.replace(plan, kernels="triton", kv_tokens=SEQUENCES * 2048)
    with_ranks(plan, 2, ep).save(tmp_path / "plan.json")
    assert torchrun(2, __file__, tmp_path / "plan.json", timeout_s=250).splitlines()[-1] == "the same"


def compared(engine: Engine, sized: tuple[range, range]) -> None:
    """sized: graphs for any number of decodes and tokens, so that no step is padded: padding may take other kernels."""
    spec, rows = engine.plan.spec, engine.sizes.rows
    asked = [
        Request(f"{i}", tuple(prompt(spec, 30 + 97 * i, seed=i)), 10 + 3 * i, Sampling(seed=i), logprobs=2)
        for i in range(2 * rows)
    ]
    records: list[Record] = []
    launch = engine.launch
    engine.launch = lambda record: (records.append(record), launch(record))[1]
    found = []
    for decodes, chunks in (sized, (range(0), range(0))):
        engine.graphs = Graphs(decodes, chunks, rows, engine._captured)
        found.append(answers(engine, asked, ahead=True))
    assert found[0] == found[1]
    assert {len(tokens) for tokens in found[0].values()} == {10 + 3 * i for i in range(2 * rows)}
    kinds = {(bool(record.head.graph), bool(record.head.decodes), bool(record.head.chunks)) for record in records}
    every = {(True, False), (False, True), (True, True)}  # decodes, chunks, and both in a step
    assert kinds == {(graph, *kind) for graph in ({True, False} if sized[0] else {False}) for kind in every}


def main(path: Path) -> None:
    """A rank's part."""
    from gptoss_launch.parallel.engine.start import Options, join, start
    from gptoss_launch.parallel.engine.trace import Trace

    rank, plan = int(os.environ["RANK"]), Plan.load(path)
    if plan.device == "cuda":
        torch.cuda.set_device(rank)
    join(plan)
    trace = Trace(path.parent / f"rank-{rank}.trace")
    engine, _, _ = start(plan, rank, Options(), trace, lambda done_bytes, total_bytes: None)
    on_gpu = plan.device == "cuda"
    compared(engine, (range(1, SEQUENCES + 1), range(8, STEP_TOKENS + 1)) if on_gpu else (range(0), range(0)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank == 0:
        print("the same", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

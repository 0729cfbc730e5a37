"""What an all-reduce between linked GPUs takes, by way and size: `torchrun --nproc-per-node 2 all_reduce.py`.

One JSON object a line for each size and way. in_step_us: what each of 49 all-reduces, as a step of 20b has, adds to a
CUDA graph of 49 norms that each wait for the one before. alone_us: each of 49 in a graph of nothing else. The fastest
of several rounds, on the slowest rank.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from gptoss_launch.parallel.kernels.triton_norm import add_norm
from gptoss_launch.parallel.model.comm import WAYS, Linked, least
from torch import Tensor

HIDDEN, CALLS, REPLAYS, ROUNDS = 2880, 49, 5, 4
TOKENS = (1, 2, 4, 8, 16, 32, 45, 64, 128, 182)  # of 5,760 bytes each: to 1 MB

Reduce = Callable[[Tensor], Tensor]


def fastest_s(work: Callable[[], object]) -> float:
    """One call of `work` in a graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        dist.barrier()
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / REPLAYS)
    return -least(-round(min(times) * 1e9)) / 1e9


def step(message_TH: Tensor, reduce: Reduce) -> None:
    weight_H = torch.ones(HIDDEN, device="cuda")
    residual_TH, delta_TH = message_TH, message_TH.clone()
    for _ in range(CALLS):
        residual_TH, delta_TH = add_norm(residual_TH, reduce(delta_TH), weight_H, 1e-5, torch.bfloat16)


def alone(message_TH: Tensor, reduce: Reduce) -> None:
    for _ in range(CALLS):
        message_TH = reduce(message_TH)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="add the lines to this file as well")
    out: Path | None = parser.parse_args().out
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    linked = Linked(2048 * HIDDEN * 2, limits=())
    for tokens in TOKENS:
        message_TH = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        norms_s = fastest_s(partial(step, message_TH, lambda x: x))
        for way in (way for way in WAYS if linked.takes(way, message_TH)):
            reduce = partial(linked.all_reduce_by, way)
            in_step_s = fastest_s(partial(step, message_TH, reduce)) - norms_s
            alone_s = fastest_s(partial(alone, message_TH, reduce))
            row = {
                "bench": "all-reduce",
                "device": torch.cuda.get_device_name(),
                "ranks": dist.get_world_size(),
                "bytes": message_TH.nbytes,
                "way": way,
                "in_step_us": round(in_step_s / CALLS * 1e6, 2),
                "alone_us": round(alone_s / CALLS * 1e6, 2),
            }
            if dist.get_rank() == 0:
                print(json.dumps(row), flush=True)
                if out is not None:
                    with out.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""What an all-reduce between linked GPUs takes, by way and size: `torchrun --nproc-per-node 2 all_reduce.py`.

One JSON object a line for each size and way. in_step_us: what each of 49 all-reduces, as a step of 20b has, adds to a
CUDA graph of 49 norms that each wait for the one before. alone_us: each of 49 in a graph of nothing else. The fastest
of several rounds, on the slowest rank. For messages with flags also other numbers of warps and words of a program.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from gptoss_launch.parallel.kernels import triton_all_reduce as flagged
from gptoss_launch.parallel.kernels.triton_norm import add_norm
from gptoss_launch.parallel.model.comm import WAYS, Linked, least
from torch import Tensor

HIDDEN, CALLS, REPLAYS, ROUNDS = 2880, 49, 5, 4
TOKENS = (1, 2, 4, 8, 16, 32, 45, 64, 128, 182)  # of 5,760 bytes each: to 1 MB
VARIANTS = ((1, 64), (1, 128), (2, 128), (4, 256), (4, 512))  # warps, words of a program
MOST_WARPS = 16 * 132  # at a time, on an H100 or H200
VARIANT_BYTES = 10 << 20

Reduce = Callable[[Tensor], Tensor]


def fastest_s(work: Callable[[], None]) -> float:
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


def variant(warps: int, words: int) -> tuple[Reduce, int]:
    """The sum with flags of such programs, and the largest message in bytes."""
    flagged.WARPS, flagged.BLOCK = warps, words
    memory = symmetric.empty(VARIANT_BYTES, dtype=torch.uint8, device=torch.device("cuda"))
    mapped = symmetric.rendezvous(memory, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    memory.zero_()
    torch.cuda.synchronize()
    least(0)  # all ranks have zeros
    parts = (mapped.get_buffer(rank, (VARIANT_BYTES,), torch.uint8, 0) for rank in range(mapped.world_size))
    addresses = tuple(part.data_ptr() for part in parts)
    summed = flagged.FlaggedSum(addresses, mapped.rank, VARIANT_BYTES, memory.device)
    programs = min(VARIANT_BYTES // (2 * mapped.world_size * words * flagged.WORD_BYTES), MOST_WARPS // warps)
    return lambda x: (memory, summed(x))[1], flagged.DATA_BYTES * words * programs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="add the lines to this file as well")
    out: Path | None = parser.parse_args().out
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    linked = Linked(2048 * HIDDEN * 2, limits=())
    cases: list[tuple[dict, Reduce, int]] = []
    for way in WAYS:
        takes = [t * HIDDEN * 2 for t in TOKENS if linked.takes(way, torch.empty(t, HIDDEN, dtype=torch.bfloat16))]
        cases.append(({"way": way}, lambda x, way=way: linked.all_reduce_by(way, x), max(takes, default=0)))
    for warps, words in VARIANTS if linked.takes("flagged", torch.empty(1)) else ():
        cases.append(({"way": "flagged", "warps": warps, "words": words}, *variant(warps, words)))
    for tokens in TOKENS:
        message_TH = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        norms_s = fastest_s(lambda: step(message_TH, lambda x: x))  # noqa: B023
        for about, reduce, most_bytes in cases:
            if message_TH.nbytes > most_bytes:
                continue
            if "warps" in about:
                flagged.WARPS, flagged.BLOCK = about["warps"], about["words"]
            spent = {
                "in_step_us": fastest_s(lambda: step(message_TH, reduce)) - norms_s,  # noqa: B023
                "alone_us": fastest_s(lambda: alone(message_TH, reduce)),  # noqa: B023
            }
            row = {"bench": "all-reduce", "device": torch.cuda.get_device_name(), "ranks": dist.get_world_size()}
            row |= {"bytes": message_TH.nbytes, **about}
            row |= {name: round(seconds / CALLS * 1e6, 2) for name, seconds in spent.items()}
            if dist.get_rank() == 0:
                print(json.dumps(row), flush=True)
                if out is not None:
                    with out.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

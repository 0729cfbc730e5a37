"""What an all-reduce between linked GPUs takes, by way and size: `torchrun --nproc-per-node 2 all_reduce.py`.

One JSON object a line for each size and way. in_step_us: what each of 49 all-reduces, as a step of 20b has, adds to a
CUDA graph of 49 norms that each wait for the one before. alone_us: each of 49 in a graph of nothing else. The fastest
of several rounds, on the slowest rank.

Before these, or with --products alone: a graph of what 24 layers of 20b have around a sum for one token, attention's
output, norm, experts, norm, with sums after the products and inside them. step_us: of all. The first line's way is the
reference of the others, whose results have to have its bits (same_bits).
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from gptoss_launch.parallel.kernels import triton_launch, triton_linear
from gptoss_launch.parallel.kernels.sums import Ranks
from gptoss_launch.parallel.kernels.triton_experts import experts
from gptoss_launch.parallel.kernels.triton_linear import Rows
from gptoss_launch.parallel.kernels.triton_mxfp4 import Tiles, pack
from gptoss_launch.parallel.kernels.triton_norm import add_norm
from gptoss_launch.parallel.model.comm import WAYS, Comm, Linked, check_equal, least
from torch import Tensor

HIDDEN, CALLS, REPLAYS, ROUNDS = 2880, 49, 5, 4
TOKENS = (1, 2, 4, 8, 16, 32, 45, 64, 128, 182)  # of 5,760 bytes each: to 1 MB

LAYERS, QUERY, EXPERTS, EXPERTS_PER_TOKEN = 24, 4096, 32, 4
WEIGHTS = 8  # of attention's output, and sets of experts: together more than a GPU keeps in its cache
SUMMED = (Rows(4, 16, 64), Rows(4, 16, 80), Rows(2, 16, 64), Rows(2, 16, 80), Rows(1, 16, 64), Rows(1, 16, 80))

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


@dataclass(frozen=True)
class After(Comm):
    """Sums by the kernel of their own."""

    linked: Linked

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.linked.all_reduce_by("flagged", x)

    def all_gather(self, x: Tensor) -> Tensor:
        return self.linked.all_gather(x)


@dataclass(frozen=True)
class Model:
    """What a rank holds."""

    out_WHQ: Tensor
    bias_H: Tensor
    gate_up: Tiles
    down: Tiles
    norm_H: Tensor
    weights_TX: Tensor
    chosen_WTX: Tensor
    x_TH: Tensor


def model(rank: int, ranks: int, device: torch.device) -> Model:
    generator = torch.Generator(device).manual_seed(rank)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)

    def packed(rows: int, columns: int) -> Tiles:
        size = (EXPERTS, rows, columns // 32)
        blocks = torch.randint(0, 256, (*size, 16), generator=generator, device=device, dtype=torch.uint8)
        scales = torch.randint(117, 123, size, generator=generator, device=device, dtype=torch.uint8)
        return pack(blocks, scales, random(EXPERTS, rows))

    same, units = torch.Generator().manual_seed(0), HIDDEN // ranks // 32 * 32
    return Model(
        random(WEIGHTS, HIDDEN, QUERY // ranks),
        random(HIDDEN),
        packed(2 * units, HIDDEN),
        packed(HIDDEN, units),
        torch.ones(HIDDEN, device=device),
        torch.full((1, EXPERTS_PER_TOKEN), 1 / EXPERTS_PER_TOKEN, device=device),
        torch.randperm(EXPERTS, generator=same).view(WEIGHTS, 1, EXPERTS_PER_TOKEN).to(device),
        torch.randn((1, HIDDEN), generator=same).to(device, torch.bfloat16),
    )


def layers(here: Model, of_out: Ranks, of_experts: Ranks, result_TH: Tensor) -> None:
    residual_TH, x_TH = here.x_TH, here.x_TH
    for layer in range(LAYERS):
        out_HQ, chosen_TX = here.out_WHQ[layer % WEIGHTS], here.chosen_WTX[layer % WEIGHTS]
        delta_TH = triton_linear.linear(x_TH[:, : out_HQ.shape[1]], out_HQ, here.bias_H, of_out)
        residual_TH, x_TH = add_norm(residual_TH, delta_TH, here.norm_H, 1e-5, torch.bfloat16)
        delta_TH = experts(x_TH, here.weights_TX, chosen_TX, here.gate_up, here.down, 0, 7.0, of_experts)
        residual_TH, x_TH = add_norm(residual_TH, delta_TH, here.norm_H, 1e-5, torch.bfloat16)
    result_TH.copy_(residual_TH)


def products(link: Callable[[], Linked], report: Callable[..., None]) -> None:
    """link: a new one for each way, as places in it must always be cut alike."""
    ways: list[tuple[str, bool, bool, Rows]] = [  # and whether inside attention's output, inside experts
        ("after both", False, False, SUMMED[0]),
        ("inside experts", False, True, SUMMED[0]),
        *((f"inside attention's output, {how}", True, False, how) for how in SUMMED),
        *((f"inside both, {how}", True, True, how) for how in SUMMED),
        ("after both, again", False, False, SUMMED[0]),
    ]
    here = model(dist.get_rank(), dist.get_world_size(), torch.device("cuda", torch.cuda.current_device()))
    reference_TH = None
    for name, in_out, in_experts, how in ways:
        linked = link()
        linked.limits = ((HIDDEN * 2, "flagged"),)
        after, message = After(linked), triton_linear.one_message(here.x_TH, here.out_WHQ[0], how)
        with linked.exchange(message) as exchange:
            if exchange is None:
                report(bench="sums inside products", way=name, refused=f"needs {message.processors} multiprocessors")
                continue
        result_TH = torch.empty_like(here.x_TH)
        triton_linear.ONE_SUMMED = (how,)
        work = partial(layers, here, linked if in_out else after, linked if in_experts else after, result_TH)
        seconds = fastest_s(work)
        check_equal(linked, result_TH, name)
        reference_TH = result_TH if reference_TH is None else reference_TH
        same = torch.equal(result_TH, reference_TH) and bool(result_TH.isfinite().all())
        report(bench="sums inside products", way=name, step_us=round(seconds * 1e6, 1), same_bits=same)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="add the lines to this file as well")
    parser.add_argument("--products", action="store_true", help="only sums after and inside products")
    arguments = parser.parse_args()
    out: Path | None = arguments.out

    def report(**row: object) -> None:
        if dist.get_rank() == 0:
            line = json.dumps(
                {"device": torch.cuda.get_device_name(), "ranks": dist.get_world_size(), **row}, ensure_ascii=False
            )
            print(line, flush=True)
            if out is not None:
                with out.open("a", encoding="utf-8") as lines:
                    lines.write(line + "\n")

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    if torch.cuda.get_device_capability() == (9, 0):  # to try programs of one warp
        triton_launch.PROGRAMS_AT_ONCE, triton_launch.WARPS_AT_ONCE = 32, 64
    link = partial(Linked, 2048 * HIDDEN * 2, limits=())
    products(link, report)
    linked = link()
    for tokens in () if arguments.products else TOKENS:
        message_TH = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        norms_s = fastest_s(partial(step, message_TH, lambda x: x))
        for way in (way for way in WAYS if linked.takes(way, message_TH)):
            reduce = partial(linked.all_reduce_by, way)
            in_step_s = fastest_s(partial(step, message_TH, reduce)) - norms_s
            alone_s = fastest_s(partial(alone, message_TH, reduce))
            report(
                bench="all-reduce",
                bytes=message_TH.nbytes,
                way=way,
                in_step_us=round(in_step_s / CALLS * 1e6, 2),
                alone_us=round(alone_s / CALLS * 1e6, 2),
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""How long the Triton experts and router take on one GPU, and which cuts are the best: `python kernels_experts.py`.

With --inner 1440 the experts are those of one rank of two, with as many columns. Few tokens alone: --few.

Every time is the median of replays of a CUDA graph over several layers, whose weights together do not fit the L2
cache. Prints one JSON object a line; `best` is the fastest of its group. `floor_pct` is the time to read the needed
experts once at the datasheet's bandwidth, in per cent of the measured time. First checks results against plain torch.
"""

# ruff: noqa: B023 (what a lambda holds is used at once)

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gptoss_launch.parallel.kernels import experts as plain
from gptoss_launch.parallel.kernels.triton_decode import Cut, decode, down_sum, gate_up_inner
from gptoss_launch.parallel.kernels.triton_experts import experts
from gptoss_launch.parallel.kernels.triton_grouped import Shape, grouped
from gptoss_launch.parallel.kernels.triton_mxfp4 import MAX_SLOTS, Tiles, pack
from gptoss_launch.parallel.kernels.triton_route import route
from torch import Tensor

HIDDEN, PER_TOKEN, LIMIT = 2880, 4, 7.0
LAYERS = {32: 8, 128: 4}  # by experts a layer
FEW = {32: (1, 2, 4, 6, 8, 16, 32, 64), 128: (1, 2, 8, 32, 64)}
MANY = {32: (32, 64, 128, 256, 1024, 2048, 8192), 128: (128, 256, 2048)}
CUTS_1 = [Cut(s, u) for s, u in ((3, 3), (3, 5), (3, 8), (5, 3), (9, 5))] + [Cut(5, 3, registers=64)]
CUTS_FEW = [Cut(s, u) for s, u in ((1, 3), (1, 5), (1, 9), (1, 15), (3, 3), (3, 5))]
CUTS_FEW += [Cut(1, 3, by_token=True, registers=64), Cut(1, 9, by_token=True)]
CUTS_MORE = [Cut(1, u) for u in (3, 5, 9, 15)]
SHAPES = {  # rows, least rows, tiles, warps, stages
    "thin": [
        Shape(*s)
        for s in ((16, 16, 8, 4, 6), (16, 16, 16, 4, 4), (16, 16, 16, 4, 5), (32, 32, 8, 4, 5), (32, 16, 8, 4, 5))
    ],
    "thick": [
        Shape(*s)
        for s in ((64, 64, 8, 4, 5), (64, 16, 8, 4, 5), (128, 128, 8, 4, 4), (128, 32, 8, 4, 4), (128, 32, 8, 4, 5))
    ],
}


def layer(held: int, inner: int) -> tuple[Tiles, Tiles]:
    """Random weights, as pack would lay them out."""

    def product(outputs: int, columns: int) -> Tiles:
        tiles, steps = outputs // 16, -(-columns // 64)
        blocks = torch.randint(-(2**31), 2**31 - 1, (held, tiles, steps, 32, 4), dtype=torch.int32, device="cuda")
        scales = torch.randint(116, 122, (held, tiles, steps, 8, 4), dtype=torch.uint8, device="cuda")
        bias = torch.randn((held, outputs), device="cuda").bfloat16()
        arrivals = torch.zeros(tiles * MAX_SLOTS, dtype=torch.int32, device="cuda")
        return Tiles(blocks.view(torch.int16), scales, bias, arrivals)

    return product(2 * inner, HIDDEN), product(HIDDEN, inner)


def routes(tokens: int, held: int) -> tuple[Tensor, Tensor]:
    experts_TX = torch.rand((tokens, held), device="cuda").topk(PER_TOKEN).indices
    return torch.rand((tokens, PER_TOKEN), device="cuda").softmax(-1), experts_TX


def hidden(tokens: int) -> Tensor:
    return torch.randn((tokens, HIDDEN), device="cuda").bfloat16()


def cuts(tokens: int) -> list[Cut]:
    return CUTS_1 if tokens == 1 else CUTS_FEW if tokens <= 8 else CUTS_MORE


def shapes(tokens: int, held: int) -> list[Shape]:
    return SHAPES["thin" if tokens * PER_TOKEN <= 40 * held else "thick"]


def jobs() -> list[tuple[int, Any]]:
    """(tokens, cut or shape): one of each kernel that is compiled."""
    found = {}
    for held in LAYERS:
        for tokens in FEW[held]:
            for cut in cuts(tokens):
                found[tokens == 1, cut] = (tokens, cut)
        for tokens in MANY[held]:
            for shape in shapes(tokens, held):
                found[0, shape] = (65, shape)
    return list(found.values())


def compile_some(todo: list[tuple[int, Any]], inner: int) -> None:
    """Fills Triton's cache on disk, in a process of its own."""
    packs = layer(32, inner)
    for tokens, how in todo:
        given = (hidden(tokens), *routes(tokens, 32), *packs, 0, LIMIT)
        try:
            if isinstance(how, Cut):
                decode(*given, cuts=(how, how))
            else:
                grouped(*given, shapes=(how, how))
            torch.cuda.synchronize()
        except Exception as error:
            report(failed=str(how), error=str(error)[:200])


def graph_us(call: Callable[[], Any], layers: int, replays: int = 15) -> float:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[replays // 2] / layers * 1e3


def check(inner: int) -> None:
    """Against plain torch in fp32, eight experts, others elsewhere; also that runs repeat bit for bit."""

    def product(outputs: int, columns: int) -> plain.Packed:
        blocks = torch.randint(0, 256, (8, outputs, columns // 32, 16), dtype=torch.uint8, device="cuda")
        scales = torch.randint(116, 122, (8, outputs, columns // 32), dtype=torch.uint8, device="cuda")
        return plain.Packed(blocks, scales, torch.randn((8, outputs), device="cuda"))

    gate_up, down = product(2 * inner, HIDDEN), product(HIDDEN, inner)
    packs = [pack(p.blocks, p.scales, p.bias.bfloat16()) for p in (gate_up, down)]
    gate_up, down = (plain.Packed(p.blocks, p.scales, p.bias.bfloat16().float()) for p in (gate_up, down))
    for tokens in (1, 2, 4, 6, 8, 16, 64, 65, 300, 2048):
        x_TH, (weights_TX, experts_TX) = hidden(tokens), routes(tokens, 12)
        wanted = plain.experts(x_TH.float(), weights_TX, experts_TX, gate_up, down, 2, LIMIT)
        found = experts(x_TH, weights_TX, experts_TX, *packs, 2, LIMIT)
        again = experts(x_TH, weights_TX, experts_TX, *packs, 2, LIMIT)
        error = ((found.float() - wanted).norm() / wanted.norm()).item()
        report(check=tokens, inner=inner, error=f"{error:.1e}", repeats=torch.equal(found, again))


def report(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def tried(times: list[tuple[float, str]], name: str, **values: Any) -> None:
    """All of a group in one line, fastest first."""
    times.sort()
    if times:
        report(
            name=name,
            **values,
            best=times[0][1],
            us=round(times[0][0], 2),
            all=[f"{us:.1f} {how}" for us, how in times],
        )


def attempt(call: Callable[[], Any], layers: int, how: str) -> list[tuple[float, str]]:
    try:
        return [(graph_us(call, layers), how)]
    except Exception as error:
        report(failed=how, error=str(error)[:200])
        return []


def text(how: Cut | Shape) -> str:
    return ",".join(str(value) for value in vars(how).values())


def few(held: int, inner: int, pool: list[tuple[Tiles, Tiles]], bandwidth: float) -> None:
    for tokens in FEW[held]:
        x_TH, count = hidden(tokens), len(pool)
        given = [routes(tokens, held) for _ in pool]
        used = sum(len(experts_TX.unique()) for _, experts_TX in given) / count
        # one for all, as what gate_up has just written would be in the L2 cache too
        inner_PI = torch.randn((tokens * PER_TOKEN, inner), device="cuda").mul(2.0**100).bfloat16()
        first, second = [], []
        for cut in cuts(tokens):
            first += attempt(
                lambda: [gate_up_inner(x_TH, r[1], p[0], 0, LIMIT, cut) for r, p in zip(given, pool, strict=True)],
                count,
                text(cut),
            )
            second += attempt(
                lambda: [down_sum(inner_PI, *r, p[1], 0, cut) for r, p in zip(given, pool, strict=True)],
                count,
                text(cut),
            )
        for name, times, weights in (("gate_up", first, 2 * inner * HIDDEN), ("down", second, HIDDEN * inner)):
            read_bytes = used * weights * 17 / 32
            best_us = min(times)[0] if times else float("nan")
            floor = round(read_bytes / bandwidth * 1e8 / best_us, 1)
            tried(times, name, experts=held, tokens=tokens, tb_s=round(read_bytes / best_us / 1e6, 2), floor_pct=floor)
        both = []
        if first and second:
            best = [next(cut for cut in cuts(tokens) if text(cut) == min(times)[1]) for times in (first, second)]
            for early in (False, True):
                pair = (replace(best[0], early=early), replace(best[1], early=early))
                both += attempt(
                    lambda: [decode(x_TH, *r, *p, 0, LIMIT, pair) for r, p in zip(given, pool, strict=True)],
                    count,
                    f"early {early}",
                )
        tried(both, "both", experts=held, tokens=tokens)
        us = graph_us(lambda: [experts(x_TH, *r, *p, 0, LIMIT) for r, p in zip(given, pool, strict=True)], count)
        read_bytes = used * 3 * inner * HIDDEN * 17 / 32
        floor = round(read_bytes / bandwidth * 1e8 / us, 1)
        report(
            name="experts",
            experts=held,
            tokens=tokens,
            us=round(us, 2),
            tb_s=round(read_bytes / us / 1e6, 2),
            floor_pct=floor,
        )


def many(held: int, inner: int, pool: list[tuple[Tiles, Tiles]], bandwidth: float) -> None:
    for tokens in MANY[held]:
        layers = pool[:2] if tokens > 256 else pool
        x_TH, given = hidden(tokens), [routes(tokens, held) for _ in layers]
        times = []
        for shape in shapes(tokens, held):
            times += attempt(
                lambda: [grouped(x_TH, *r, *p, 0, LIMIT, (shape, shape)) for r, p in zip(given, layers, strict=True)],
                len(layers),
                text(shape),
            )
        best_us = min(times)[0] if times else float("nan")
        flops = 2 * tokens * PER_TOKEN * 3 * HIDDEN * inner
        read_bytes = sum(len(e.unique()) for _, e in given) / len(layers) * 3 * inner * HIDDEN * 17 / 32
        tried(
            times,
            "grouped",
            experts=held,
            tokens=tokens,
            tflop_s=round(flops / best_us / 1e6, 1),
            tb_s=round(read_bytes / best_us / 1e6, 2),
            floor_pct=round(max(read_bytes / bandwidth, flops / 8e14) * 1e8 / best_us, 1),
        )
        us = graph_us(
            lambda: [experts(x_TH, *r, *p, 0, LIMIT) for r, p in zip(given, layers, strict=True)], len(layers)
        )
        report(name="experts", experts=held, tokens=tokens, us=round(us, 2), tflop_s=round(flops / us / 1e6, 1))
        parts(lambda: experts(x_TH, *given[0], *pool[0], 0, LIMIT), experts=held, tokens=tokens)


def parts(call: Callable[[], Any], **values: Any) -> None:
    """What each kernel of a call takes, by the profiler."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
        rows = [(event.key[:40], round(event.device_time_total / 3, 1)) for event in profiler.key_averages()]
        report(name="kernels", **values, us=dict(row for row in rows if row[1]))
    except Exception as error:
        report(failed="profiler", error=str(error)[:200])


def routers() -> None:
    for held in LAYERS:
        weights = [torch.randn((held, HIDDEN), device="cuda").bfloat16() for _ in range(24)]
        bias = torch.randn(held, device="cuda").bfloat16()
        for tokens in (1, 8, 64, 2048):
            x_TH = hidden(tokens)
            us = graph_us(lambda: [route(x_TH, weight, bias, PER_TOKEN) for weight in weights], 24)
            torch_us = graph_us(lambda: [plain.route(x_TH, weight, bias, PER_TOKEN) for weight in weights], 24)
            report(name="route", experts=held, tokens=tokens, us=round(us, 2), plain_us=round(torch_us, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inner", type=int, default=2880, help="columns of the second product")
    parser.add_argument("--few", action="store_true", help="no batches for the tensor cores")
    asked = parser.parse_args()
    begin = time.monotonic()
    todo = [job for job in jobs() if not (asked.few and isinstance(job[1], Shape))]
    count = min(12, os.cpu_count() or 1, len(todo))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=compile_some, args=(todo[i::count], asked.inner)) for i in range(count)]
    processes += [context.Process(target=check, args=(inner,)) for inner in (asked.inner, 736)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    name = torch.cuda.get_device_name()
    bandwidth = 4.8e12 if "H200" in name else 3.35e12
    report(device=name, torch=torch.__version__, kernels=len(todo), compile_s=round(time.monotonic() - begin))
    torch.manual_seed(0)
    routers()
    for held, layers in LAYERS.items():
        pool = [layer(held, asked.inner) for _ in range(layers)]
        few(held, asked.inner, pool, bandwidth)
        if not asked.few:
            many(held, asked.inner, pool, bandwidth)
        del pool
        torch.cuda.empty_cache()
        report(seconds=round(time.monotonic() - begin))


if __name__ == "__main__":
    main()

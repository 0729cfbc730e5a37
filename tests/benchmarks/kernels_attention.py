"""Times the Triton kernels but the experts' on a GPU, over tuning constants, checked against the plain versions.

    python tests/benchmarks/kernels_attention.py [--only decode,window,chunk,linear,linear8,small] [--out FILE]

One JSON line a case: microseconds by variant (a variant is its tuning's numbers joined by slashes), the floor (bytes at
the rate of a device copy, or products at 800 TFLOP/s), the largest error of any variant relative to the largest result.
Each figure is the median over replays of a CUDA graph that goes through as many copies of the inputs as keep the L2
cache from helping. Kernels are compiled first, by several processes at once, so that one run takes about 90 s.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gptoss_launch.parallel.kernels import (
    attention,
    linear,
    norm,
    triton_attend_chunks,
    triton_attend_decodes,
    triton_linear,
    triton_norm,
    triton_qkv,
    triton_weight_only,
)
from gptoss_launch.parallel.kernels.batch import Batch, Chunk, PageView, tiles
from gptoss_launch.parallel.kernels.weight_only import CODES, narrowed
from torch import Tensor

COMPILERS = 14  # processes
HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, HIDDEN, VOCAB = 64, 8, 64, 16, 2880, 201088  # of the published models
TABLE_PAGES = 131072 // PAGE_TOKENS
ROTATED_BYTES = 200e6  # several times the L2
MOST_COPIES = 24
REPLAYS = 12
PEAK_FLOPS = 800e12  # bf16, as measured
BF16 = torch.bfloat16

Decode, Chunks, Rows = triton_attend_decodes.Tuning, triton_attend_chunks.Tuning, triton_linear.Rows
DECODES = [
    *(Decode(64, programs, 64, 2, 2, 3, together) for programs in (1024, 4096) for together in (16, 32)),
    Decode(32, 4096, 64, 2, 2, 3, 64),
    Decode(64, 4096, 64, 2, 4, 3, 32),
    *(Decode(128, programs, 64, 2, 4, 3, 16) for programs in (1024, 4096)),
    Decode(64, 4096, 64, 4, 2, 3, 32),
    Decode(64, 4096, 64, 2, 2, 5, 32),
]
FP8_DECODES = [
    Decode(block, 4096, 64, 2, warps, stages, 32)
    for block, warps, stages in ((64, 2, 3), (64, 4, 3), (64, 2, 5), (128, 4, 3), (128, 4, 5))
]
WINDOW_DECODES = [
    Decode(block, 1, 1, 1, warps, stages, 1)
    for block, warps, stages in ((128, 4, 1), (128, 8, 1), (64, 4, 3), (64, 2, 3))
]
CHUNKS = [
    Chunks(*numbers, 264, 1024, registers)
    for *numbers, registers in (
        (128, 64, 8, 3, None),
        (128, 64, 8, 5, None),
        *((128, 64, 8, stages, 128) for stages in (3, 4, 5)),
        *((64, 64, 4, stages, 128) for stages in (3, 4)),
        *((256, 64, 16, stages, None) for stages in (3, 5)),
        (256, 64, 8, 4, None),
        (128, 32, 8, 4, None),
    )
]
WINDOW_CHUNKS = [
    Chunks(*numbers, 1, 1024, registers)
    for *numbers, registers in (
        (64, 64, 4, 3, None),
        (64, 64, 4, 3, 128),
        (64, 64, 4, 2, 128),
        (64, 64, 4, 2, 96),
        (64, 32, 4, 3, None),
        (128, 64, 8, 3, 128),
    )
]
STAYS = [triton_qkv.Stay(*how) for how in ((4, 4, 2), (4, 5, 1), (4, 7, 1), (4, 5, 2), (8, 3, 1))]
ONES = [Rows(*how) for how in ((1, 16, 88), (1, 16, 96), (4, 16, 96), (4, 16), (1, 12, 128), (4, 12, 128), (1, 8, 80))]
FEWS = [
    (8, 4),
    (8, 8),
    (8, 16),
    (4, 8),
    (4, 16),
    (2, 16),
    (1, 9),
    (1, 15),
    (2, 5),
    (2, 9),
    (2, 15),
    (2, 3),
]  # ways, unroll


@dataclass(frozen=True)
class Case:
    """What is timed: for each variant a call on each copy of the inputs, and what the first copy should give."""

    name: dict[str, Any]
    calls: dict[str, list[Callable[[], Any]]]
    want: Callable[[], Tensor]
    read: Callable[[Any], Tensor]  # a call's result as `want` has it
    bytes: float = 0
    flops: float = 0


def label(tuning: Any) -> str:
    return "/".join(str(number) for number in dataclasses.astuple(tuning))


def copies(size_bytes: float, fewest: int = 1) -> range:
    return range(min(MOST_COPIES, max(fewest, round(ROTATED_BYTES / size_bytes + 0.5))))


class Pages:
    """Pages of keys and values, as many as the largest case reads; each copy of a case takes others of them."""

    def __init__(self, tokens: int) -> None:
        shape = (tokens // PAGE_TOKENS, 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM)
        self.kv_PCSKD = torch.randn(shape, dtype=BF16, device="cuda")
        self.order_P = torch.randperm(len(self.kv_PCSKD), device="cuda").int()

    def table(self, rows: int, context: int, copy: int) -> Tensor:
        pages = -(-context // PAGE_TOKENS)
        table_RP = torch.full((rows, TABLE_PAGES), -1, dtype=torch.int32, device="cuda")
        at = torch.arange(rows * pages, device="cuda") + copy * rows * pages
        table_RP[:, :pages] = self.order_P[at % len(self.order_P)].view(rows, pages)
        return table_RP


def batch_of(decodes: int, chunk: int, context: int, others: int) -> Batch:
    """A chunk, or decodes: the first at the end of `context` tokens, the other sequences have `others`."""
    chunks = (Chunk(0, chunk, 0, context),) if chunk else ()
    positions = torch.arange(context - chunk, context)
    if decodes:
        positions = torch.tensor([context - 1] + [others - 1] * (decodes - 1))
    rows = torch.zeros(chunk, dtype=torch.int64) if chunk else torch.arange(decodes)
    tiles_X4 = torch.tensor(tiles(chunks), dtype=torch.int32).view(-1, 4)
    nothing = torch.zeros(0, dtype=torch.int64)
    count = torch.tensor([decodes], dtype=torch.int32, device="cuda")
    return Batch(nothing, positions.cuda(), rows.cuda(), decodes, count, chunks, tiles_X4.cuda(), {}, nothing)


def attend_case(
    pages: Pages,
    decodes: int,
    chunk: int,
    context: int,
    window: int | None,
    tunings: list[Any],
    kv_dtype: torch.dtype = BF16,
    others: int | None = None,
) -> Case:
    others = context if others is None else others
    tokens = decodes + chunk
    seen = context if window is None else min(context, window + chunk)
    rows = decodes or 1
    kv_PCSKD = pages.kv_PCSKD.to(kv_dtype)
    keys = seen + (rows - 1) * min(others, seen)
    size_bytes = keys * 2 * KV_HEADS * HEAD_DIM * kv_dtype.itemsize
    batch = batch_of(decodes, chunk, context, others)
    sinks_N = torch.randn(HEADS, device="cuda")
    q_TND = torch.randn((tokens, HEADS, HEAD_DIM), dtype=BF16, device="cuda")
    out_TND = torch.empty_like(q_TND)
    views = [PageView(pages.table(rows, context, copy), batch.rows_T, window) for copy in copies(size_bytes)]
    attend = triton_attend_chunks.attend_chunks if chunk else triton_attend_decodes.attend_decodes
    pairs = chunk * (context - chunk) + chunk * (chunk + 1) // 2 if window is None else chunk * window
    return Case(
        {"op": "chunk" if chunk else "decode", "tokens": tokens, "context": context, "window": window}
        | ({} if kv_dtype == BF16 else {"kv": str(kv_dtype)})
        | ({} if others == context else {"others": others}),
        {
            label(tuning): [partial(attend, q_TND, kv_PCSKD, sinks_N, batch, view, out_TND, tuning) for view in views]
            for tuning in tunings
        },
        lambda: attention.attend(q_TND.float(), kv_PCSKD, sinks_N, batch, views[0]),
        lambda _: out_TND.flatten(1),
        bytes=size_bytes if not chunk else 0,
        flops=4 * pairs * HEADS * HEAD_DIM if chunk else 0,
    )


def linear_case(tokens: int, rows: int, columns: int, bias: bool, codes: torch.dtype | None = None) -> Case:
    size_bytes = rows * columns * (2 if codes is None else 1)
    weights = [torch.randn((rows, columns), dtype=BF16, device="cuda") for _ in copies(size_bytes)]
    bias_O = torch.randn(rows, dtype=BF16, device="cuda") if bias else None
    x_TI = torch.randn((tokens, columns), dtype=BF16, device="cuda")
    whole_OI = weights[0].float()
    if codes is not None:
        weights = [narrowed(weight, codes, BF16) for weight in weights]
        whole_OI = weights[0].dense(slice(None)).float()
    calls = {"torch": [partial(linear.linear, x_TI, weight, bias_O) for weight in weights]}
    if tokens == 1:
        for tuning in ONES:
            calls[label(tuning)] = [partial(triton_linear.one, x_TI, weight, bias_O, tuning) for weight in weights]
    if codes is not None:
        calls["few"] = [partial(triton_weight_only.several, x_TI, weight, bias_O) for weight in weights]
    elif tokens <= triton_linear.FEW_TOKENS:
        for cut in FEWS:
            if columns % (cut[0] * cut[1] * triton_linear.STEP_COLUMNS) == 0:
                calls[f"few {cut}"] = [partial(triton_linear.few, x_TI, weight, bias_O, *cut) for weight in weights]
    return Case(
        {"op": "linear", "tokens": tokens, "rows": rows, "columns": columns}
        | ({} if codes is None else {"codes": str(codes)}),
        calls,
        lambda: torch.nn.functional.linear(x_TI.float(), whole_OI, None if bias_O is None else bias_O.float()),
        lambda got: got,
        bytes=size_bytes,
    )


def qkv_case(pages: Pages, tokens: int) -> Case:
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    size_bytes = width * HIDDEN * 2
    weights = [torch.randn((width, HIDDEN), dtype=BF16, device="cuda") for _ in copies(size_bytes)]
    bias_Q = torch.randn(width, dtype=BF16, device="cuda")
    before = *torch.randn((2, tokens, HIDDEN), dtype=BF16, device="cuda"), torch.ones(HIDDEN, device="cuda"), 1e-5
    angles = torch.randn((tokens, HEAD_DIM // 2), device="cuda")
    rotation = angles.cos(), angles.sin()
    slots_T = torch.arange(tokens, device="cuda")
    work: dict[str, Callable[..., Any]] = {"triton": triton_qkv.norm_qkv_write, "plain": attention.norm_qkv_write}
    if tokens == 1:
        work |= {label(how): partial(triton_qkv.norm_qkv_write, how=how) for how in STAYS}
    return Case(
        {"op": "norm_qkv_write", "tokens": tokens},
        {
            name: [
                partial(write, *before, BF16, weight, bias_Q, rotation, pages.kv_PCSKD, slots_T) for weight in weights
            ]
            for name, write in work.items()
        },
        lambda: attention.norm_qkv_write(
            *before,
            torch.float32,
            weights[0].float(),
            bias_Q.float(),
            rotation,
            torch.zeros_like(pages.kv_PCSKD[:256]),
            slots_T,
        )[1],
        lambda got: got[1],
        bytes=size_bytes,
    )


def norm_case(tokens: int) -> Case:
    weight_H = torch.randn(HIDDEN, device="cuda")
    rows = [torch.randn((2, tokens, HIDDEN), dtype=BF16, device="cuda") for _ in copies(tokens * HIDDEN * 8, 8)]
    work = {"triton": triton_norm.add_norm, "plain": norm.add_norm}
    return Case(
        {"op": "add_norm", "tokens": tokens},
        {name: [partial(add, *pair, weight_H, 1e-5, BF16) for pair in rows] for name, add in work.items()},
        lambda: norm.add_norm(rows[0][0], rows[0][1], weight_H, 1e-5, torch.float32)[1],
        lambda got: got[1],
        bytes=tokens * HIDDEN * 8,
    )


def torch_attention_case(tokens: int) -> Case:
    """A yardstick for chunks: torch's own, with no pages and no sinks."""
    shape = (1, HEADS, tokens, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=BF16, device="cuda") for _ in range(3))
    call = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True)
    pairs = tokens * (tokens + 1) // 2
    return Case(
        {"op": "torch causal attention", "tokens": tokens, "context": tokens},
        {"torch": [call]},
        call,
        lambda got: got,
        flops=4 * pairs * HEADS * HEAD_DIM,
    )


def cases(only: set[str], small: bool) -> Iterator[Case]:
    """small: as few bytes as bring the same kernels into being."""

    def shorter(context: int) -> int:
        return min(context, 1024) if small else context

    pages = Pages(64 * shorter(32768))
    decode = partial(attend_case, pages, chunk=0)
    batches = (1, 8, 32, 64)
    if "decode" in only and small:
        unsplit = [tuning for tuning in DECODES if tuning.programs <= 64 * KV_HEADS]
        for batch, tunings in ((1, DECODES), (64, unsplit)):
            yield decode(batch, context=1024, window=None, tunings=tunings)
    elif "decode" in only:
        for batch, context in product(batches, (1024, 8192, 32768)):
            yield decode(batch, context=context, window=None, tunings=DECODES)
        for batch in (8, 64):
            yield decode(batch, context=32768, window=None, tunings=DECODES, others=1024)
    if "decode" in only:
        fp8 = torch.float8_e4m3fn
        yield decode(32, context=shorter(8192), window=None, tunings=FP8_DECODES, kv_dtype=fp8)
    if "window" in only:
        for batch in (1,) if small else batches:
            yield decode(batch, context=1000, window=128, tunings=WINDOW_DECODES)
    if "chunk" in only:
        for context in (2048,) if small else (2048, 16384):
            yield attend_case(pages, 0, 2048, context, None, CHUNKS)
        full = triton_attend_chunks.FULL
        few = [dataclasses.replace(full, programs=programs) for programs in (1, 132, 264, 528)]
        few += [Chunks(64, 64, 4, 3, programs, 1024) for programs in (264, 528, 1056)]
        yield attend_case(pages, 0, 100, shorter(32768), None, few)
        yield attend_case(pages, 0, 2048, 4096, 128, WINDOW_CHUNKS)
        yield torch_attention_case(2048)
    if "linear" in only:
        vocab = VOCAB // 100 if small else VOCAB
        for rows, columns, bias in ((HIDDEN, 4096, True), (vocab, HIDDEN, False)):
            for tokens in (1, 2, 16) if small else (1, 2, 8, 16, 32):
                yield linear_case(tokens, rows, columns, bias)
    if "linear8" in only:
        for codes in CODES.values():
            for tokens in (1, 4, 16):
                yield linear_case(tokens, 5120, HIDDEN, True, codes)
                yield linear_case(tokens, VOCAB // 100 if small else VOCAB, HIDDEN, False, codes)
    if "small" in only:
        for tokens in (1, 2, 9, 17) if small else (1, 2, 8, 16, 32, 2048):
            yield qkv_case(pages, tokens)
        for tokens in (1,) if small else (1, 32, 2048):
            yield norm_case(tokens)


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """Median time of a call, over replays of a graph of all calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e3 / len(calls))
    return median(times)


def relative_error(case: Case, variant: str, want: Tensor) -> float:
    got = case.read(case.calls[variant][0]()).float()
    return float((got - want).abs().max() / want.abs().max())


def copy_rate() -> float:
    """Bytes a second that an elementwise kernel reads and writes; a pure read can be some per cent faster."""
    source = torch.zeros(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (microseconds([partial(torch.abs, source, out=target)]) * 1e-6)


def compile_all(only: str) -> None:
    """Every kernel once, by several processes, into Triton's cache."""
    began_s = time.perf_counter()
    command = [sys.executable, __file__, "--only", only, "--compile"]
    running = [subprocess.Popen([*command, str(index)]) for index in range(COMPILERS)]
    failed = [process.args for process in running if process.wait() != 0]
    if failed:
        raise SystemExit(f"could not compile: {failed}")
    print(json.dumps({"compile_s": round(time.perf_counter() - began_s, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="decode,window,chunk,linear,small")
    parser.add_argument("--out", type=Path, help="also write the lines here")
    parser.add_argument("--compile", type=int, help="only run each kernel of this share once")
    arguments = parser.parse_args()
    only = set(arguments.only.split(","))
    if arguments.compile is not None:
        every = (call[0] for case in cases(only, small=True) for call in case.calls.values())
        for index, call in enumerate(every):
            if index % COMPILERS == arguments.compile:
                call()
        torch.cuda.synchronize()
        return
    compile_all(arguments.only)
    rate = copy_rate()
    lines = [{"device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_tb_s": round(rate / 1e12, 2)}]
    print(json.dumps(lines[0]), flush=True)
    for case in cases(only, small=False):
        want = case.want().float()
        error = max(relative_error(case, variant, want) for variant in case.calls)
        del want
        us = {variant: round(microseconds(calls), 1) for variant, calls in case.calls.items()}
        best = min(us.values())
        floor = max(case.bytes / rate, case.flops / PEAK_FLOPS) * 1e6
        speed = (
            {"tb_s": round(case.bytes / best / 1e6, 2)} if case.bytes else {"tflop_s": round(case.flops / best / 1e6)}
        )
        line = case.name | {"floor_us": round(floor, 1), **speed, "error": f"{error:.1e}", "us": us}
        lines.append(line | {"floor_percent": round(100 * floor / best)})
        print(json.dumps(lines[-1]), flush=True)
        assert error < 3e-2, line
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()

"""Attention over pages in Triton against the plain version: under the interpreter on the CPU, compiled on a GPU.

The plain version itself is held against two oracles in tests/model. The interpreter's products of bf16 are wrong, so
that on the CPU everything is fp16 or fp32; bf16 is for the GPU.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gptoss_launch.parallel.kernels import attention, triton_attend_chunks, triton_attend_decodes, triton_attention
from gptoss_launch.parallel.kernels.batch import Batch, Chunk, PageView, tiles
from small_models import GPU
from torch import Tensor

PAGE_TOKENS = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STALE = 1_000_000  # a page that is not there: to read it is to fail, or to read what is not ours
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """Lengths after the step of its decodes, and (tokens, length) of its chunks."""

    decodes: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    kv_heads: int = 1
    group: int = 8
    head_dim: int = 32
    window_tokens: int | None = None
    kv_dtype: torch.dtype | None = None  # None: that of the queries


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Batch, PageView]:
    """q_TND, kv_PCSKD, sinks_N, the batch and its pages: scattered, with stale entries wherever nobody may look."""
    generator = torch.Generator().manual_seed(0)
    lengths = [*case.decodes, *(length for _, length in case.chunks)]
    news = [1] * len(case.decodes) + [tokens for tokens, _ in case.chunks]
    width = max(-(-length // PAGE_TOKENS) for length in lengths) + 3  # the table is wider than any sequence
    count = sum(-(-length // PAGE_TOKENS) for length in lengths)
    order = torch.randperm(count, generator=generator).tolist()
    rows = torch.randperm(len(lengths), generator=generator).tolist()
    table_RP = torch.full((len(lengths), width), STALE, dtype=torch.int32)
    kv_PCSKD = torch.full((count, 2, PAGE_TOKENS, case.kv_heads, case.head_dim), float("nan"))
    for row, length, new in zip(rows, lengths, news, strict=True):
        seen = 0 if case.window_tokens is None else max(0, length - new + 1 - case.window_tokens)
        for index in range(-(-length // PAGE_TOKENS)):
            page = order.pop()
            first = index * PAGE_TOKENS
            low, high = max(seen - first, 0), min(length - first, PAGE_TOKENS)
            if low < PAGE_TOKENS:
                table_RP[row, index] = page
                shape = (2, high - low, case.kv_heads, case.head_dim)
                kv_PCSKD[page, :, low:high] = torch.randn(shape, generator=generator)
            else:
                table_RP[row, index] = -1 if index % 2 else STALE
    tokens, decodes = sum(news), len(case.decodes)
    chunks, at = [], decodes
    for row, (new, length) in zip(rows[decodes:], case.chunks, strict=True):
        chunks.append(Chunk(at, at + new, row, length))
        at += new
    owner = torch.tensor(rows).repeat_interleave(torch.tensor(news))
    positions_T = torch.cat([torch.arange(length - new, length) for length, new in zip(lengths, news, strict=True)])
    batch = Batch(
        tokens_T=torch.zeros(tokens, dtype=torch.int64),
        positions_T=positions_T.to(DEVICE),
        rows_T=owner.to(DEVICE),
        decodes=decodes,
        decodes_1=torch.tensor([decodes], dtype=torch.int32, device=DEVICE),
        chunks=tuple(chunks),
        tiles_X4=torch.tensor(tiles(tuple(chunks)), dtype=torch.int32).view(-1, 4).to(DEVICE),
        pages={},
        wanted_S=torch.zeros(0, dtype=torch.int64),
    )
    heads = case.kv_heads * case.group
    q_TND = (torch.randn((tokens, heads, case.head_dim), generator=generator) * 2).to(dtype).to(DEVICE)
    sinks_N = torch.randn(heads, generator=generator).to(DEVICE)
    view = PageView(table_RP.to(DEVICE), torch.zeros(tokens, dtype=torch.int64), case.window_tokens)
    return q_TND, kv_PCSKD.to(case.kv_dtype or dtype).to(DEVICE), sinks_N, batch, view


def check(case: Case, dtype: torch.dtype, error: float) -> None:
    """error: largest, in units of the largest result."""
    q_TND, kv_PCSKD, sinks_N, batch, pages = inputs(case, dtype)
    got = triton_attention.attend(q_TND, kv_PCSKD, sinks_N, batch, pages)
    wide = kv_PCSKD.double() if case.kv_dtype is None else kv_PCSKD.float()  # fp8 to fp64 by way of fp32
    want = attention.attend(q_TND.double(), wide.double(), sinks_N, batch, pages)
    assert got.dtype == dtype and got.shape == want.shape
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=error * float(want.abs().max()))


MIXED = Case(decodes=(20, 1, 33), chunks=((3, 3), (18, 50)), kv_heads=2, group=3, head_dim=16)
CASES = {
    "one_token_of_one": Case(decodes=(1,)),
    "edges_of_pages": Case(decodes=(15, 16, 17)),
    "edges_of_the_window": Case(decodes=(127, 128, 129), window_tokens=128),
    "edges_of_blocks": Case(decodes=(129, 127, 128)),
    "many_splits": Case(decodes=(300,), kv_heads=2, group=3),
    "window_that_has_passed_pages": Case(decodes=(300, 1), window_tokens=20, group=1, kv_heads=3),
    "mixed": MIXED,
    "chunk": Case(chunks=((70, 70),)),
    "chunk_after_a_prefix": Case(chunks=((40, 300),), group=3, head_dim=16),
    "chunk_window": Case(chunks=((70, 150), (1, 40)), window_tokens=24, group=3, head_dim=16),
    "chunk_group_of_one": Case(chunks=((65, 70),), group=1, kv_heads=2, head_dim=16),
    "fp8": Case(decodes=(40, 17), chunks=((19, 40),), kv_dtype=E4M3, group=3),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_plain_version(name: str) -> None:
    check(CASES[name], torch.float16, 2e-3)


def test_fp32_is_fp32() -> None:
    check(MIXED, torch.float32, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("window_tokens", (None, 128, 16))
@pytest.mark.parametrize("group", (1, 3, 8))
@pytest.mark.parametrize("kv_dtype", (None, E4M3))
def test_all_together(window_tokens: int | None, group: int, kv_dtype: torch.dtype | None) -> None:
    decodes, chunks = (1, 15, 16, 17, 127, 128, 129, 300, 513), ((1, 1), (64, 64), (65, 200), (130, 301), (2, 17))
    case = Case(decodes, chunks, kv_heads=2, group=group, window_tokens=window_tokens, kv_dtype=kv_dtype)
    check(case, torch.float16, 2e-3)


@pytest.mark.parametrize("name", ["mixed", "chunk_window"])
def test_a_graph_of_chunks_finds_what_there_is(name: str) -> None:
    """The host knows the most decodes and tiles that there can be, no chunks: the same bits."""
    q_TND, kv_PCSKD, sinks_N, batch, pages = inputs(CASES[name], torch.float16)
    want = triton_attention.attend(q_TND, kv_PCSKD, sinks_N, batch, pages)
    tiles_X4 = torch.nn.functional.pad(batch.tiles_X4, (0, 0, 0, 3))
    batch = dataclasses.replace(batch, decodes=len(q_TND), chunks=(), tiles_X4=tiles_X4)
    assert torch.equal(triton_attention.attend(q_TND, kv_PCSKD, sinks_N, batch, pages), want)


def test_more_splits_than_blocks_and_fewer() -> None:
    """However a sequence is shared out, the result is the same up to rounding."""
    case = Case(decodes=(70, 20), chunks=((18, 49), (3, 3)), group=3, head_dim=16)
    q_TND, kv_PCSKD, sinks_N, batch, pages = inputs(case, torch.float32)
    want = attention.attend(q_TND, kv_PCSKD, sinks_N, batch, pages)
    for splits in (3, 7):
        out_TND = torch.full_like(q_TND, float("nan"))
        decodes = triton_attend_decodes.Tuning(16, 10_000, splits, share_per_program=1, warps=4, stages=1, together=2)
        triton_attend_decodes.attend_decodes(q_TND, kv_PCSKD, sinks_N, batch, pages, out_TND, decodes)
        chunks = triton_attend_chunks.Tuning(64, 16, warps=4, stages=1, programs=10_000, least_keys=49 // splits)
        triton_attend_chunks.attend_chunks(q_TND, kv_PCSKD, sinks_N, batch, pages, out_TND, chunks)
        torch.testing.assert_close(out_TND.flatten(1), want, rtol=0, atol=2e-6)


on_gpu = [pytest.param(dtype, marks=GPU) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("dtype", on_gpu)
@pytest.mark.parametrize("window_tokens", (None, 128))
@pytest.mark.parametrize("kv_dtype", (None, E4M3))
def test_published_shapes(dtype: torch.dtype, window_tokens: int | None, kv_dtype: torch.dtype | None) -> None:
    for decodes, chunks in (
        ((32768, 1, 129, 4000), ((2048, 2048), (100, 9000))),
        ((1024,) * 33, ()),
        ((), ((2048, 16384),)),
    ):
        case = Case(decodes, chunks, 8, 8, 64, window_tokens, kv_dtype)
        check(case, dtype, 1e-2 if dtype == torch.bfloat16 else 2e-3)


def captured(*given: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Attention as a graph, after a run that compiles it, and what it gives at each replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        triton_attention.attend(*given)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = triton_attention.attend(*given)
    return graph, got


@pytest.mark.parametrize("dtype", on_gpu)
def test_a_graph_serves_other_sequences(dtype: torch.dtype) -> None:
    """Captured once; then positions, rows and tables change, and the same graph is right for them."""
    long, short = (inputs(Case(lengths, (), 8, 8, 64), dtype) for lengths in ((3000, 2999), (1, 2000)))
    q_TND, _, sinks_N, batch, pages = long
    width = pages.table_RP.shape[1]
    kv_PCSKD = torch.zeros_like(long[1])
    graph, got = captured(q_TND, kv_PCSKD, sinks_N, batch, pages)
    for other in (long, short):
        _, other_kv, _, other_batch, other_pages = other
        want = attention.attend(q_TND.double(), other_kv.double(), sinks_N, other_batch, other_pages)
        kv_PCSKD[: len(other_kv)] = other_kv
        pages.table_RP.copy_(torch.nn.functional.pad(other_pages.table_RP, (0, width - other_pages.table_RP.shape[1])))
        batch.rows_T.copy_(other_batch.rows_T)
        batch.positions_T.copy_(other_batch.positions_T)
        graph.replay()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-2 * float(want.abs().max()))
        first = got.clone()
        graph.replay()
        assert torch.equal(first, got)


@pytest.mark.parametrize("dtype", on_gpu)
@pytest.mark.parametrize("window_tokens", (None, 128))
def test_a_graph_serves_other_chunks(dtype: torch.dtype, window_tokens: int | None) -> None:
    """As above, of steps with chunks and from no decode to many; all of 200 tokens."""
    steps = (
        Case((), ((200, 200),), 8, 8, 64, window_tokens),
        Case((5000, 1, 300) + (129,) * 37, ((100, 100), (1, 1), (59, 4000)), 8, 8, 64, window_tokens),
        Case((9000,), ((199, 9000),), 8, 8, 64, window_tokens),
    )
    most, width, pages = 60, 600, 1400
    device = {"device": "cuda"}
    q_TND, kv_PCSKD = (torch.zeros(shape, dtype=dtype, **device) for shape in ((200, 64, 64), (pages, 2, 16, 8, 64)))
    batch = Batch(
        tokens_T=torch.zeros(200, dtype=torch.int64, **device),
        positions_T=torch.zeros(200, dtype=torch.int64, **device),
        rows_T=torch.zeros(200, dtype=torch.int64, **device),
        decodes=most,
        decodes_1=torch.zeros(1, dtype=torch.int32, **device),
        chunks=(),
        tiles_X4=torch.zeros((20, 4), dtype=torch.int32, **device),
        pages={},
        wanted_S=None,
    )
    view = PageView(torch.zeros((most, width), dtype=torch.int32, **device), batch.tokens_T, window_tokens)
    sinks_N = inputs(steps[0], dtype)[2]
    graph, got = captured(q_TND, kv_PCSKD, sinks_N, batch, view)
    for case in steps:
        other_q, other_kv, other_sinks, other, other_view = inputs(case, dtype)
        want = attention.attend(other_q.double(), other_kv.double(), other_sinks, other, other_view)
        q_TND.copy_(other_q)
        kv_PCSKD[: len(other_kv)] = other_kv
        sinks_N.copy_(other_sinks)
        for name in ("positions_T", "rows_T", "decodes_1"):
            getattr(batch, name).copy_(getattr(other, name))
        batch.tiles_X4.zero_()[: len(other.tiles_X4)] = other.tiles_X4
        table_RP = other_view.table_RP
        view.table_RP[: len(table_RP), : table_RP.shape[1]] = table_RP
        graph.replay()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-2 * float(want.abs().max()))

"""The engine as it serves on a GPU: Triton's operations, graphs of decodes, steps launched ahead of their results."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from forced import answers, refusals
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.engine.measure import capture, compile_ahead, warm_up
from gptoss_launch.parallel.engine.record import Padding, Record, encode, only_padding, places
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.engine.schedule import Item, Running, Step
from gptoss_launch.parallel.engine.start import chunk_sizes
from gptoss_launch.parallel.kernels.choose import triton_operations
from gptoss_launch.parallel.model.random_checkpoint import write_checkpoint
from gptoss_launch.parallel.planning.plan import KvDType
from gptoss_launch.parallel.planning.spec import PUBLISHED, alternating_kinds
from small_models import TINY, plain_engine, plain_plan, prompt

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Two layers of gpt-oss-20b as published: small enough to be made in seconds
SPEC = dataclasses.replace(PUBLISHED["openai/gpt-oss-20b"], layers=2, layer_kinds=alternating_kinds(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "20b-2"
    write_checkpoint(out, SPEC, TINY / "tokenizer.json", 0, torch.device("cuda"))
    return out


def engine(
    folder: Path,
    graphs: tuple[int, ...],
    kv_dtype: KvDType = "bf16",
    *,
    chunks: Sequence[int] = (),
    sequences: int = 8,
    context_tokens: int = 2048,
    step_tokens: int = 512,
) -> Engine:
    plan = plain_plan(folder, "bf16", context_tokens, step_tokens, "cuda", sequences)
    plan = dataclasses.replace(plan, kernels="triton", kv_tokens=sequences * context_tokens, kv_dtype=kv_dtype)
    return plain_engine(plan, triton_operations(), graphs, chunks)


def requests(count: int, sampling: Sampling, prompt_tokens: int = 200) -> list[Request]:
    return [
        Request(f"{i}", tuple(prompt(SPEC, prompt_tokens, seed=i)), 40, dataclasses.replace(sampling, seed=i))
        for i in range(count)
    ]


WAYS = {
    "greedy": Sampling(temperature=0.0),
    "drawn": Sampling(),
    # cold enough for the first candidates to suffice: a draw that has to be repeated changes what the others share a
    # step with, and a step of another size may take other kernels
    "top_p": Sampling(temperature=0.2, top_p=0.9),
    "min_p": Sampling(min_p=0.05, top_k=50),
    "penalties": Sampling(presence=0.5, frequency=0.5),
    "repetition": Sampling(temperature=0.0, repetition=1.5),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 4, 8])
def test_graphs_give_the_same_tokens(folder: Path, way: str, count: int) -> None:
    """The same operations on the same numbers: no token may differ. As many requests as a graph of decodes holds, all
    of one length, and graphs of chunks for any size, so that no step is padded: padding may take other kernels."""
    asked = requests(count, WAYS[way])
    graphs, eager = engine(folder, (1, 4, 8), chunks=range(16, 513)), engine(folder, ())
    records: list[Record] = []
    launch = graphs.launch
    graphs.launch = lambda record: (records.append(record), launch(record))[1]
    assert answers(graphs, asked, ahead=True) == answers(eager, asked)
    prompts = [one for one in records if one.head.chunks]
    assert prompts and all(one.head.graph == one.head.tokens for one in prompts)
    assert not any(graphs.sizes.rows in one.words[places(one.head)["row"]].tolist() for one in prompts)


def test_a_step_that_draws_nothing_is_waited_for(folder: Path) -> None:
    """The middle of a long prompt: a host that did not wait would soon fill a buffer that is not read yet."""
    one = engine(folder, ())
    running = Running(Request("scratch", (0,) * 8, 1), 0.0, row=one.sizes.rows)
    record = encode(Step((Item(running, 0, 0, 4, draws=False),), 0, False, (), ()), 1, one.sizes)
    one.launch(record)  # whose kernels are compiled
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 30)
    launched = one.launch(record)
    assert not torch.cuda.current_stream().query()
    assert launched.results(0) == []
    assert torch.cuda.current_stream().query()


def forget_kernels() -> None:
    """Those of this process; Triton's cache on disk keeps them."""
    import triton

    ours = [module for name, module in sys.modules.items() if name.startswith("gptoss_launch.parallel.kernels.")]
    for one in (one for module in ours for one in vars(module).values() if isinstance(one, triton.JITFunction)):
        one.device_caches.clear()


def test_kernels_compiled_ahead_are_those_that_steps_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps, those that draw with everything among them, and the graphs' find every kernel in the process,
    and what the rehearsal left behind changes no token."""
    import triton

    asked = requests(4, WAYS["drawn"])
    usual, ahead = (engine(folder, (1, 4, 8), chunks=chunk_sizes(512)) for _ in range(2))
    first = [*(Padding(size) for size in (1, 4, 8)), *ahead.graphs.chunks]
    forget_kernels()
    compile_ahead(ahead, [*first[:3], *ahead.graphs.chunks[::4]])  # each twice the one before
    sought: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda *, fn, **facts: sought.append(fn.name)
    )  # called where a launch finds no kernel in the process
    warm_up(ahead)
    capture(ahead, first)
    assert sought == []
    assert answers(ahead, asked, ahead=True) == answers(usual, asked, ahead=True)


def test_graphs_prepared_ahead_are_those_that_steps_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smallest first, as while nobody asks; the largest is there from the start. No token changes."""
    asked = [Request(f"{n}", tuple(prompt(SPEC, n, seed=n)), 9, Sampling(seed=n)) for n in (20, 60, 130, 400)]
    usual, ahead = (engine(folder, (1, 2, 4), chunks=chunk_sizes(512)) for _ in range(2))
    for number, padding in enumerate((Padding(1), Padding(2), Padding(4), *ahead.graphs.chunks)):
        ahead.launch(only_padding(number, ahead.sizes, padding)).results(0)
    monkeypatch.setattr(ahead.graphs, "capture", lambda head: pytest.fail(f"{head} has no graph"))
    assert answers(ahead, asked, ahead=True) == answers(usual, asked, ahead=True)


@pytest.mark.parametrize(("context", "count"), [(16, 32), (127, 16), (128, 8), (129, 3), (4096, 3), (32768, 1)])
def test_graphs_give_the_same_numbers_at_every_context(folder: Path, context: int, count: int) -> None:
    """Log probabilities too. All prompts are one step, so that all decodes are together from the first to the last."""
    asked = [dataclasses.replace(one, max_tokens=12, logprobs=3) for one in requests(count, Sampling(), context)]
    step = context * count
    room = {"sequences": count, "context_tokens": max(context + 16, step), "step_tokens": step}
    graphs, eager = engine(folder, (count,), chunks=(step,), **room), engine(folder, (), **room)
    found = answers(graphs, asked, ahead=True)
    assert found == answers(eager, asked)
    assert {len(tokens) for tokens in found.values()} == {12}


def test_a_repeated_run_gives_the_same_bits(folder: Path) -> None:
    """Prompts of many lengths, more of them than run at a time, in padded graphs."""
    here = engine(folder, (1, 2, 4, 8), chunks=chunk_sizes(512))
    asked = [
        Request(f"{i}", tuple(prompt(SPEC, 30 + 97 * i, seed=i)), 10 + 7 * i, Sampling(seed=i), logprobs=3)
        for i in range(12)
    ]
    first = answers(here, asked, ahead=True)
    again = engine(folder, (1, 2, 4, 8), chunks=chunk_sizes(512))
    assert first == answers(again, asked, ahead=True)
    assert {name: len(tokens) for name, tokens in first.items()} == {f"{i}": 10 + 7 * i for i in range(12)}


def test_a_step_that_finds_no_memory_ends_its_requests_alone(folder: Path) -> None:
    """The allocator may have what it holds and no more; afterwards all is as before."""
    here = engine(folder, (1, 2, 4, 8), step_tokens=4096)
    asked = requests(2, Sampling(temperature=0.0), prompt_tokens=2000)
    wanted = answers(here, asked, ahead=True)
    torch.cuda.empty_cache()
    _, total_bytes = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 20)) / total_bytes)
    try:
        refused = refusals(here, asked[0])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(
        one.startswith("no memory on the device for a step of 2000 tokens: CUDA out of memory") for one in refused
    )
    assert answers(here, asked, ahead=True) == wanted


def test_fp8_pages(folder: Path) -> None:
    """The first token's logprobs are near those of bf16 pages, and not the same."""
    asked = [dataclasses.replace(one, max_tokens=1, logprobs=20) for one in requests(4, Sampling(temperature=0.0))]
    wide, narrow = answers(engine(folder, ()), asked), answers(engine(folder, (), "fp8"), asked)
    for name in wide:
        theirs = dict(wide[name][0].top)
        gaps = [abs(p - theirs[token]) for token, p in narrow[name][0].top if token in theirs]
        assert len(gaps) > 5 and 0 < max(gaps) < 1.0

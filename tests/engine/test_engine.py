"""The engine on real models, many requests at once: each yields what it yields alone, whatever else is in its steps."""

import dataclasses
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from forced import answers
from gptoss_launch.parallel.engine.engine import Engine, scheduler_for
from gptoss_launch.parallel.engine.grammars import grammars_of
from gptoss_launch.parallel.engine.leader import Device, Leader
from gptoss_launch.parallel.engine.measure import EVERYTHING, decode_step, scratch_step
from gptoss_launch.parallel.engine.record import Record
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.engine.start import DECODE_SIZES, decode_sizes
from gptoss_launch.parallel.engine.wire import Generate, Refused, Tokens
from gptoss_launch.parallel.engine.worker import launch_step
from gptoss_launch.parallel.kernels import PLAIN, sample
from gptoss_launch.parallel.kernels.batch import Batch
from small_models import SPECS, TINY, checkpoint, plain_engine, plain_plan, prompt
from thread_ranks import run_ranks, with_ranks
from torch import Tensor

SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(seed=7),
    Sampling(temperature=0.8, top_p=0.9, seed=8),
    Sampling(temperature=2.0, top_k=3, seed=9),
    Sampling(min_p=0.2, seed=10),
    Sampling(temperature=0.0, presence=1.5, frequency=0.5),
    Sampling(temperature=0.0, logit_bias=((5, 100.0),)),
    Sampling(temperature=0.0, repetition=1.5),
    Sampling(seed=12, repetition=0.8, frequency=0.5),
    Sampling(temperature=8.0, top_p=0.999, seed=11),  # deeper than the first candidates
)


def requests(spec) -> list[Request]:
    """Prompts of many lengths, some of which begin alike, each with another way to draw."""
    shared = prompt(spec, 60)
    found = []
    for index, sampling in enumerate(SAMPLINGS):
        own = prompt(spec, 5 + 11 * index, seed=index + 1)
        tokens = shared[: 20 * (index % 4)] + own
        found.append(Request(f"{index}", tuple(tokens), 8 + index, sampling, logprobs=index % 3 or None))
    return found


def ids(engine: Engine, asked: list[Request], *, ahead: bool) -> dict[str, list[int]]:
    given = answers(engine, asked, ahead=ahead)
    return {name: [token.id for token in tokens] for name, tokens in given.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    engine = plain_engine(plain_plan(TINY, "fp64"))
    return {name: tokens for one in requests(SPECS["tiny"]) for name, tokens in ids(engine, [one], ahead=False).items()}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("sequences", "kv_tokens", "step_tokens"), [(8, 1024, 512), (3, 224, 16)])
def test_together_as_alone(alone, sequences: int, kv_tokens: int, step_tokens: int, ahead: bool) -> None:
    """Also with few rows, few pages and small chunks: then some wait, and some are given up and computed again."""
    plan = plain_plan(TINY, "fp64", context_tokens=224, step_tokens=step_tokens, sequences=sequences)
    plan = dataclasses.replace(plan, kv_tokens=kv_tokens)
    assert ids(plain_engine(plan), requests(SPECS["tiny"]), ahead=ahead) == alone


@pytest.mark.parametrize("ranks", [2, 3])
def test_together_as_alone_over_ranks(alone, ranks: int) -> None:
    plan = with_ranks(plain_plan(TINY, "fp64", sequences=5, step_tokens=48), ranks, 1)
    asked = requests(SPECS["tiny"])
    for given in run_ranks(plan, lambda engine: ids(engine, asked, ahead=True)):
        assert given == alone


def test_fp8_pages_stay_close_to_wide_ones(tmp_path: Path) -> None:
    """Greedy tokens of a random model differ soon; the first logits after a prompt say how far fp8 is off."""
    from forced import prefill

    folder, spec = checkpoint("three_blocks", tmp_path), SPECS["three_blocks"]
    plan, tokens = plain_plan(folder), prompt(spec, 90)
    wide = prefill(plain_engine(plan), tokens, 32)
    narrow = prefill(plain_engine(dataclasses.replace(plan, kv_dtype="fp8")), tokens, 32)
    error = ((narrow - wide).abs().max() / wide.abs().max()).item()
    print(f"fp8 pages: largest error {error:.3f} of the largest logit")
    assert 0 < error < 0.1


def test_logprobs_are_those_of_the_model(alone) -> None:
    asked = [dataclasses.replace(one, logprobs=5) for one in requests(SPECS["tiny"])]
    given = answers(plain_engine(plain_plan(TINY, "fp64", sequences=8)), asked)
    for name, tokens in given.items():
        assert [token.id for token in tokens] == alone[name]
        for token in tokens:
            assert token.logprob is not None and token.logprob <= token.top[0][1] + 1e-6
            assert len(token.top) == 5 and [p for _, p in token.top] == sorted((p for _, p in token.top), reverse=True)
            if SAMPLINGS[int(name)] == Sampling(temperature=0.0):
                assert token.id == token.top[0][0] and token.logprob == pytest.approx(token.top[0][1])


ON_DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.")
IN_HOST = RuntimeError(
    "DefaultCPUAllocator: can't allocate memory: tried 9 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(("after", "error", "where"), [(0, ON_DEVICE, "on the device"), (2, IN_HOST, "in the host")])
def test_no_memory_for_a_step_ends_its_requests_and_not_the_engine(
    after: int, error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the prompt's step, or after two tokens; the same prompt is then computed anew."""
    engine, sent = plain_engine(plain_plan(TINY)), []
    request = Request("a", tuple(prompt(SPECS["tiny"], 40)), 6, Sampling(temperature=0.0))
    wanted = answers(plain_engine(plain_plan(TINY)), [request])["a"]
    device = Device(lambda record: launch_step(engine, record), engine.graphs.of, engine.sizes, ahead=False)
    matchers = grammars_of(str(TINY), SPECS["tiny"].vocab)
    leader = Leader(
        scheduler_for(engine.plan), device, lambda _, message: sent.append(message), lambda _: None, matchers
    )
    forward, calls = engine.forward, []

    def short(batch: Batch) -> Tensor:
        calls.append(batch)
        if len(calls) == after + 1:
            raise error
        return forward(batch)

    monkeypatch.setattr(engine, "forward", short)
    for one in (request, dataclasses.replace(request, id="b")):
        leader.take("test", Generate(one))
        while not leader.idle:
            leader.turn()
    tokens = [token for message in sent if isinstance(message, Tokens) for token in message.tokens]
    (refused,) = (message for message in sent if isinstance(message, Refused))
    why = ". ".join(str(error).split(". ")[:2])
    steps = 40 if after == 0 else 1
    assert refused == Refused("a", f"no memory {where} for a step of {steps} tokens: {why}")
    assert [token.id for token in tokens if token.request_id == "a"] == [token.id for token in wanted[:after]]
    assert [dataclasses.replace(token, request_id="a") for token in tokens if token.request_id == "b"] == wanted


def test_others_would_wait_where_one_rank_of_several_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = plain_engine(plain_plan(TINY))
    engine.plan = dataclasses.replace(engine.plan, ranks=2)

    def short(record: Record) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(engine, "launch", short)
    with pytest.raises(torch.OutOfMemoryError):
        launch_step(engine, decode_step(engine, 1))


@pytest.mark.parametrize(
    ("sequences", "sizes"), [(1, (1,)), (4, (1, 2, 4)), (6, (1, 2, 4, 6)), (256, DECODE_SIZES), (300, DECODE_SIZES)]
)
def test_no_graph_is_larger_than_the_plan(sequences: int, sizes: tuple[int, ...]) -> None:
    assert decode_sizes(sequences) == sizes


@pytest.mark.parametrize("exact", [False, True])
def test_nothing_is_looked_up_by_what_a_rehearsal_leaves(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    """The head, the upload and the draw do not run, and what they would have written is as wrong as can be."""
    wrong = 2**31 - 1

    def first(found_RSPX: Tensor, kept: sample.Kept | None) -> sample.Drawn:
        tokens_S = torch.full((found_RSPX.shape[1],), wrong)
        return sample.Drawn(tokens_S, torch.zeros_like(tokens_S, dtype=torch.bool))

    local = sample.Local(
        lambda logits_SV, *_: torch.full((len(logits_SV), 2, 3), wrong),
        first,
        lambda draws, token_SX, precision: torch.full(token_SX.shape, torch.nan, dtype=precision),
        lambda drawn, kept: None,
    )
    ops = dataclasses.replace(
        PLAIN,
        upload=lambda words_W, to_W: None,
        linear=lambda x_TH, weight_OH, bias_O=None, ranks=None: x_TH.new_full((len(x_TH), len(weight_OH)), torch.nan),
        sample=lambda *given: sample.sample(*given, local),
        sample_exact=lambda *given: sample.sample_exact(*given, local),
    )
    engine = plain_engine(plain_plan(TINY, sequences=4), ops)
    engine.words.device_W.fill_(wrong)
    monkeypatch.setattr(sample, "CANDIDATES", 8)
    engine.rehearse(scratch_step(engine, 1, 4, EVERYTHING, exact=exact))

"""Log probabilities over HTTP, from tiny itself in fp32: those of transformers' logits on the same tokens."""

import asyncio

import pytest
import torch
from forced import answers
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.engine.request import Request, Token
from in_process import Call, served
from oracles import load_transformers
from small_models import TINY, plain_engine, plain_plan

NEAR = 1e-4  # of a log probability, which is a number of some units; fp32 on both sides


class ModelEngine:
    """A replica in this process: the model answers a request at once. given: each request with its tokens."""

    ready, dead, running, restarts = True, False, 0, 0

    def __init__(self, engine: Engine):
        self.engine = engine
        self.given: list[tuple[Request, list[Token]]] = []

    async def generate(self, request):
        tokens = answers(self.engine, [request])[request.id]
        self.given.append((request, tokens))
        for token in tokens:
            await asyncio.sleep(0)
            yield token


@pytest.fixture(scope="module")
def engine() -> Engine:
    return plain_engine(plain_plan(TINY, "fp32", context_tokens=2048))


@pytest.fixture(scope="module")
def call(engine, tokenizer):
    replica = ModelEngine(engine)
    found = Call(served(tokenizer, replica))
    return found, replica


@pytest.fixture(scope="module")
def oracle():
    """oracle(request, its tokens) -> log softmax [tokens, vocabulary] before each of them."""
    model = load_transformers(TINY)

    @torch.no_grad()
    def run(request, tokens):
        ids = [*request.prompt_tokens, *(token.id for token in tokens)]
        logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        return logits[len(request.prompt_tokens) - 1 :].double().log_softmax(-1)

    return run


WAYS = (
    # biases, penalties and temperature come after what is told
    {"seed": 4, "temperature": 1.5, "presence_penalty": 1, "logit_bias": {"40": 3}},
    pytest.param({"temperature": 0}, marks=pytest.mark.slow),
    pytest.param({"seed": 3, "top_p": 0.9}, marks=pytest.mark.slow),
)


@pytest.mark.parametrize("way", WAYS)
def test_text(call, oracle, way):
    http, replica = call
    answer = http.complete(prompt="Once upon a time", max_tokens=12, logprobs=5, **way)
    request, tokens = replica.given[-1]
    told = answer.choices[0].logprobs
    shown = tokens if tokens[-1].finish_reason == "length" else tokens[:-1]
    assert len(told.tokens) == len(shown) > 3
    logprobs = oracle(request, tokens)[: len(shown)]
    wanted = logprobs.gather(1, torch.tensor([[token.id] for token in shown]))[:, 0]
    assert torch.tensor(told.token_logprobs).double().sub(wanted).abs().max() < NEAR
    for row, top, token in zip(logprobs, told.top_logprobs, told.tokens, strict=True):
        best = row.topk(5).values
        given = sorted(top.values(), reverse=True)
        assert torch.tensor(given[:5]).double().sub(best).abs().max() < NEAR and token in top
        assert len(given) == 5 + (top[token] < best[-1] - NEAR)
    streamed = http.complete(prompt="Once upon a time", max_tokens=12, logprobs=5, stream=True, **way)
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts for one in getattr(part, name)] == getattr(told, name)


@pytest.mark.parametrize("way", WAYS)
def test_chat(call, oracle, tokenizer, way):
    """The content's tokens are among those of the answer, in order; a random model's answers are mostly content."""
    http, replica = call
    answer = http.chat(max_tokens=24, logprobs=True, top_logprobs=3, **way)
    request, tokens = replica.given[-1]
    logprobs, place, entries = oracle(request, tokens), -1, answer.choices[0].logprobs.content
    assert len(entries) > 3
    assert b"".join(bytes(one.bytes) for one in entries).decode(errors="replace") == answer.choices[0].message.content
    for entry in entries:
        place = next(at for at in range(place + 1, len(tokens)) if entry.bytes == spell(tokenizer, tokens[at].id))
        row = logprobs[place]
        assert abs(entry.logprob - row[tokens[place].id].item()) < NEAR
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=NEAR)
        ids = [next(id for id in range(1024) if spell(tokenizer, id) == top.bytes) for top in entry.top_logprobs]
        assert row[ids].tolist() == pytest.approx([top.logprob for top in entry.top_logprobs], abs=NEAR)


def spell(tokenizer, id):
    return list(tokenizer.token_bytes(id))

"""Constrained requests on a real model: each as alone, whoever shares its steps; nobody else is changed by them; and an
end that says why where there is no way on.
"""

import dataclasses
import time
from concurrent.futures import Executor, Future
from functools import partial
from threading import Event

import pytest
import torch
from bounded_schemas import BOUNDED
from forced import AtOnce, Forced, answers
from gptoss_launch.launch.api.constraint import Format, Offered, constraint_for
from gptoss_launch.launch.harmony import stop_tokens
from gptoss_launch.launch.tokenizer import load_tokenizer
from gptoss_launch.parallel.engine.constraint import Constraint, Section
from gptoss_launch.parallel.engine.engine import Engine, refusal, scheduler_for
from gptoss_launch.parallel.engine.grammars import Grammars, Vocabulary, grammars_of
from gptoss_launch.parallel.engine.leader import Device, Leader
from gptoss_launch.parallel.engine.matcher import Alphabet
from gptoss_launch.parallel.engine.pages import Cache, Pool
from gptoss_launch.parallel.engine.request import Request, Sampling, Token
from gptoss_launch.parallel.engine.schedule import Running
from gptoss_launch.parallel.engine.wire import Cancel, Done, Generate, Message, Refused, Tokens
from gptoss_launch.parallel.planning.plan import Plan
from small_models import SPECS, TINY, plain_engine, plain_plan, prompt
from thread_ranks import run_ranks, with_ranks

TOKENIZER = load_tokenizer(TINY)
STOPS = stop_tokens(TOKENIZER)
SPEC = SPECS["tiny"]
TOOLS = (Offered("pick", BOUNDED["enums"], True, ""), Offered("say", BOUNDED["const"], True, ""))


def constrained() -> list[Request]:
    """Prompts that begin alike and are longer than a page, each with another demand and another way to draw."""
    shared = prompt(SPEC, 44)
    demands = (
        constraint_for(TOKENIZER, response_format=Format(BOUNDED["arrays"], True, ""), max_reasoning_tokens=9),
        constraint_for(TOKENIZER, TOOLS, "required", max_reasoning_tokens=3),
        constraint_for(TOKENIZER, response_format=Format(None, True, ""), max_reasoning_tokens=0),
    )
    samplings = (Sampling(seed=3, top_p=0.9), Sampling(temperature=0.0), Sampling(seed=5, presence=1.0))
    return [
        Request(f"g{number}", (*shared, number), 22, sampling, STOPS, constraint=demand)
        for number, (demand, sampling) in enumerate(zip(demands, samplings, strict=True))
    ]


def free() -> list[Request]:
    return [
        Request(f"f{number}", tuple(prompt(SPEC, 30 + 20 * number, seed=number)), 10, Sampling(seed=number))
        for number in range(3)
    ]


def ids(engine: Engine, asked: list[Request], *, ahead: bool) -> dict[str, list[int]]:
    return {name: [token.id for token in given] for name, given in answers(engine, asked, ahead=ahead).items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    engine = plain_engine(plain_plan(TINY, "fp64"))
    everyone = [*constrained(), *free()]
    return {name: given for one in everyone for name, given in ids(engine, [one], ahead=False).items()}


@pytest.mark.slow
def test_together_as_alone_over_ranks(alone) -> None:
    plan = with_ranks(plain_plan(TINY, "fp64", sequences=6, step_tokens=48), 2, 1)
    for given in run_ranks(plan, lambda engine: ids(engine, [*constrained(), *free()], ahead=True)):
        assert given == alone


def test_logprobs_are_the_models_own_before_any_mask(alone) -> None:
    request = dataclasses.replace(constrained()[1], logprobs=3)
    given = answers(plain_engine(plain_plan(TINY, "fp64")), [request])[request.id]
    assert [token.id for token in given] == alone[request.id]
    forced = Forced(plain_engine(plain_plan(TINY, "fp64")))
    logits = forced.step([*request.prompt_tokens, *(token.id for token in given[:-1])], wanted=slice(-len(given), None))
    expected = torch.log_softmax(logits, dim=-1)
    for token, row in zip(given, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-6)
        assert [one for one, _ in token.top] == row.topk(3).indices.tolist()
    ruled_out = [token for token in given if token.id not in [one for one, _ in token.top]]
    assert ruled_out, "greedily drawn, but for the mask"


# --- the leader's loop, with real threads


class Loop:
    """A leader in this process, and what it says of each request. sent: by request, tokens, Refused and Done."""

    def __init__(
        self, grammars: Grammars, plan: Plan | None = None, pages: int | None = None, *, ahead: bool = True
    ) -> None:
        self.began: list[Running] = []
        self.engine = plain_engine(plan or plain_plan(TINY, "fp32", sequences=4))
        self.sent: dict[str, list[Token | Refused | Done]] = {}
        device = Device(self.engine.launch, self.engine.graphs.of, self.engine.sizes, ahead)
        self.scheduler = scheduler_for(self.engine.plan)
        if pages is not None:
            self.scheduler.cache = Cache(Pool(pages), SPEC, self.engine.plan.page_tokens)
        self.leader = Leader(self.scheduler, device, self._send, partial(refusal, self.engine.plan), grammars)

    def _send(self, front_end: str, message: Message) -> None:
        for one in message.tokens if isinstance(message, Tokens) else [message]:
            if isinstance(one, Token | Refused | Done):
                self.sent.setdefault(one.request_id, []).append(one)

    def run(self, *requests: Request) -> None:
        for request in requests:
            self.leader.take("test", Generate(request))
        self.began += self.leader._requests.values()
        limit_s = time.monotonic() + 60
        while not self.leader.idle:
            assert time.monotonic() < limit_s, "it never ends"
            self.leader.turn()
        assert self.scheduler.cache.pool.available == self.scheduler.cache.pool.pages


@pytest.mark.parametrize(
    ("pages", "step_tokens", "ahead"),
    [
        (12, 16, True),
        pytest.param(12, 16, False, marks=pytest.mark.slow),
        pytest.param(None, 512, True, marks=pytest.mark.slow),
    ],
)
def test_together_as_alone(alone, pages: int | None, step_tokens: int, ahead: bool) -> None:
    """Also where pages run out, so that some are given up in mid-answer and found again in part."""
    plan = plain_plan(TINY, "fp64", context_tokens=112, step_tokens=step_tokens, sequences=6)
    # At once where it is told below who was given up: threads would make that a matter of luck.
    threads = AtOnce() if pages else None
    loop = Loop(Grammars(lambda: Vocabulary(TINY, SPEC.vocab), threads, threads), plan, pages, ahead=ahead)
    loop.run(*constrained(), *free())
    for name, expected in alone.items():
        *tokens, done = loop.sent[name]
        assert [token.id for token in tokens] == expected and isinstance(done, Done)
    preempted = [running for running in loop.began if running.preempted]
    assert pages is None or any(running.matcher is not None for running in preempted)
    assert pages is None or any(running.matcher is not None and running.cached_tokens for running in loop.began)


def test_no_way_on_ends_the_request_and_no_other() -> None:
    """A vocabulary without the letters that the grammar asks for, and a grammar that does not compile."""

    def lame() -> Vocabulary:
        vocabulary = Vocabulary(TINY, SPEC.vocab)
        few = [token for token in range(1000) if b"t" not in vocabulary.tokenizer.decode_bytes([token])]
        vocabulary.alphabet = Alphabet(vocabulary.alphabet.only(few))
        return vocabulary

    header = (TOKENIZER.special["<|message|>"],)

    def asks(name: str, grammar: str) -> Request:
        demand = Constraint((Section((header,), (STOPS[0],), grammar),), ())
        return Request(name, tuple(prompt(SPEC, 20)), 30, stop_tokens=STOPS, constraint=demand)

    word = '{"grammars": [{"json_schema": {"enum": ["bitter"], "x-guidance": {"whitespace_flexible": false}}}]}'
    loop = Loop(Grammars(lame))
    loop.run(asks("stuck", word), free()[0], asks("no grammar", '{"grammars": [{"json_schema": {"type": "x"}}]}'))
    *tokens, last = loop.sent["stuck"]
    assert tokens and isinstance(last, Refused) and "no token of the vocabulary" in last.message
    assert [type(one) for one in loop.sent["no grammar"]] == [Refused] and "x" in loop.sent["no grammar"][0].message
    assert isinstance(loop.sent["f0"][-1], Done) and len(loop.sent["f0"]) == 11
    loop.run(dataclasses.replace(free()[0], id="later"))  # the leader lives on
    assert isinstance(loop.sent["later"][-1], Done)


class Nobody(Executor):
    """Takes work and never does it."""

    def submit(self, work, /, *arguments):
        return Future()


def test_while_a_grammar_compiles_others_go_on() -> None:
    loop = Loop(Grammars(lambda: Vocabulary(TINY, SPEC.vocab), compiling=Nobody()))
    cancelled, late, lost = constrained()
    for front_end, request in (("a", cancelled), ("a", dataclasses.replace(late, deadline_s=0.5)), ("b", lost)):
        loop.leader.take(front_end, Generate(request))
    loop.leader.take("c", Generate(free()[0]))
    limit_s = time.monotonic() + 60
    while not loop.sent.keys() >= {"f0", late.id} or not isinstance(loop.sent["f0"][-1], Done):
        assert time.monotonic() < limit_s
        loop.leader.turn()
    assert [type(one) for one in loop.sent[late.id]] == [Token, Done]
    assert loop.sent[late.id][0].finish_reason == "deadline"
    loop.leader.take("a", Cancel(cancelled.id))
    assert not loop.leader.idle
    loop.leader.take("b", None)
    assert loop.leader.idle and loop.sent.keys() == {"f0", late.id}


def test_what_nobody_waits_for_any_more_is_not_compiled() -> None:
    """A client that left, a deadline that is over: each would hold up the next one by as much as 2 s."""
    begun, let_go, compiled = Event(), Event(), []

    class Watched(Vocabulary):
        def compile(self, grammar: str) -> object:
            compiled.append(grammar)
            begun.set()
            assert let_go.wait(60)
            return super().compile(grammar)

    asks = [
        Request(name, tuple(prompt(SPEC, 9)), 2, stop_tokens=STOPS, constraint=demand, deadline_s=deadline_s)
        for name, deadline_s in (("first", None), ("left", None), ("late", 0.01), ("last", None))
        if (demand := constraint_for(TOKENIZER, response_format=Format({"const": name}, True, "")))
    ]
    loop = Loop(Grammars(lambda: Watched(TINY, SPEC.vocab)))
    for request in asks:
        loop.leader.take("test", Generate(request))
    assert begun.wait(60)
    loop.leader.take("test", Cancel("left"))
    while "late" not in loop.sent:
        loop.leader.turn()
    let_go.set()
    loop.run()
    assert [type(one) for one in loop.sent["last"]] == [Token, Token, Done]
    wanted = [request.constraint.sections[-1].grammar for request in (asks[0], asks[3]) if request.constraint]
    assert compiled == wanted


def test_a_flaw_is_refused_at_the_door() -> None:
    loop = Loop(grammars_of(str(TINY), SPEC.vocab))
    bad = dataclasses.replace(constrained()[0], constraint=Constraint((), ()))
    loop.leader.take("test", Generate(bad))
    assert [type(one) for one in loop.sent[bad.id]] == [Refused] and loop.leader.idle

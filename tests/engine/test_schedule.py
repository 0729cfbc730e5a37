"""The scheduler, the cache and the leader's loop against a fake model, through random arrivals, cancellations,
deadlines, preemptions, prefix hits and void draws: every request yields what it yields alone, and no page is lost or
shared by mistake.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import pytest
from fake_device import EveryThird, FakeDevice, alone, matcher_of
from gptoss_launch.parallel.engine.graphs import Graphs
from gptoss_launch.parallel.engine.leader import Device, Launched, Leader, StepError
from gptoss_launch.parallel.engine.pages import DROPPED, Cache, Pool
from gptoss_launch.parallel.engine.record import LAST_NUMBER, Record, Sizes
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.engine.schedule import Limits, Matcher, Scheduler
from gptoss_launch.parallel.engine.start import chunk_sizes
from gptoss_launch.parallel.engine.wire import Cancel, Done, Generate, Message, Refused, Stats, Tokens
from gptoss_launch.parallel.planning.pages import full_pages, window_pages
from gptoss_launch.parallel.planning.spec import PUBLISHED, Spec, alternating_kinds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

VOCAB = 50


@dataclass(frozen=True)
class World:
    """How much room there is, and how busy it gets."""

    seed: int
    rows: int
    page_tokens: int
    window_tokens: int
    context_tokens: int
    spare_pages: int  # beyond what the longest request needs alone
    step_tokens: int
    ahead: bool
    void_share: float
    busy: float  # arrivals a step
    failing_share: float = 0.0  # of steps for which the device has no memory

    @property
    def spec(self) -> Spec:
        published = PUBLISHED["openai/gpt-oss-20b"]
        return dataclasses.replace(
            published, layers=2, layer_kinds=alternating_kinds(2), window_tokens=self.window_tokens, vocab=VOCAB
        )

    @property
    def pages(self) -> int:
        most = full_pages(self.spec, self.context_tokens, self.page_tokens)
        return most + window_pages(self.spec, self.step_tokens, self.page_tokens) + self.spare_pages


worlds = st.builds(
    World,
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 7),
    page_tokens=st.sampled_from([2, 4, 16]),
    window_tokens=st.sampled_from([3, 8, 20]),
    context_tokens=st.sampled_from([40, 64, 100]),
    spare_pages=st.integers(0, 40),
    step_tokens=st.sampled_from([8, 16, 48]),
    ahead=st.booleans(),
    void_share=st.sampled_from([0.0, 0.02, 0.2]),
    failing_share=st.sampled_from([0.0, 0.0, 0.05]),
    busy=st.sampled_from([0.05, 0.2, 1.0]),
)


@dataclass
class Story:
    """One request from outside: what it was, what it gave, and how it ended."""

    request: Request
    given: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: bool = False
    done: Done | None = None
    arrived_s: float = 0.0


@dataclass
class Slow:
    """A matcher that is ready some time after each token, if it does not fail. luck: between 0 and 1."""

    matcher: EveryThird
    luck: Callable[[], float]
    waits: bool = False
    failure: str | None = None

    @property
    def ready(self) -> bool:
        if self.waits and self.failure is None:
            luck = self.luck()
            self.failure = "a dead end" if luck < 0.002 else None
            self.waits = luck < 0.5
        return not self.waits

    def allowed(self) -> bytes:
        assert not self.waits
        return self.matcher.allowed()

    def accept(self, token: int) -> None:
        assert not self.waits
        self.matcher.accept(token)
        self.waits = True

    def drop(self) -> None:
        self.failure = "it is used after its end"


def _nothing(*_: object) -> NoReturn:
    raise AssertionError("no graph runs here")


class Simulation:
    def __init__(self, world: World) -> None:
        self.world = world
        self.random = random.Random(world.seed)
        self.luck = random.Random(world.seed)  # apart: what arrives does not hang on how often it is asked
        self.now_s = 0.0
        self.step = 0
        sizes = Sizes(
            rows=world.rows,
            row_pages=-(-world.context_tokens // world.page_tokens),
            scratch_page=world.pages,
            step_tokens=max(world.step_tokens, world.rows),
            page_tokens=world.page_tokens,
            vocab=VOCAB,
        )
        self.device = FakeDevice(sizes, world.window_tokens, lambda: self.random.random() < world.void_share)
        cache = Cache(Pool(world.pages), world.spec, world.page_tokens)
        self.scheduler = Scheduler(cache, Limits(world.rows, sizes.step_tokens, sizes.changes, sizes.most_biased))
        sized = ((1, 2, 4), chunk_sizes(sizes.step_tokens)) if world.ahead else ((), ())
        graphs = Graphs(*sized, sizes.rows, run=_nothing)
        self.leader = Leader(
            self.scheduler,
            Device(self._launch, graphs.of, sizes, world.ahead, graphs.chunks),
            self._send,
            self._refusal,
            self,
            clock=lambda: self.now_s,
        )
        self.leader._number = LAST_NUMBER - 100  # so that numbers begin again on the way
        self.stories: dict[str, Story] = {}
        self.families = [self._tokens(world.context_tokens) for _ in range(3)]
        self.stats: Stats | None = None
        self.waits = self.failures = self.prepared = 0

    def matcher_of(self, request: Request) -> Matcher | None:
        matcher = matcher_of(request, VOCAB)
        return None if matcher is None else Slow(matcher, self.luck.random)

    def _launch(self, record: Record) -> Launched:
        if self.world.failing_share and self.luck.random() < self.world.failing_share:
            raise StepError("no memory")
        return self.device.launch(record)

    def wait(self, limit_s: float) -> None:
        self.waits += 1

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB) for _ in range(count)]

    def _refusal(self, request: Request) -> str | None:
        too_long = len(request.prompt_tokens) + request.max_tokens > self.world.context_tokens
        return "too long" if too_long else None

    def _send(self, front_end: str, message: Message) -> None:
        match message:
            case Tokens(tokens):
                for token in tokens:
                    story = self.stories[token.request_id]
                    assert front_end == "F" + token.request_id[0]
                    assert story.finish_reason is None and not story.cancelled
                    if token.id >= 0:
                        story.given.append(token.id)
                    story.finish_reason = token.finish_reason
            case Done():
                story = self.stories[message.request_id]
                assert story.finish_reason is not None and story.done is None
                assert message.tokens == len(story.given) and min(message.queue_s, message.prefill_s) >= 0
                story.done = message
            case Refused(request_id, reason):
                assert reason in ("a dead end", "no memory")
                self.failures += reason == "no memory"
                assert self.stories[request_id].finish_reason is None and not self.stories[request_id].cancelled
                self.stories[request_id].finish_reason = "refused"
            case Stats():
                self.stats = message

    def arrive(self) -> None:
        r = self.random
        name = f"{r.randrange(2)}-{len(self.stories)}{r.choice(['', '', '', 'g'])}"
        family = r.choice(self.families)
        shared = r.randrange(len(family))
        prompt = family[:shared] + self._tokens(r.randrange(1, 12))
        prompt = prompt[: self.world.context_tokens - 1]
        most = self.world.context_tokens - len(prompt)
        sampling = Sampling(
            presence=r.choice([0.0, 0.0, 0.0, 1.0]),
            frequency=r.choice([0.0, 0.0, 0.0, 0.5]),
            repetition=r.choice([1.0, 1.0, 1.0, 1.5]),
            logit_bias=tuple((r.randrange(VOCAB), float(r.randrange(5))) for _ in range(r.choice([0, 0, 0, 3]))),
            seed=r.randrange(2**63),
        )
        request = Request(
            name,
            tuple(prompt),
            r.randrange(1, most + 1),
            sampling,
            stop_tokens=tuple(self._tokens(r.choice([0, 1]))),
            deadline_s=r.choice([None, None, None, float(r.randrange(1, 400))]),
        )
        self.stories[name] = Story(request, arrived_s=self.now_s)
        self.leader.take("F" + name[0], Generate(request))

    def tick(self, *, arrivals: bool = True) -> None:
        r = self.random
        while self.leader.unprepared and self.leader.idle and self.luck.random() < 0.8:
            self.prepared += 1
            self.leader.prepare()
        if arrivals:
            while r.random() < self.world.busy / (1 + self.world.busy) and len(self.scheduler.waiting) < 30:
                self.arrive()
            alive = [s for s in self.stories.values() if s.finish_reason is None and not s.cancelled]
            if alive and r.random() < 0.02:
                story = r.choice(alive)
                story.cancelled = True
                self.leader.take("F" + story.request.id[0], Cancel(story.request.id))
            if r.random() < 0.001:
                for story in alive:
                    story.cancelled |= story.request.id[0] == "1"
                self.leader.take("F1", None)
        self.step += 1
        self.now_s += 1.0
        self.leader.turn()

    def check_pages(self) -> None:
        pool, held = self.scheduler.cache.pool, Counter[int]()
        for running in self.scheduler.running:
            for pages in running.table.pages.values():
                held.update(page for page in pages if page != DROPPED)
        assert all(not running.table.pages["full"] for running in self.scheduler.waiting)
        assert all(pool.holders(page) == held[page] for page in range(pool.pages))
        assert pool.available + len(held) == pool.pages
        rows = [running.row for running in self.scheduler.running]
        assert len(set(rows)) == len(rows)

    def check_stories(self) -> None:
        for story in self.stories.values():
            expected = alone(story.request, VOCAB)
            assert story.given == expected[: len(story.given)], story
            if story.finish_reason in ("stop", "length"):
                assert story.given == expected
                assert story.done is not None
            if story.finish_reason is None:
                assert story.cancelled, f"{story.request.id} never ended"
        # nobody starves: first come, first admitted
        done = [story for story in self.stories.values() if story.done is not None and story.given]
        admitted_s = [story.arrived_s + story.done.queue_s for story in done if story.done is not None]
        assert admitted_s == sorted(admitted_s)


def run(world: World, steps: int) -> Simulation:
    simulation = Simulation(world)
    for step in range(steps):
        simulation.tick()
        if step % 16 == 0:
            simulation.check_pages()
    for _ in range(100_000):
        if simulation.leader.idle:
            break
        simulation.tick(arrivals=False)
    assert simulation.leader.idle, "what was asked for never ends"
    simulation.check_pages()
    assert simulation.scheduler.cache.pool.available == world.pages
    simulation.check_stories()
    return simulation


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(worlds)
def test_every_request_yields_what_it_yields_alone(world: World) -> None:
    run(world, 150)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(deadline=None, max_examples=6, suppress_health_check=list(HealthCheck))
@given(worlds)
def test_twenty_thousand_steps(world: World) -> None:
    run(world, 20_000)


def test_a_step_that_fails_ends_its_own_requests_alone() -> None:
    """The others yield what they yield alone, on pages that the failed step was to write, too."""
    simulation = run(World(2, 5, 4, 8, 64, 20, 16, True, 0.05, 0.4, failing_share=0.05), 600)
    ended = Counter(story.finish_reason for story in simulation.stories.values())
    assert simulation.failures > 10 and ended["length"] > 10
    assert simulation.scheduler.counts.prefix_hit_tokens > 50


def test_the_simulation_meets_what_it_is_for() -> None:
    """Otherwise the tests above would prove less than they say."""
    world = World(1, 5, 4, 8, 64, 20, 16, True, 0.05, 0.4)
    simulation = run(world, 2500)
    counts = simulation.scheduler.counts
    assert counts.preemptions > 10 and counts.exact_draws > 20 and counts.prefix_hit_tokens > 500
    reasons = Counter(story.finish_reason for story in simulation.stories.values())
    assert simulation.waits > 10 and simulation.prepared
    assert min(reasons[reason] for reason in ("stop", "length", "deadline", None)) > 5
    assert reasons["refused"] > 0
    assert simulation.stats is not None and simulation.stats.preemptions_total == counts.preemptions

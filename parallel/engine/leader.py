"""The leader's loop: schedule -> encode -> launch -> accept, and a message for every front end.

On a GPU a step is launched before the tokens of the last one are known, so that the device never waits for the host.
Knows connections as keys to send to; knows no tensors and no text.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from ..offload.counts import Counts
from .record import Padding, Record, Sizes, after, encode, only_padding
from .request import Request, Token
from .schedule import Matcher, Result, Running, Scheduler, Step
from .wire import Cancel, Done, Generate, Message, Refused, Stats, Tokens

STATS_EVERY_S = 0.25
PAUSE_S = 0.001  # while there is nothing to do but wait for masks; what front ends say is looked at in between


class StepError(Exception):
    """Raised by `Device.launch`: why the step was not computed. The next one may be: this ends its requests alone."""


class Launched(Protocol):
    def results(self, count: int) -> list[Result]: ...


@dataclass(frozen=True)
class Device:
    """What the loop needs of the ranks. launch: tells all ranks, this one included, and does not wait. padding: of the
    graph that a step takes. ahead: whether a step is launched before the one before it is known. unprepared: graphs
    that are captured with their first step, unless there is time before."""

    launch: Callable[[Record], Launched]
    padding: Callable[[Step], Padding]
    sizes: Sizes
    ahead: bool
    unprepared: tuple[Padding, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What does not change any more, for Stats."""

    decode_step_s: float = 0.0
    communication_s: float = 0.0
    slow_paths: tuple[str, ...] = ()


class Matchers(Protocol):
    """Makes matchers (`grammars.Grammars`). wait: until one has become ready, at most so long."""

    def matcher_of(self, request: Request) -> Matcher | None: ...
    def wait(self, limit_s: float) -> None: ...


class Leader:
    """send: (front end, message). refusal: why a request can never run. matchers: of requests with a constraint."""

    def __init__(
        self,
        scheduler: Scheduler,
        device: Device,
        send: Callable[[Any, Message], None],
        refusal: Callable[[Request], str | None],
        matchers: Matchers,
        facts: Facts = Facts(),
        experts: Callable[[], Counts] = Counts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._device = device
        self._send = send
        self._refusal = refusal
        self._matchers = matchers
        self._facts = facts
        self._experts = experts
        self._clock = clock
        self._requests: dict[tuple[Hashable, str], Running] = {}
        self._compiling: dict[tuple[Hashable, str], Running] = {}  # of these, those whose matcher is not made yet
        self._front_ends: dict[Hashable, None] = {}
        self._under_way: tuple[Step, Launched] | None = None
        self._unprepared = deque(device.unprepared)
        self._number = 0
        self._stats_s = float("-inf")
        self._told: dict[Hashable, Stats] = {}

    @property
    def idle(self) -> bool:
        return self._scheduler.idle and self._under_way is None and not self._compiling

    def take(self, front_end: Hashable, message: Message | None) -> None:
        """One message from `front_end`; None: it is gone, and so is all that it asked for."""
        self._front_ends[front_end] = None
        match message:
            case Generate(request):
                self._start(front_end, request)
            case Cancel(request_id):
                self._cancel((front_end, request_id))
            case None:
                for key in [key for key in self._requests if key[0] == front_end]:
                    self._cancel(key)
                del self._front_ends[front_end]
                self._told.pop(front_end, None)

    @property
    def unprepared(self) -> bool:
        return bool(self._unprepared)

    def prepare(self) -> None:
        """The next graph, by a step of padding alone. For when nobody asks for anything."""
        assert self.idle
        self._number = after(self._number)
        record = only_padding(self._number, self._device.sizes, self._unprepared.popleft())
        try:
            self._device.launch(record).results(0)
        except StepError:  # a request that needs it will be told
            self._unprepared.clear()

    def turn(self) -> None:
        """One step, if there is anything to do, and the tokens that have come."""
        for key, running in list(self._compiling.items()):
            failed = running.matcher is not None and running.matcher.failure
            if running.masked or failed or running.deadline_s <= self._clock():
                self._scheduler.add(self._compiling.pop(key))
        for running, reason in self._scheduler.failed():
            self._scheduler.end(running)
            del self._requests[running.owner, running.request.id]
            self._send(running.owner, Refused(running.request.id, reason))
        for running in self._scheduler.expired(self._clock()):
            self._scheduler.end(running)
            self._send(running.owner, Tokens((Token(running.request.id, -1, "deadline"),)))
            self._finish(running)
        step = self._scheduler.schedule(self._clock())
        launched = failure = None
        if step is not None:
            padding = self._device.padding(step)
            self._number = after(self._number)
            try:
                launched = self._device.launch(encode(step, self._number, self._device.sizes, padding))
            except StepError as error:
                failure = str(error)
        if step is None and self._under_way is None and not self.idle:
            self._matchers.wait(PAUSE_S)
        if self._under_way is not None:
            self._accept(*self._under_way)
            self._under_way = None
        if step is not None and failure is not None:
            for running in self._scheduler.abandon(step):
                del self._requests[running.owner, running.request.id]
                self._send(running.owner, Refused(running.request.id, failure))
        if step is not None and launched is not None:
            if self._device.ahead:
                self._under_way = step, launched
            else:
                self._accept(step, launched)
        self._tell_stats()

    def _start(self, front_end: Hashable, request: Request) -> None:
        key = (front_end, request.id)
        reason = "there is a request of this id already" if key in self._requests else self._refusal(request)
        if reason is not None:
            self._send(front_end, Refused(request.id, reason))
            return
        running = Running(request, self._clock(), front_end, self._matchers.matcher_of(request))
        self._requests[key] = running
        if running.masked:
            self._scheduler.add(running)
        else:
            self._compiling[key] = running

    def _cancel(self, key: tuple[Hashable, str]) -> None:
        running = self._requests.pop(key, None)
        if running is None:
            return
        if self._compiling.pop(key, None) is None:
            self._scheduler.end(running)
        elif running.matcher is not None:
            running.matcher.drop()

    def _accept(self, step: Step, launched: Launched) -> None:
        """One message a front end for all its streams, then what ended."""
        results = launched.results(len(step.draws))
        tokens: dict[Hashable, list[Token]] = {}
        ended = []
        for running, token in self._scheduler.accept(step, results, self._clock()):
            tokens.setdefault(running.owner, []).append(token)
            if token.finish_reason is not None:
                ended.append(running)
        for front_end, several in tokens.items():
            self._send(front_end, Tokens(tuple(several)))
        for running in ended:
            self._finish(running)

    def _finish(self, running: Running) -> None:
        """The request is over; the scheduler knows."""
        del self._requests[running.owner, running.request.id]
        now_s = self._clock()
        began_s = now_s if running.began_s is None else running.began_s
        first_s = now_s if running.first_token_s is None else running.first_token_s
        done = Done(
            running.request.id,
            queue_s=began_s - running.arrived_s,
            prefill_s=first_s - began_s,
            decode_s=now_s - first_s,
            prompt_tokens=len(running.request.prompt_tokens),
            cached_tokens=running.cached_tokens,
            tokens=running.answered,
        )
        self._send(running.owner, done)

    def _tell_stats(self) -> None:
        """At most every STATS_EVERY_S, and once nothing is left to do; each front end only what is new to it."""
        now_s = self._clock()
        if not self.idle and now_s - self._stats_s < STATS_EVERY_S:
            return
        self._stats_s = now_s
        scheduler, counts, pool = self._scheduler, self._scheduler.counts, self._scheduler.cache.pool
        experts = self._experts()
        stats = Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_pages=pool.pages,
            kv_pages_used=pool.pages - pool.available,
            prefix_queried_tokens_total=counts.prefix_queried_tokens,
            prefix_hit_tokens_total=counts.prefix_hit_tokens,
            preemptions_total=counts.preemptions,
            exact_draws_total=counts.exact_draws,
            steps_total=counts.steps,
            prefill_tokens_total=counts.prefill_tokens,
            decode_tokens_total=counts.decode_tokens,
            expert_hits_total=experts.hits,
            expert_misses_total=experts.misses,
            expert_moved_bytes_total=experts.moved_bytes,
            expert_waited_s_total=experts.waited_s,
            expert_stalled_s_total=experts.stalled_s,
            expert_ahead_total=experts.ahead,
            expert_ahead_hits_total=experts.ahead_hits,
            decode_step_s=self._facts.decode_step_s,
            communication_s=self._facts.communication_s,
            slow_paths=self._facts.slow_paths,
        )
        for front_end in self._front_ends:
            if self._told.get(front_end) != stats:
                self._told[front_end] = stats
                self._send(front_end, stats)

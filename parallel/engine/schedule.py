"""Which tokens of which sequences go into the next step: continuous batching, decided by the leader alone.

Every step takes one token of each sequence that is decoding, and fills up with chunks of prompts, so that a long prompt
stalls nobody. A sequence that grows when no page is left takes the pages of the youngest one, which is computed again
later. A step may be made before the last one's tokens are known: what it reads then is still on the device.

Pure host arithmetic over requests, pages and token ids. Knows no tensors, no sockets and no clock but the one it is
given.
"""

from collections import deque
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Protocol

from .pages import Cache, Table
from .request import FinishReason, Request, Token


class Matcher(Protocol):
    """Which tokens may come next, by a grammar, for one request. No call waits; what is not ready is later."""

    @property
    def ready(self) -> bool:
        """Whether `allowed` and `accept` may be called; never again once there is a `failure`."""
        ...

    @property
    def failure(self) -> str | None:
        """Why no token may come next; the request ends with it."""
        ...

    def allowed(self) -> bytes:
        """A bit a token, lowest bit first, padded to whole 32-bit words; one at least."""
        ...

    def accept(self, token: int) -> None: ...

    def drop(self) -> None:
        """The request has ended. What is not begun for it need not be; nothing else is called any more."""
        ...


@dataclass(eq=False)
class Running:
    """One request and how far it is.

    owner: who asked for it, for whoever takes the tokens. tokens: prompt and answer, as far as the host knows it.
    pending: tokens drawn by steps that were launched and whose result is not known yet. row: in the device's tables, -1
    while waiting. epoch: grows when what is under way for it becomes void. exact: the last draw has to be repeated with
    all candidates. fresh: the device has yet to be told of this row's penalties and biases. cached_tokens: of the
    prompt, found in the cache when it was first admitted.
    """

    request: Request
    arrived_s: float
    owner: Hashable = None
    matcher: Matcher | None = None
    tokens: list[int] = field(default_factory=list)
    pending: int = 0
    table: Table = field(default_factory=Table)
    row: int = -1
    epoch: int = 0
    exact: bool = False
    fresh: bool = True
    cached_tokens: int = 0
    began_s: float | None = None
    first_token_s: float | None = None
    preempted: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_tokens)

    @property
    def answered(self) -> int:
        """Tokens of the answer that are known."""
        return len(self.tokens) - len(self.request.prompt_tokens)

    @property
    def to_compute(self) -> int:
        """Tokens that are not in the cache, those under way included."""
        return len(self.tokens) + self.pending - self.table.length

    @property
    def wants_more(self) -> bool:
        """Whether its answer is not complete with what is under way."""
        return self.answered + self.pending < self.request.max_tokens

    @property
    def masked(self) -> bool:
        """Whether it can be told which tokens may come next, if that is restricted at all."""
        return self.matcher is None or self.matcher.ready

    @property
    def counts(self) -> bool:
        """Whether the device counts the tokens of its answer."""
        return bool(self.request.sampling.presence or self.request.sampling.frequency or self.repeats)

    @property
    def repeats(self) -> bool:
        """Whether it marks those of its prompt as well."""
        return self.request.sampling.repetition != 1

    @property
    def deadline_s(self) -> float:
        limit_s = self.request.deadline_s
        return float("inf") if limit_s is None else self.arrived_s + limit_s


@dataclass(frozen=True)
class Item:
    """`count` tokens of a sequence from position `start` on; `draws`: the token after them is drawn."""

    running: Running
    epoch: int
    start: int
    count: int
    draws: bool


@dataclass(frozen=True)
class Step:
    """One forward pass: decodes first, then chunks. exact: draws look at all candidates. changes: (kind, row, index,
    page), what the device's page tables get first. fresh: sequences whose row begins with this step."""

    items: tuple[Item, ...]
    decodes: int
    exact: bool
    changes: tuple[tuple[str, int, int, int], ...]
    fresh: tuple[Running, ...]

    @property
    def tokens(self) -> int:
        return sum(item.count for item in self.items)

    @property
    def draws(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.draws)


@dataclass(frozen=True)
class Limits:
    """rows: sequences at a time. step_tokens: of one step. changes: page table entries that a step may change. biased:
    sequences with a logit_bias that may begin in one step."""

    rows: int
    step_tokens: int
    changes: int
    biased: int


@dataclass
class Counts:
    """What has been done since the start."""

    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    exact_draws: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0


@dataclass(frozen=True)
class Result:
    """What one draw gave. complete: False if the candidates did not suffice, and the token is void."""

    token: int
    complete: bool = True
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Scheduler:
    """Waiting and running sequences. `schedule` makes a step; `accept` takes its results, in the same order."""

    def __init__(self, cache: Cache, limits: Limits) -> None:
        self.cache = cache
        self.limits = limits
        self.counts = Counts()
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # in order of admission: the first was admitted first
        self._rows = list(range(limits.rows - 1, -1, -1))

    def add(self, running: Running) -> None:
        """The caller has made sure that it fits into the pool alone (`Engine.refusal`)."""
        self.waiting.append(running)

    def end(self, running: Running) -> None:
        """Nothing more of it is wanted. Its pages are free for the next step: steps run in order."""
        if running.row >= 0:
            self._leave(running)
            self.running.remove(running)
        else:
            self.waiting.remove(running)
        if running.matcher is not None:
            running.matcher.drop()

    def abandon(self, step: Step) -> list[Running]:
        """`step` was not computed: its sequences are ended, and returned. The device has not heard of their new pages,
        and pages were named as if they had been written."""
        lost = [item.running for item in step.items if item.running.row >= 0]
        for running in lost:
            self.end(running)
        self.cache.pool.forget()
        return lost

    def expired(self, now_s: float) -> list[Running]:
        """Those whose deadline is over; the caller ends them."""
        return [one for one in (*self.running, *self.waiting) if one.deadline_s <= now_s]

    def failed(self) -> list[tuple[Running, str]]:
        """Those whose grammar has no way on, and why; the caller ends them."""
        everyone = (*self.running, *self.waiting)
        return [(one, one.matcher.failure) for one in everyone if one.matcher is not None and one.matcher.failure]

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    # --- a step

    def schedule(self, now_s: float) -> Step | None:
        """The next step; None if there is nothing that could be done now."""
        budget = self.limits.step_tokens
        room = self.limits.changes
        decodes: list[Item] = []
        for running in list(self.running):
            if budget and running.row >= 0 and self._can_draw(running) and running.to_compute == 1:
                if self._make_room(running, 1):
                    decodes.append(self._item(running, 1))
                    budget -= 1
        # one that was given up after its turn came keeps nothing in this step
        decodes = [item for item in decodes if item.epoch == item.running.epoch]
        chunks: list[Item] = []
        for running in list(self.running):
            if budget and running.row >= 0 and running.to_compute > 1:
                count = min(budget, running.to_compute)
                if self._make_room(running, count):
                    chunks.append(self._item(running, count))
                    budget -= count
        decodes = [item for item in decodes if item.epoch == item.running.epoch]
        chunks = [item for item in chunks if item.epoch == item.running.epoch]
        room -= sum(len(item.running.table.changes) for item in (*decodes, *chunks))
        biased = self.limits.biased
        while budget and self.waiting and self._rows:
            running = self.waiting[0]
            if not running.masked:  # given up just after it drew: its mask is a moment away
                break
            prefix = self._prefix(running)
            count = min(budget, len(running.tokens) - prefix * self.cache.page_tokens)
            needed = len(self.cache.prefix_pages(running.table, prefix)) + 2 * (count // self.cache.page_tokens + 2)
            biased -= bool(running.request.sampling.logit_bias)
            if needed > room or biased < 0 or not self._fits(running, prefix, count):
                break
            self._admit(self.waiting.popleft(), prefix, now_s)
            item = self._item(running, count)
            (decodes if count == 1 and running.to_compute == 0 else chunks).append(item)
            room -= len(running.table.changes)
            budget -= count
        return self._step(decodes, chunks)

    def _can_draw(self, running: Running) -> bool:
        """A grammar has to see the last token first, and a repeated draw has to be right first."""
        waits = running.pending and (running.matcher is not None or running.exact)
        return running.wants_more and not waits and running.masked

    def _item(self, running: Running, count: int) -> Item:
        start = running.table.length
        self.cache.extend(running.table, count)
        return Item(running, running.epoch, start, count, draws=running.to_compute == 0)

    def _step(self, decodes: list[Item], chunks: list[Item]) -> Step | None:
        items = (*decodes, *chunks)
        if not items:
            return None
        changes: list[tuple[str, int, int, int]] = []
        fresh = []
        for item in items:
            running = item.running
            changes += [(kind, running.row, index, page) for kind, index, page in running.table.changes]
            running.table.changes.clear()
            if running.fresh:
                fresh.append(running)
                running.fresh = False
            if item.draws:
                running.pending += 1
            # steps run in order: what the next one writes into a page, it writes after this one has read it
            self.cache.drop_passed(running.table, len(running.tokens) - 1)
            self.cache.name_complete(running.table, running.tokens)
        exact = any(item.draws and item.running.exact for item in items)
        self.counts.steps += 1
        self.counts.decode_tokens += len(decodes)
        self.counts.prefill_tokens += sum(item.count for item in chunks)
        return Step(items, len(decodes), exact, tuple(changes), tuple(fresh))

    # --- pages

    def _make_room(self, running: Running, tokens: int) -> bool:
        """Whether `running` can have so many more tokens, the youngest giving way where it must; False if it was the
        youngest itself."""
        while self.cache.missing(running.table, tokens) > self.cache.pool.available:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is running:
                return False
        return True

    def _preempt(self, running: Running) -> None:
        self._leave(running)
        self.running.remove(running)
        running.preempted += 1
        self.counts.preemptions += 1
        self.waiting.appendleft(running)

    def _leave(self, running: Running) -> None:
        self._rows.append(running.row)
        running.row = -1
        running.epoch += 1
        running.pending = 0
        running.fresh = True
        self.cache.release(running.table)

    def _prefix(self, running: Running) -> int:
        """Whole pages of its beginning that are in the cache. At least one token is left to compute, as its logits are
        wanted; where the device counts the answer's tokens, or the prompt's, all of these go through it."""
        limit = len(running.request.prompt_tokens) if running.counts else len(running.tokens)
        limit = 0 if running.repeats else limit
        return self.cache.longest_prefix(running.table, running.tokens, min(limit, len(running.tokens) - 1))

    def _fits(self, running: Running, prefix: int, count: int) -> bool:
        """Whether all its tokens fit now, and one more page of each kind for everybody who runs: else admitting it
        would only push somebody out again."""
        cache = self.cache
        entries = cache.prefix_pages(running.table, prefix)
        kept = len({page for _, _, page in entries if cache.pool.is_kept(page)})
        start = prefix * cache.page_tokens
        last = -(-len(running.tokens) // cache.page_tokens)
        needed = kept
        if "full" in cache.kinds:
            needed += last - prefix
        if "window" in cache.kinds:
            needed += -(-(start + count) // cache.page_tokens) - prefix
        reserve = len(cache.kinds) * len(self.running)
        return needed + reserve <= cache.pool.available

    def _admit(self, running: Running, prefix: int, now_s: float) -> None:
        running.row = self._rows.pop()
        self.running.append(running)
        self.cache.adopt(running.table, prefix)
        if running.began_s is None:
            running.began_s = now_s
            running.cached_tokens = prefix * self.cache.page_tokens
            self.counts.prefix_queried_tokens += len(running.tokens)
            self.counts.prefix_hit_tokens += running.cached_tokens

    # --- results

    def accept(self, step: Step, results: Many[Result], now_s: float) -> Iterator[tuple[Running, Token]]:
        """The tokens that `step` gave, those of ended or preempted sequences left out. A sequence whose token carries a
        finish_reason has ended."""
        for item, result in zip(step.draws, results, strict=True):
            running = item.running
            if item.epoch != running.epoch:
                continue
            if not result.complete:
                self._repeat(running)
                continue
            running.exact = False
            running.pending -= 1
            running.tokens.append(result.token)
            if running.first_token_s is None:
                running.first_token_s = now_s
            self.cache.name_complete(running.table, running.tokens)
            reason = self._finish_reason(running, result.token)
            if reason is not None:
                self.end(running)
            elif running.matcher is not None:
                running.matcher.accept(result.token)
            yield running, Token(running.request.id, result.token, reason, result.logprob, result.top)

    def _finish_reason(self, running: Running, token: int) -> FinishReason | None:
        if token in running.request.stop_tokens:
            return "stop"
        return None if running.answered < running.request.max_tokens else "length"

    def _repeat(self, running: Running) -> None:
        """Draw the same token again, with all candidates: the last token before it goes through the model once more.

        What the void token did to the device's counts cannot be taken back: there the whole sequence begins again.
        """
        self.counts.exact_draws += 1
        running.exact = True
        if running.counts:
            self._leave(running)
            self.running.remove(running)
            self.waiting.appendleft(running)
            return
        running.epoch += 1
        running.pending = 0
        running.table.length = len(running.tokens) - 1

"""What tests ask of an engine in their own process: logits of given tokens, and answers of requests.

Where a replica has several ranks every rank asks the same: leaders that get the same requests make the same steps.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from pathlib import Path

import torch
from gptoss_launch.parallel.engine import inputs
from gptoss_launch.parallel.engine.engine import Engine, refusal, scheduler_for
from gptoss_launch.parallel.engine.grammars import Grammars, Vocabulary
from gptoss_launch.parallel.engine.leader import Device, Leader
from gptoss_launch.parallel.engine.record import encode
from gptoss_launch.parallel.engine.request import Request, Token
from gptoss_launch.parallel.engine.schedule import Item, Running, Step
from gptoss_launch.parallel.engine.wire import Generate, Message, Refused, Tokens
from gptoss_launch.parallel.engine.worker import launch_step
from torch import Tensor


class ForcedRows:
    """Sequences of known tokens, one a row: what of them goes through the model together, and from where on, is the
    caller's choice. A place may be computed again: a sequence goes on from wherever it is put."""

    def __init__(self, engine: Engine, sequences: Sequence[list[int]], rows: Sequence[int] | None = None) -> None:
        self.engine = engine
        self.cache = scheduler_for(engine.plan).cache
        self.running = [Running(Request("forced", (0,), 1), 0.0, row=row) for row in rows or range(len(sequences))]
        for running, tokens in zip(self.running, sequences, strict=True):
            running.tokens = tokens
        self._steps = 0

    def chunk(self, index: int, start: int, stop: int, wanted: slice = slice(-1, None)) -> Tensor:
        """Logits [S, V] after the wanted ones of the tokens start to stop of a sequence."""
        return self._step([self._item(index, start, stop)], int(stop - start == 1), wanted)

    def decodes(self, indices: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Logits [S, V] after the token at its start, of each of these sequences, all in one step."""
        items = [self._item(index, start, start + 1) for index, start in zip(indices, starts, strict=True)]
        return self._step(items, len(items), slice(None))

    def fill(self, index: int, start: int, stop: int) -> None:
        """The tokens start to stop of a sequence, a step's worth at a time. Nothing before stop is computed again."""
        for first in range(start, stop, self.engine.plan.step_tokens):
            self.chunk(index, first, min(first + self.engine.plan.step_tokens, stop))
            self.cache.drop_passed(self.running[index].table, stop)

    def drop_passed(self, index: int, known: int) -> None:
        self.cache.drop_passed(self.running[index].table, known)

    def _item(self, index: int, start: int, stop: int) -> Item:
        running = self.running[index]
        running.table.length = start
        self.cache.extend(running.table, stop - start)
        return Item(running, 0, start, stop - start, draws=True)

    def _step(self, items: list[Item], decodes: int, wanted: slice) -> Tensor:
        """Logits over the vocabulary rows of this rank."""
        engine = self.engine
        changes = []
        for item in items:
            table = item.running.table
            changes += [(kind, item.running.row, index, page) for kind, index, page in table.changes]
            table.changes.clear()
        record = encode(Step(tuple(items), decodes, False, tuple(changes), ()), self._steps, engine.sizes)
        self._steps += 1
        if engine.device.type == "cuda" and self._steps % 2:  # the host's buffer of a record is used again after four
            torch.cuda.synchronize()
        with torch.inference_mode():
            engine.words.upload(record)
            words_W = engine.words.device_W
            inputs.begin_rows(record.head, words_W, engine.rows)
            batch = inputs.batch(
                record.head,
                record.chunks,
                words_W,
                engine.rows,
                engine.plan.spec,
                engine.plan.page_tokens,
                engine.ops.locate,
            )
            every = torch.arange(len(batch.tokens_T), device=engine.device)
            return engine.forward(dataclasses.replace(batch, wanted_S=every[wanted]))


class Forced:
    """One sequence in row 0. `step` takes its next tokens."""

    def __init__(self, engine: Engine, row: int = 0) -> None:
        self.engine = engine
        self._rows = ForcedRows(engine, [[]], [row])
        self.running = self._rows.running[0]

    def step(self, tokens: list[int], wanted: slice = slice(-1, None)) -> Tensor:
        """Logits [S, V] after the wanted ones of `tokens`, over the vocabulary rows of this rank."""
        start = len(self.running.tokens)
        self.running.tokens += tokens
        logits_SV = self._rows.chunk(0, start, start + len(tokens), wanted)
        self._rows.drop_passed(0, start + len(tokens) - 1)
        return logits_SV


def prefill(engine: Engine, tokens: list[int], chunk: int) -> Tensor:
    """Logits [1, V] after the last of `tokens`, which go through the model in chunks."""
    forced = Forced(engine)
    for start in range(0, len(tokens) - chunk, chunk):
        forced.step(tokens[start : start + chunk])
    return forced.step(tokens[(len(tokens) - 1) // chunk * chunk :])


class AtOnce(Executor):
    """Work is done when it is submitted."""

    def submit(self, work, /, *arguments):
        future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def answers(engine: Engine, requests: Sequence[Request], *, ahead: bool = False) -> dict[str, list[Token]]:
    """The tokens of each request, all of them asked for at once."""
    given: dict[str, list[Token]] = {request.id: [] for request in requests}

    def send(front_end: str, message: Message) -> None:
        assert not isinstance(message, Refused), message
        if isinstance(message, Tokens):
            for token in message.tokens:
                given[token.request_id].append(token)

    device = Device(engine.launch, engine.graphs.of, engine.sizes, ahead)
    # At once and not beside the steps: leaders of several ranks must make the same ones.
    at_once = AtOnce()
    grammars = Grammars(lambda: Vocabulary(Path(engine.plan.checkpoint), engine.plan.spec.vocab), at_once, at_once)
    leader = Leader(scheduler_for(engine.plan), device, send, lambda request: refusal(engine.plan, request), grammars)
    for request in requests:
        leader.take("test", Generate(request))
    while not leader.idle:
        leader.turn()
    return given


def refusals(engine: Engine, request: Request) -> list[str]:
    """What a leader that is asked twice says, which gives no token: its requests fail, and it lives."""
    sent: list[Message] = []
    device = Device(lambda record: launch_step(engine, record), engine.graphs.of, engine.sizes, ahead=False)
    at_once = AtOnce()
    grammars = Grammars(lambda: Vocabulary(Path(engine.plan.checkpoint), engine.plan.spec.vocab), at_once, at_once)
    leader = Leader(scheduler_for(engine.plan), device, lambda _, one: sent.append(one), lambda _: None, grammars)
    for id in "ab":
        leader.take("test", Generate(dataclasses.replace(request, id=id)))
        while not leader.idle:
            leader.turn()
    refused = {one.request_id: one.message for one in sent if isinstance(one, Refused)}
    assert list(refused) == ["a", "b"] and not any(isinstance(one, Tokens) for one in sent)
    return list(refused.values())

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
from torch import Tensor


class Forced:
    """One sequence in row 0. `step` takes its next tokens."""

    def __init__(self, engine: Engine, row: int = 0) -> None:
        self.engine = engine
        self.cache = scheduler_for(engine.plan).cache
        self.running = Running(Request("forced", (0,), 1), 0.0, row=row)
        self.running.tokens = []

    def step(self, tokens: list[int], wanted: slice = slice(-1, None)) -> Tensor:
        """Logits [S, V] after the wanted ones of `tokens`, over the vocabulary rows of this rank."""
        engine, running, table = self.engine, self.running, self.running.table
        start = table.length
        running.tokens += tokens
        self.cache.extend(table, len(tokens))
        changes = tuple((kind, running.row, index, page) for kind, index, page in table.changes)
        table.changes.clear()
        item = Item(running, 0, start, len(tokens), draws=True)
        record = encode(Step((item,), int(len(tokens) == 1), False, changes, ()), 0, engine.sizes)
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
            every = torch.arange(len(tokens), device=engine.device)
            logits_SV = engine.forward(dataclasses.replace(batch, wanted_S=every[wanted]))
        self.cache.drop_passed(table, len(running.tokens) - 1)
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

    device = Device(engine.launch, engine.graphs.size_for, engine.sizes, ahead)
    # At once and not beside the steps: leaders of several ranks must make the same ones.
    at_once = AtOnce()
    grammars = Grammars(lambda: Vocabulary(Path(engine.plan.checkpoint), engine.plan.spec.vocab), at_once, at_once)
    leader = Leader(scheduler_for(engine.plan), device, send, lambda request: refusal(engine.plan, request), grammars)
    for request in requests:
        leader.take("test", Generate(request))
    while not leader.idle:
        leader.turn()
    return given

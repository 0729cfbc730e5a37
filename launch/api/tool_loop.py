"""An answer in several turns: where the model calls a built-in tool it is run, and the model goes on with what it said.

Each turn is a request of its own to the engine. Its prompt is all that came before, which the prefix cache holds; its
draws are those of one long answer, since they depend on seed and position alone. max_tokens, max_reasoning_tokens and
deadline_s hold for all turns together; what tools say counts as neither, but as read. A function call is for the
client: it ends the answer, whatever else the turn has called. Knows no route, and tools only by their names.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from ...parallel.engine.request import Request, Token
from ..dispatch import prompt_blocks
from ..harmony import Message, render_message
from ..tokenizer import Tokenizer
from .answer import Call, Content, End, Piece, Reasoning, Run, RunBegun, RunInput, RunOutput
from .metrics import Watch
from .reading import Reading
from .served import Served
from .tool_server import Output, ToolServers

MOST_OUTPUT = 0.25  # of the context that one output may fill; the rest of it is cut off


@dataclass
class _Turn:
    """What one turn did. run: the tool that it called last, with what it is given."""

    ids: list[int] = field(default_factory=list)
    run: Run | None = None
    given: list[str] = field(default_factory=list)
    called: bool = False
    end: End | None = None

    def take(self, piece: Piece) -> None:
        match piece:
            case Run():
                self.run, self.given = piece, []
            case RunInput():
                self.given.append(piece.text)
            case Call():
                self.called = True
            case Reasoning() | Content():
                self.run = None
            case End():
                self.end = piece


async def in_turns(
    request: Request,
    tokens: AsyncGenerator[Token],
    reading: Reading,
    served: Served,
    servers: ToolServers,
    watch: Watch,
) -> AsyncGenerator[Piece]:
    """The pieces of the whole answer; its End counts all turns. request, tokens, watch: of the first one."""
    tokenizer, begun_s = served.tokenizer, time.monotonic()
    completion = reasoning = runs = told = 0
    try:
        async with servers.session() as session:
            while True:
                turn = _Turn()
                async with aclosing(reading.pieces(_noted(tokens, turn.ids), watch)) as pieces:
                    async for piece in pieces:
                        turn.take(piece)
                        if not isinstance(piece, End):
                            yield piece
                assert turn.end is not None
                completion += turn.end.completion_tokens
                reasoning += turn.end.reasoning_tokens
                counts = {"completion_tokens": completion, "reasoning_tokens": reasoning, "tool_tokens": told}
                whole = replace(turn.end, **counts)
                if turn.run is None or turn.called or turn.ids[-1] != tokenizer.special["<|call|>"]:
                    yield whole
                    return
                yield RunBegun()
                output = Output("error: no more calls of tools are allowed in this answer", failed=True)
                if reading.most_runs is None or runs < reading.most_runs:
                    output = await session.run(turn.run.name, "".join(turn.given))
                runs += 1
                yield RunOutput(output.text, output.failed)
                most = int(MOST_OUTPUT * served.context_tokens)
                # In a thread: a long output would hold up the streams of everyone else.
                said = await asyncio.to_thread(_said, turn.run, output, tokenizer, most)
                following = _following(request, turn, said, served.context_tokens, begun_s)
                if following is None:
                    yield replace(whole, finish_reason="length")
                    return
                told += len(said)
                request, begun_s = following, time.monotonic()
                watch = served.replicas.watch(request)
                tokens = served.replicas.generate(request, prompt_blocks(request.prompt_tokens), watch)
    finally:
        watch.end("abort")


async def _noted(tokens: AsyncGenerator[Token], ids: list[int]) -> AsyncGenerator[Token]:
    async with aclosing(tokens):
        async for token in tokens:
            if token.id >= 0:
                ids.append(token.id)
            yield token


def _said(run: Run, output: Output, tokenizer: Tokenizer, most_tokens: int) -> list[int]:
    """The tool's message, and the header of the next turn. Harmony guide, "Built-in tools"."""
    text = output.text
    if len(ids := tokenizer.encode(text)) > most_tokens:
        text = tokenizer.decode(ids[:most_tokens]) + "\n[the rest was cut off]"
    message = Message("tool", text, run.name, channel=run.channel, recipient="assistant")
    opening = [tokenizer.special["<|start|>"], *tokenizer.encode("assistant")]
    return [*render_message(message, tokenizer), *opening]


def _following(
    request: Request, turn: _Turn, said: Sequence[int], context_tokens: int, begun_s: float
) -> Request | None:
    """The next turn's request; None if nothing is left for it."""
    assert turn.end is not None
    prompt = (*request.prompt_tokens, *turn.ids, *said)
    room = min(request.max_tokens - len(turn.ids), context_tokens - len(prompt))
    deadline_s, constraint = request.deadline_s, request.constraint
    if deadline_s is not None:
        deadline_s -= time.monotonic() - begun_s
    if room < 1 or (deadline_s is not None and deadline_s <= 0):
        return None
    if constraint is not None and constraint.max_reasoning_tokens is not None:
        left = max(constraint.max_reasoning_tokens - turn.end.reasoning_tokens, 0)
        constraint = replace(constraint, max_reasoning_tokens=left)
    place = int(request.id.partition("-")[2] or 0) + 1
    id = f"{request.id.partition('-')[0]}-{place}"
    return replace(request, id=id, prompt_tokens=prompt, max_tokens=room, deadline_s=deadline_s, constraint=constraint)

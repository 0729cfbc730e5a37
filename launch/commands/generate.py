"""`generate MODEL`: one answer in the terminal, through the same ranks as serve but with no HTTP between.

The answer goes to stdout as it comes; reasoning, dimmed, and everything else to stderr, so that a pipe gets the answer.
"""

import asyncio
import json as json_text
import secrets
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ...parallel.engine.request import Request, Sampling, Token
from ...parallel.errors import RankDiedError, UserError
from ...parallel.planning.plan import Plan
from ..settings import Settings, load_settings, settings_options
from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..engine_client import EngineClient  # msgpack: not in the base install, which shows --help

LOSS_S = 2.0  # the engine's connection is seen to end a moment before the reason is known


@click.command
@click.argument("model")
@settings_options(Settings)
@click.option("-p", "prompt", metavar="TEXT", help="What to answer.")
@click.option(
    "--token-ids", type=click.Path(path_type=Path), metavar="FILE", help="A prompt as ids, in JSON or in words; raw."
)
@click.option("--system", metavar="TEXT", help="Instructions for the model.")
@click.option("--reasoning", type=click.Choice(["low", "medium", "high"]), help="How hard to think.  [default: medium]")
@click.option("--temperature", type=click.FloatRange(0, 2), default=1.0, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="The same seed draws the same answer; random if left out."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), metavar="N", help="At most; what is left of the context if left out."
)
def command(
    model: str,
    config: str | None,
    json: bool,
    prompt: str | None,
    token_ids: Path | None,
    system: str | None,
    reasoning: Literal["low", "medium", "high"] | None,
    temperature: float,
    top_p: float,
    seed: int | None,
    max_tokens: int | None,
    **flags: Any,
) -> None:
    """Answer one prompt in the terminal.

    MODEL is a checkpoint folder, a hub id such as openai/gpt-oss-20b, or tiny.
    """
    from ..extras import need_serve_extra
    from ..resolve import make_plan
    from ..tokenizer import load_tokenizer

    need_serve_extra("generate")
    from ..supervise import WORKER

    if (prompt is None) == (token_ids is None):
        raise UserError(
            "generate takes one prompt: -p TEXT or --token-ids FILE", "gptoss-launch generate tiny -p Hello"
        )
    if token_ids is not None and (system is not None or reasoning is not None):
        raise UserError("--system and --reasoning go with -p", "--token-ids is the whole prompt as it is")
    ids = None if token_ids is None else read_token_ids(token_ids)
    settings = load_settings(Settings, config, flags)
    plan = make_plan(model, replace(settings, dp=settings.dp or 1), need_weights=True)  # one prompt, one replica
    assert plan.checkpoint is not None
    tokenizer = load_tokenizer(Path(plan.checkpoint))
    if ids is None:
        ids = chat_prompt(prompt or "", system, reasoning, tokenizer)
    sampling = Sampling(temperature, top_p, seed=secrets.randbits(63) if seed is None else seed)
    request = make_request(ids, max_tokens, sampling, plan, tokenizer)
    answer = asyncio.run(generate(plan, request, tokenizer, WORKER, harmony=token_ids is None, show=not json))
    if answer is None:
        raise click.Abort  # a signal; 130
    if json:
        click.echo(json_text.dumps(answer.to_json()))


@dataclass(frozen=True)
class Timings:
    """Seconds, but for decode_tok_s: tokens a second after the first; None with fewer than two tokens."""

    load_s: float
    ttft_s: float
    decode_tok_s: float | None


@dataclass(frozen=True)
class Answer:
    """What generate --json prints."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    reasoning: str
    content: str
    tool_calls: tuple[dict[str, Any], ...]
    finish_reason: str
    usage: dict[str, Any]
    timings: Timings

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_token_ids(path: Path) -> tuple[int, ...]:
    """A JSON list of ids, or ids between white space. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-ids {path}: not readable: {error}", "a JSON list of ids, or ids in words") from None
    try:
        ids = json_text.loads(text) if text.startswith("[") else [_read_id(word) for word in text.split()]
    except ValueError as error:
        raise UserError(f"--token-ids {path}: {error}", "a JSON list of ids, or ids in words") from None
    wrong = [item for item in ids if not isinstance(item, int) or isinstance(item, bool)]
    if wrong:
        raise UserError(f"--token-ids {path}: {wrong[0]!r} is no token id", "a JSON list of ids, or ids in words")
    if not ids:
        raise UserError(f"--token-ids {path}: no ids in it", "a JSON list of ids, or ids in words")
    return tuple(ids)


def _read_id(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{word[:40]!r} is no token id") from None


def chat_prompt(
    prompt: str, system: str | None, effort: Literal["low", "medium", "high"] | None, tokenizer: Tokenizer
) -> tuple[int, ...]:
    from datetime import date

    from ..api.chat import conversation
    from ..api.schema import SystemMessage, UserMessage
    from ..harmony import render

    said = [SystemMessage(role="system", content=system)] if system else []
    talk = conversation([*said, UserMessage(role="user", content=prompt)], effort=effort, today=date.today())
    return tuple(render(talk, tokenizer))


def make_request(
    ids: tuple[int, ...], max_tokens: int | None, sampling: Sampling, plan: Plan, tokenizer: Tokenizer
) -> Request:
    """Raises UserError for ids outside the vocabulary, and for more tokens than the context holds."""
    from ..harmony import stop_tokens

    for place, token_id in enumerate(ids):
        if not 0 <= token_id < plan.spec.vocab:
            raise UserError(
                f"token id {token_id} at place {place}: the vocabulary has {plan.spec.vocab}", "0 is the first"
            )
    left = plan.context_tokens - len(ids)
    if left < (max_tokens or 1):
        raise UserError(
            f"{len(ids)} prompt tokens + {max_tokens or 1} is more than the context of {plan.context_tokens}",
            "shorten the prompt, or raise --context",
        )
    return Request("generate", ids, max_tokens or left, sampling, stop_tokens(tokenizer))


async def generate(
    plan: Plan, request: Request, tokenizer: Tokenizer, worker: str, *, harmony: bool, show: bool
) -> Answer | None:
    """The answer to one request, or None if a signal came first. worker: the module that every rank runs.

    harmony: the answer is a conversation's; otherwise its text is taken as it is. show: print it as it comes.
    Raises UserError for what keeps it from starting, RankDiedError when a rank dies.
    """
    from ..engine_client import EngineClient, EngineDiedError, local
    from ..loading import note_lines, progress_bar, say_tiny
    from ..stop import StopSignals, until
    from ..supervise import Supervisor

    begun_s = time.monotonic()
    with StopSignals().caught() as stop, progress_bar() as bar:
        async with Supervisor(plan, worker, bar.show) as supervisor:
            await supervisor.start_replicas()
            answers = await until(supervisor.ready(), stop.first)
            if answers is None:
                return None
            bar.stop()
            for line in note_lines(answers):
                click.echo(line, err=True)
            say_tiny(plan)
            client = EngineClient(local(supervisor.engine_socket(0)))
            await client.connect()
            load_s = time.monotonic() - begun_s
            try:
                return await until(_answer(client, request, tokenizer, load_s, harmony, show), stop.first)
            except EngineDiedError as lost:
                try:
                    error = await asyncio.wait_for(supervisor.first_failure(), LOSS_S)
                except TimeoutError:
                    error = RankDiedError(str(lost), "the ranks still ran: this terminal may have been too slow")
                raise error from None


async def _answer(
    client: "EngineClient", request: Request, tokenizer: Tokenizer, load_s: float, harmony: bool, show: bool
) -> Answer:
    from ..api.answer import Content, End, Reasoning, read_answer
    from ..harmony import StreamParser
    from ..plain_text import PlainText

    asked_s = time.monotonic()
    ids: list[int] = []
    times_s: list[float] = []
    said: dict[type, str] = {Reasoning: "", Content: ""}
    last: type | None = None

    async def noted() -> AsyncGenerator[Token]:
        async with aclosing(client.generate(request)) as tokens:
            async for token in tokens:
                ids.append(token.id)
                times_s.append(time.monotonic() - asked_s)
                yield token

    end = End("stop", 0, 0)
    async for piece in read_answer(noted(), StreamParser(tokenizer) if harmony else PlainText(tokenizer)):
        if isinstance(piece, End):
            end = piece
        elif isinstance(piece, Reasoning | Content):
            said[type(piece)] += piece.text
            if show:
                # Reasoning is no part of the answer: on stderr, so that a pipe gets the answer alone.
                if last not in (None, type(piece)):
                    click.echo("\n", err=True)
                last = type(piece)
                thinks = last is Reasoning
                click.echo(click.style(piece.text, dim=True) if thinks else piece.text, nl=False, err=thinks)
                (sys.stderr if thinks else sys.stdout).flush()
    if show:
        click.echo()
    usage = {
        "prompt_tokens": len(request.prompt_tokens),
        "completion_tokens": end.completion_tokens,
        "total_tokens": len(request.prompt_tokens) + end.completion_tokens,
        "completion_tokens_details": {"reasoning_tokens": end.reasoning_tokens},
    }
    decode_s = times_s[-1] - times_s[0]
    timings = Timings(load_s, times_s[0], (len(ids) - 1) / decode_s if decode_s > 0 else None)
    return Answer(
        request.prompt_tokens, tuple(ids), said[Reasoning], said[Content], (), end.finish_reason, usage, timings
    )

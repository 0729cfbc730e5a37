"""`bench decode|prefill|serve TARGET`: how fast a checkpoint or a server is, alone or beside another in one run.

Lines of JSON on stdout, one a case as it is measured, and all of them again in the last one under `rows`; a table, and
whatever else is for people, on stderr.
"""

import asyncio
import json as json_text
import random
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...parallel.errors import UserError
from ...parallel.planning.machine import probe
from ...parallel.planning.plan import Kept, Plan
from ...parallel.planning.roofline import Floor, decode_floor
from ...parallel.planning.shards import Mesh
from ...parallel.planning.spec import PUBLISHED, Spec
from ..bench.rows import Kind, Row, ratios, with_roofline
from ..settings import Settings, load_settings, settings_options

if TYPE_CHECKING:
    from ..bench.endpoint import Endpoint
    from ..bench.target import Progress, Target

MOST_STREAMS = 4096


class _List(click.ParamType):
    """Numbers with commas between them."""

    def __init__(self, name: str, read: Callable[[str], Any], low: float, high: float) -> None:
        self.name = name
        self._read, self._low, self._high = read, low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._read(word) for word in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(self._low <= number <= self._high for number in numbers):
            self.fail(f"{value!r} is no list of numbers from {self._low:g} to {self._high:g}, with commas", param, ctx)
        return tuple(dict.fromkeys(numbers))


BATCHES = _List("batch", int, 1, MOST_STREAMS)
RATES = _List("rate", float, 1e-3, 1e5)


@dataclass(frozen=True)
class Asked:
    """What a benchmark was asked for. batches: streams at once. rates: of arrivals; () for streams that follow each
    other."""

    kind: Kind
    batches: tuple[int, ...]
    rates: tuple[float, ...]
    prompt: int
    new: int
    repeats: int
    requests: int
    seed: int
    profile: bool = False

    @property
    def cases(self) -> tuple[tuple[int | None, float | None], ...]:
        """(batch, rate)."""
        return tuple((None, rate) for rate in self.rates) or tuple((batch, None) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Of the longest stream."""
        return self.prompt + (1 if self.kind == "decode" else 0) + (1 if self.kind == "prefill" else self.new)


@click.group(no_args_is_help=False)
def command() -> None:
    """Measure how fast a model decodes, prefills and serves.

    TARGET is a checkpoint (a folder, a hub id, tiny) or the URL of a server of the OpenAI API: gptoss-launch, vLLM,
    SGLang, llama-server. Prints one line of JSON a case, and all again in the last line under `rows`.
    """


_HELP: dict[Kind, str] = {
    "decode": "Time of a decode step by batch size.\n\nAll streams are sent at once and every token is waited for; a "
    "step is (t(1 + n) - t(1)) / n, with medians of several runs, at temperature 1. `roofline` is the share of what "
    "the memory bandwidth allows for the weights and KV cache that a step must read.",
    "prefill": "Prompt tokens a second by batch size: prompts sent at once, up to the first token of the last.",
    "serve": "Throughput and latency over HTTP, with requests that arrive at random (--rate) or with so many streams "
    "at a time (--batch).\n\nA checkpoint is served first as `serve` does.",
}


def _add(kind: Kind) -> None:
    serves = kind == "serve"
    only: list[Any] = []
    if serves:
        only += [
            click.option("--rate", "rates", type=RATES, help="Requests a second, at random (Poisson): 1,4,16."),
            click.option("--requests", type=click.IntRange(1), default=64, show_default=True, help="Of a case."),
        ]
    else:
        only += [
            click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Runs of a case.")
        ]
    if kind != "prefill":
        only += [click.option("--new", type=click.IntRange(1), default=128, show_default=True, help="Answer tokens.")]
    if kind == "decode":
        only += [click.option("--profile", is_flag=True, help="Also time by kernel group; a checkpoint only.")]
    shared = [
        click.argument("target"),
        click.option("--batch", "batches", type=BATCHES, default=None if serves else (1, 8, 32), help=
                     "Streams at a time: 1,8,32." + ("" if serves else "  [default: 1,8,32]")),
        click.option("--prompt", type=click.IntRange(1), default=1024, show_default=True, help="Prompt tokens."),
        *only,
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of arrivals."),
        click.option("--compare", metavar="URL", help="Measure this server as well, case by case in turn."),
        click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help=
                     "Add the lines of JSON to this file as well."),
        click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png", help=
                     "Draw throughput against latency."),
        click.option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Key of the servers."),
        settings_options(Settings),
    ]  # fmt: skip

    def run(
        target: str,
        prompt: int,
        seed: int,
        compare: str | None,
        out: Path | None,
        plot: Path | None,
        api_key_file: Path | None,
        config: str | None,
        json: bool,
        batches: tuple[int, ...] | None,
        rates: tuple[float, ...] | None = None,
        new: int = 1,
        repeats: int = 1,
        requests: int = 1,
        profile: bool = False,
        **flags: Any,
    ) -> None:
        if rates and batches:
            raise UserError("--rate and --batch are two ways to send requests", "leave one of them out")
        asked = Asked(kind, batches or (1, 8, 32), rates or (), prompt, new, repeats, requests, seed, profile)
        bench(asked, target, compare, config, flags, api_key_file, out, plot, show=not json)

    for decorate in reversed(shared):
        run = decorate(run)
    command.command(kind, help=_HELP[kind])(run)


for _kind in _HELP:
    _add(_kind)


def bench(
    asked: Asked,
    target: str,
    compare: str | None,
    config: str | None,
    flags: dict[str, Any],
    api_key_file: Path | None,
    out: Path | None,
    plot: Path | None,
    *,
    show: bool,
) -> None:
    """Measures and prints. Raises UserError, RankDiedError."""
    from ..bench.show import draw, print_report
    from ..extras import need_plot_extra, need_serve_extra
    from ..keys import first_key

    if plot is not None:
        need_plot_extra("bench --plot")
    for name, path in (("--out", out), ("--plot", plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{name} {path}: no such folder", "name a file in an existing folder")
    is_server = target.startswith(("http://", "https://"))
    if compare is not None and not compare.startswith(("http://", "https://")):
        raise UserError(f"--compare {compare!r} is no URL", "start that server first; such as http://127.0.0.1:8001")
    key = None if api_key_file is None else first_key(api_key_file)
    rows: list[Row] = []

    def tell(row: Row) -> None:
        rows.append(row)
        _write(row.to_json(), out)

    settings = load_settings(Settings, config, flags)
    plan: Plan | None = None
    with ExitStack() as stack:
        if is_server:
            _refuse_for_a_server(asked, flags, config)
        else:
            need_serve_extra("bench")
            plan = _plan(target, settings, asked)
            if asked.kind == "serve":
                from ..served import served

                target = stack.enter_context(served(target, _words(config, flags)))
        work = _measure(asked, plan, target, compare, settings.ranks, key, tell)
        compared = asyncio.run(_until_stopped(work))
    _write({"rows": [row.to_json() for row in rows], "ratios": compared}, out)
    if plot is not None:
        draw(rows, plot)
    if show:
        print_report(rows, compared)


def _write(line: dict[str, Any], out: Path | None) -> None:
    text = json_text.dumps(line)
    click.echo(text)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _refuse_for_a_server(asked: Asked, flags: dict[str, Any], config: str | None) -> None:
    if asked.profile:
        raise UserError("--profile looks into an engine that is started here, not into a server", "name a checkpoint")
    metadata = {one.name: one.metadata["flag"] for one in fields(Settings)}
    given = [f"--{metadata[name]}" for name, value in flags.items() if value is not None and name != "ranks"]
    given += ["--config"] if config is not None else []
    if given:
        raise UserError(f"{given[0]} is for a checkpoint; a server has its own settings", "leave it out")


def _words(config: str | None, flags: dict[str, Any]) -> list[str]:
    """`flags` as words for the command line of serve."""
    metadata = {one.name: one.metadata["flag"] for one in fields(Settings)}
    given = [(f"--{metadata[name]}", str(value)) for name, value in flags.items() if value is not None]
    given += [("--config", config)] if config is not None else []
    return [word for pair in given for word in pair]


def _plan(model: str, settings: Settings, asked: Asked) -> Plan:
    """Of one replica, for decode and prefill ask its leader."""
    from ..resolve import make_plan

    if asked.kind != "serve":
        if settings.dp not in (None, 1):
            raise UserError(f"--dp {settings.dp}: {asked.kind} measures one replica", "bench serve measures several")
        settings = replace(settings, dp=1)
    return make_plan(model, settings, need_weights=True)


async def _until_stopped(work: Any) -> Any:
    from ..stop import StopSignals, until

    with StopSignals().caught() as stop:
        done = await until(work, stop.first)
    if done is None:
        raise click.Abort  # a signal; 130
    return done


async def _measure(
    asked: Asked,
    plan: Plan | None,
    target: str,
    compare: str | None,
    ranks: int | None,
    key: str | None,
    tell: Callable[[Row], None],
) -> list[dict[str, Any]]:
    """Every case on each target in turn; the ratios of two. plan: of the checkpoint, if it is one."""
    from ..bench.checkpoint import started
    from ..bench.endpoint import Endpoint
    from ..bench.measure import runs_of
    from ..bench.profiled import profile
    from ..supervise import WORKER

    second = None if compare is None else await _server(compare, key, ranks)
    kernels: dict[int, dict[str, float]] = {}
    async with AsyncExitStack() as stack:
        if plan is None:
            first: Target = await _server(target, key, ranks)
        elif asked.kind == "serve":
            first = await _server(target, key, ranks, plan)
        else:
            if asked.profile:
                with _progress(len(asked.batches)) as progress:
                    progress.doing("profiling")
                    kernels = await profile(plan, WORKER, asked.batches, asked.prompt, progress)
            first = await stack.enter_async_context(started(plan, WORKER))
        targets = [first, *([second] if second is not None else [])]
        for one in targets:
            _check_room(asked, one)
        total = len(targets) * len(asked.cases) * runs_of(asked.kind, asked.repeats, asked.requests)
        rows: list[Row] = []
        with _progress(total) as progress:
            for batch, rate in asked.cases:
                for one in targets:
                    case = f"batch {batch}" if rate is None else f"{rate:g} requests/s"
                    progress.doing(f"{one.about.engine}, {asked.kind}, {case}")
                    row = await _row(asked, one, batch, rate, progress)
                    if asked.kind == "decode":
                        name = one.model if isinstance(one, Endpoint) else ""
                        row = with_roofline(row, floor_of(row, plan, name, ours=one is first))
                    if one is first and batch is not None and batch in kernels:
                        row = replace(row, kernels=kernels[batch])
                    rows.append(row)
                    tell(row)
        return [] if second is None else ratios(rows, first.about, second.about)


async def _server(url: str, key: str | None, ranks: int | None, plan: Plan | None = None) -> "Endpoint":
    """The server at `url`. ranks: how many it runs on, as far as we were told. plan: what it runs, if we started it."""
    from ..bench.checkpoint import about_plan
    from ..bench.endpoint import is_local, open_endpoint

    server = await open_endpoint(url, key)
    if plan is not None:
        return replace(server, about=replace(about_plan(plan, None), route=server.about.route))
    gpus = probe().gpus if is_local(url) else ()
    device = gpus[0].name if gpus else "cpu" if is_local(url) else None
    told = 1 if ranks is None and len(gpus) == 1 else ranks
    return replace(server, about=replace(server.about, device=device, ranks=told))


async def _row(asked: Asked, target: "Target", batch: int | None, rate: float | None, progress: "Progress") -> Row:
    from ..bench.measure import decode, prefill, serve

    draw = random.Random(f"{asked.seed} {batch} {target.about.engine}")
    if asked.kind == "decode":
        return await decode(target, batch or 1, asked.prompt, asked.new, asked.repeats, draw, progress)
    if asked.kind == "prefill":
        return await prefill(target, batch or 1, asked.prompt, asked.repeats, draw, progress)
    return await serve(target, asked.prompt, asked.new, asked.requests, asked.seed, progress, rate=rate, batch=batch)


def floor_of(row: Row, plan: Plan | None, name: str, *, ours: bool) -> Floor | str:
    """What the decode step of `row` must read and how long that takes; or why that is not known.

    plan: of the checkpoint that is measured, for a server beside it has the same model. name: of the model, as its
    server has it. ours: the row is that checkpoint's, whose layout and dtypes are known; of others they are taken to be
    bf16, and tp over their ranks.
    """
    context_tokens = row.prompt + (row.new + 1) // 2  # of a step in the middle
    device = None if row.device == "cpu" else row.device
    kept: Kept = None
    if ours and plan is not None:
        layout = plan.spec, plan.mesh, plan.dtype, plan.kv_dtype
        kept = plan.kept
    else:
        spec = spec_of(name) if plan is None else plan.spec
        if spec is None:
            return f"the architecture of {name!r} is not known here"
        layout = spec, Mesh(row.ranks or 1), "bf16", "bf16"
    return decode_floor(*layout, device, row.batch or 1, context_tokens, kept)


def spec_of(model: str) -> Spec | None:
    """Of a model by the name that a server gives it, where that can be known without a network."""
    from ..resolve import TINY, resolve

    if model in PUBLISHED:
        return PUBLISHED[model]
    return resolve(model, need_weights=False)[0] if model == TINY or Path(model).is_dir() else None


def _check_room(asked: Asked, target: "Target") -> None:
    """Raises UserError before anything is measured that could not be."""
    room, most = target.room, max(asked.batches)
    if room.context_tokens is not None and asked.tokens > room.context_tokens:
        raise UserError(
            f"{asked.tokens} tokens a stream is more than the {room.context_tokens} of {target.about.engine}'s context",
            "a shorter --prompt or --new, or a longer --context",
        )
    if room.sequences is not None and most > room.sequences:
        raise UserError(
            f"--batch {most} is more than the {room.sequences} sequences that the plan runs at a time",
            f"--sequences {most}, or smaller batches",
        )


@contextmanager
def _progress(total: int) -> "Iterator[Progress]":
    """A bar on stderr, in a terminal only, that leaves nothing behind."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from ..bench.target import Progress

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # rich would take over stdout as well, where the lines for programs go
    bar = Bar(*columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("", total=total)
        yield Progress(lambda: bar.advance(task), lambda text: bar.update(task, description=text))

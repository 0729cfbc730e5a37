"""`finetune`: from settings to a trained adapter, or a plan, or a look at the data.

Trains in this process, on one device. Exits with 75 where a signal or a file named stop in the run's folder ended it:
then the same command goes on.
"""

import dataclasses
import json
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from ...parallel.errors import UserError
from ...parallel.planning.spec import Spec
from ..cli import PROGRAM
from ..finetune_settings import FinetuneSettings, load_finetune_settings, settings_help

if TYPE_CHECKING:
    from ...parallel.training.job import Job
    from ...parallel.training.loop import Step
    from ..tokenizer import Tokenizer

STOPPED = 75  # resumable (contract of exit codes; EX_TEMPFAIL of sysexits.h)


@click.command(epilog="\b\n" + settings_help())
@click.option("--config", metavar="FILE", help="YAML file, or a preset of configs/finetune.")
@click.option("--dry-run", is_flag=True, help="Print what a run would take, and start nothing.")
@click.option("--preview", type=click.IntRange(1), metavar="N", help="Print the first N samples with their loss mask.")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
def command(config: str | None, dry_run: bool, preview: int | None, settings: tuple[str, ...]) -> int:
    """Fine-tune a model on conversations.

    KEY=VALUE sets what the file of --config does not, or sets it differently. `model`, `data` and `run` are needed.
    """
    from ..resolve import resolve

    wanted = load_finetune_settings(config, settings)
    if wanted.model is None:
        raise UserError("no model", "model=tiny, a folder or a hub id; or --config PRESET")
    if dry_run:
        from ..finetune_plan import print_plan

        spec, _ = resolve(wanted.model, need_weights=False)
        print_plan(wanted, spec, command_line(config, settings))
        return 0
    if not wanted.data:
        raise UserError("no data", "data=FILE.jsonl, or the name of a dataset")
    from ..extras import need_finetune_modules

    need_finetune_modules("finetune")
    spec, folder = resolve(wanted.model, need_weights=True)
    assert folder is not None
    from ..tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if preview is not None:
        show(wanted, tokenizer, preview)
        return 0
    return finetune(wanted, spec, folder, tokenizer, command_line(config, settings))


def command_line(config: str | None, words: tuple[str, ...]) -> str:
    return shlex.join([PROGRAM, "finetune", *(["--config", config] if config else []), *words])


def show(settings: FinetuneSettings, tokenizer: "Tokenizer", count: int) -> None:
    """The first samples of the data, in its order. Those of a bad record are an error, as they are to a run."""
    from rich.console import Console

    from ..conversations import read_samples
    from ..preview import preview, summary
    from ..records import read_records
    from ..training_data import rules_of

    console = Console(highlight=False)
    shown = 0
    for number, source in enumerate(settings.data):
        for record in read_records(source):
            new, skipped = read_samples([record], number, rules_of(settings), tokenizer, settings.skip_bad_records)
            for line in skipped:
                click.echo(f"skipped {line}", err=True)
            for one in new:
                console.print(f"--- {record.where}: {summary(one)}", style="bold")
                console.print(preview(one, tokenizer), soft_wrap=True)
                shown += 1
                if shown == count:
                    return


def finetune(settings: FinetuneSettings, spec: Spec, folder: Path, tokenizer: "Tokenizer", line: str) -> int:
    """The exit code of a run from its beginning or its last checkpoint. Raises what `train` raises."""
    from ...parallel.planning.machine import probe
    from ...parallel.training.job import METRICS_FILE, STOP_FILE, check_resumable, read_job, write_job
    from ...parallel.training.loop import load_trainee, train, trained_parts
    from ...parallel.training.saves import saves
    from ..finetune_plan import device_and_dtype, print_plan
    from ..finetune_progress import Progress
    from ..loading import progress_bar
    from ..training_data import read_data, stored_data, write_data

    run = settings.run
    if run is None:
        raise UserError("no run", "run=FOLDER, where checkpoints and metrics go")
    if settings.machine is not None:
        raise UserError(f"machine={settings.machine} is for --dry-run", "leave it out")
    settings = device_and_dtype(settings, bool(probe().gpus))
    print_plan(settings, spec, line, to_stderr=True)
    if settings.resume == "never" and run.exists() and any(run.iterdir()):
        raise UserError(f"{run} is not empty", "run=NEW FOLDER, or resume=auto to go on")
    run.mkdir(parents=True, exist_ok=True)
    (run / STOP_FILE).unlink(missing_ok=True)  # one that an earlier run has obeyed
    # samples of a run that has no checkpoint yet may be of other settings
    data = stored_data(run) if saves(run) else None
    if data is None:
        data = read_data(settings, tokenizer, spec.vocab)
    for skipped in data.skipped[:10]:
        click.echo(f"skipped {skipped}", err=True)
    if data.skipped:
        click.echo(f"skipped {len(data.skipped)} bad records", err=True)
    job = make_job(settings, spec, folder, [len(one) for one in data.train], [one.source for one in data.train])
    if saves(run):
        check_resumable(read_job(run), job, run)
    else:
        write_data(run, data)
    write_job(run, job)
    done = saves(run)[-1][0] if saves(run) else 0
    keep_metrics(run / METRICS_FILE, done)
    with progress_bar() as bar:
        trainee = load_trainee(job, bar.show)
    for part, values in trained_parts(job, trainee).items():
        click.echo(f"trained: {part} {values:,} values", err=True)
    click.echo(f"data: {len(data.train)} samples, {sum(map(len, data.train)):,} tokens", err=True)
    with (
        stop_signals() as asked,
        (run / METRICS_FILE).open("a", encoding="utf-8") as metrics,
        Progress(job) as progress,
    ):

        def report(step: "Step") -> None:
            fields = {name: value for name, value in dataclasses.asdict(step).items() if value is not None}
            metrics.write(json.dumps(fields) + "\n")
            metrics.flush()
            progress.show(step)

        finished = train(
            job,
            run,
            trainee,
            data.train,
            data.evaluation,
            lambda: asked() or (run / STOP_FILE).exists(),
            report,
            progress.say,
        )
    if not finished:
        click.echo(f"stopped; {saves(run)[-1][1]} is saved, and the same command goes on", err=True)
        return STOPPED
    click.echo(saves(run)[-1][1])
    return 0


def make_job(settings: FinetuneSettings, spec: Spec, folder: Path, lengths: list[int], sources: list[int]) -> "Job":
    from ...parallel.training.job import Job, Recipe
    from ...parallel.training.order import Mixture, steps_per_epoch
    from ..training_data import data_in_words

    assert settings.model is not None and settings.dtype is not None and settings.device is not None
    weights = tuple(source.weight for source in settings.data)
    mixture = Mixture(tuple(lengths), tuple(sources), weights)
    steps = settings.steps or sum(
        steps_per_epoch(mixture, settings.seed, settings.sequence_tokens, settings.packs_per_step, epoch)
        for epoch in range(settings.epochs)
    )
    lora = settings.mode == "lora"
    recipe = Recipe(**{one.name: getattr(settings, one.name) for one in dataclasses.fields(Recipe)})
    return Job(
        model=settings.model,
        checkpoint=str(folder),
        spec=spec,
        mode=settings.mode,
        attention_rank=settings.attention_rank if lora and "attention" in settings.targets else 0,
        attention_alpha=settings.attention_alpha,
        expert_rank=settings.expert_rank if lora and "experts" in settings.targets else 0,
        expert_alpha=settings.expert_alpha,
        dtype=settings.dtype,
        device=settings.device,
        sequence_tokens=settings.sequence_tokens,
        packs_per_step=settings.packs_per_step,
        steps=steps,
        recipe=recipe,
        seed=settings.seed,
        data=data_in_words(settings),
        weights=weights,
        save_every=settings.save_every,
        keep_last=settings.keep_last,
        eval_every=settings.eval_every,
        check_first_loss=settings.first_loss == "check",
    )


def keep_metrics(path: Path, done: int) -> None:
    """Drop the lines of steps after `done`: they will be taken again."""
    if path.exists():
        lines = path.read_text("utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= done), encoding="utf-8")


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGUSR1 has come (Slurm sends either before a time limit). Set back at the end."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

"""One rank of a training run, which may be the only one: from settings to the exit code.

Rank 0 reads the data, writes the run's folder and speaks; the others wait for it and then read what it wrote. Does not
know who started it.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from ..parallel.errors import UserError
from ..parallel.planning.spec import Spec
from ..parallel.training.place import Place
from .finetune_folder import held, is_new, keep_metrics, room_said
from .finetune_metrics import open_metrics, plot
from .finetune_plan import device_and_dtype, print_plan
from .finetune_progress import Progress
from .finetune_settings import FinetuneSettings, read_deepspeed
from .finetune_torchrun import SAVING, STOPPED
from .loading import progress_bar

if TYPE_CHECKING:
    from ..parallel.training.job import Job
    from ..parallel.training.loop import Step
    from ..parallel.training.world import World


def finetune(settings: FinetuneSettings, spec: Spec, folder: Path, place: Place | None, line: str) -> int:
    """The exit code of a run from its beginning or its last checkpoint. Raises what `train` raises."""
    from ..parallel.planning.machine import probe
    from ..parallel.training.saves import saves
    from ..parallel.training.world import joined

    run = settings.checked_run()
    settings = device_and_dtype(settings, bool(probe().gpus))
    assert settings.device is not None
    # read with the first allocation: what a pack leaves free then serves the next one, which is of another length
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        with (
            redirect_stdout(sys.stderr),  # DeepSpeed prints, and stdout is for what a script reads
            stop_signals() as asked,
            joined(place, settings.device, settings.deepspeed is not None) as world,
        ):
            with room_said(run), held(run) if world.first else nullcontext():
                if world.first:
                    prepare(settings, spec, folder, run, line, world.size > 1)
                world.wait()
                finished = _train(settings, run, world, asked)
                world.wait()  # torchrun ends the others as soon as one has stopped
    except UserError as error:
        if place is not None and place.rank > 0:
            error.message = f"rank {place.rank}: {error.message}"
        raise
    if not finished:
        return STOPPED
    if world.first:
        click.echo(saves(run)[-1][1])
    return 0


def prepare(settings: FinetuneSettings, spec: Spec, folder: Path, run: Path, line: str, under_torchrun: bool) -> None:
    """Leaves in the run's folder what every rank reads: the samples and the job."""
    from ..parallel.training.job import check_resumable, read_job, write_job
    from ..parallel.training.saves import check_room, saves
    from .tokenizer import load_tokenizer
    from .training_data import read_data, stored_data, write_data

    # how many nodes there are torchrun knows, and not we
    memory = print_plan(settings, spec, line, to_stderr=True, under_torchrun=under_torchrun)
    if settings.resume == "never" and not is_new(run):
        raise UserError(f"{run} is not empty", "run=NEW FOLDER, or resume=auto to go on")
    check_room(run, memory.disk_bytes)
    # samples of a run that has no checkpoint yet may be of other settings
    data = stored_data(run) if saves(run) else read_data(settings, load_tokenizer(folder), spec.vocab)
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
    keep_metrics(run, saves(run)[-1][0] if saves(run) else 0)
    click.echo(f"data: {len(data.train)} samples, {sum(map(len, data.train)):,} tokens", err=True)


def _train(settings: FinetuneSettings, run: Path, world: "World", asked: Callable[[], bool]) -> bool:
    """Whether the run came to its end."""
    from ..parallel.training.job import STOP_FILE, read_job
    from ..parallel.training.loop import train
    from ..parallel.training.saves import saves
    from ..parallel.training.trainee import load_trainee
    from .training_data import stored_data

    job, data = read_job(run), stored_data(run)
    step = int(world.largest(saves(run)[-1][0] if world.first and saves(run) else 0))
    saved = next((path for number, path in saves(run) if number == step), None)
    with progress_bar() if world.first else nullcontext() as bar:
        trainee = load_trainee(job, world, saved, bar.show if bar else lambda done, total: None)
    if world.first:
        for part, values in trainee.values.items():
            click.echo(f"trained: {part} {values:,} values", err=True)
    shown = {name: value for name, value in vars(settings).items() if isinstance(value, bool | int | float | str)}
    with (
        open_metrics(run, settings.trackers, shown, step) if world.first else nullcontext() as metrics,
        Progress(job) if world.first else nullcontext() as progress,
    ):

        def report(step: "Step") -> None:
            assert metrics is not None and progress is not None
            metrics.log({name: value for name, value in dataclasses.asdict(step).items() if value is not None})
            progress.show(step)

        finished = train(
            job,
            run,
            world,
            trainee,
            data.train,
            data.evaluation,
            lambda: asked() or (run / STOP_FILE).exists(),
            report,
            progress.say if progress else lambda line: None,
        )
    if world.first:
        (run / STOP_FILE).unlink(missing_ok=True)  # it is obeyed
        picture = plot(run)
        click.echo(f"curves: {picture or 'no picture without matplotlib (pip install matplotlib)'}", err=True)
        if not finished:
            click.echo(f"stopped; {saves(run)[-1][1]} is saved, and the same command goes on", err=True)
    return finished


def make_job(settings: FinetuneSettings, spec: Spec, folder: Path, lengths: list[int], sources: list[int]) -> "Job":
    from ..parallel.training.job import Job, Recipe
    from ..parallel.training.order import Mixture, steps_per_epoch
    from .training_data import data_in_words

    assert settings.model is not None and settings.dtype is not None and settings.device is not None
    weights = tuple(source.weight for source in settings.data)
    mixture = Mixture(tuple(lengths), tuple(sources), weights)
    steps = settings.steps or sum(
        steps_per_epoch(mixture, settings.seed, settings.sequence_tokens, settings.packs_per_step, epoch)
        for epoch in range(settings.epochs)
    )
    if not steps:
        raise UserError(
            f"{settings.epochs} epochs of the data take no sample: {len(lengths)} samples, by weights {max(weights):g}",
            "higher weights, more epochs, or steps=N",
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
        ranks=settings.world_size,
        deepspeed=None if settings.deepspeed is None else read_deepspeed(settings.deepspeed, settings.dtype),
        optimizer=settings.optimizer,
        adapter_dtype=settings.adapter_dtype,
        host_layers=settings.host_layers,
    )


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM, SIGUSR1 (Slurm sends either before a time limit) or Ctrl-C has come. A second Ctrl-C ends the
    process at once. Set back at the end."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if number in came:
                raise KeyboardInterrupt
            os.write(2, SAVING)  # Python's own stderr may be in use
        came.append(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

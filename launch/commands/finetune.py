"""`finetune`: from settings to a trained adapter, or a plan, or a look at the data.

Trains in this process, or starts torchrun where several ranks are wanted; under torchrun it is one of them. Exits with
75 where a signal or a file named stop in the run's folder ended it: then the same command goes on.
"""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...parallel.errors import UserError
from ...parallel.training.job import STOP_FILE
from ...parallel.training.place import read_place
from ..cli import PROGRAM, SETTINGS
from ..finetune_folder import make_folder
from ..finetune_metrics import need_trackers
from ..finetune_settings import FinetuneSettings, load_finetune_settings, settings_help
from ..finetune_torchrun import start_ranks, torchrun_line

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer


@click.command(epilog="\b\n" + settings_help())
@click.option("--config", metavar="FILE", help="YAML file, or a preset of configs/finetune.")
@click.option("--dry-run", is_flag=True, help="Print what a run would take, and start nothing.")
@click.option("--preview", type=click.IntRange(1), metavar="N", help="Print the first N samples with their loss mask.")
@click.argument("settings", nargs=-1, metavar=SETTINGS)
def command(config: str | None, dry_run: bool, preview: int | None, settings: tuple[str, ...]) -> int:
    """Fine-tune a model on conversations.

    KEY=VALUE sets what the file of --config does not, or sets it differently. `model`, `data` and `run` are needed.
    """
    from ..finetune_plan import print_plan
    from ..resolve import resolve, tokenizer_folder

    place = read_place(os.environ)
    wanted = load_finetune_settings(config, settings).with_ranks(place.size if place else None)
    words = ["finetune", *(["--config", config] if config else []), *settings]
    if wanted.model is None:
        raise UserError("no model", "model=tiny, a folder or a hub id; or --config PRESET")
    if dry_run:
        spec, _ = resolve(wanted.model, need_weights=False)
        print_plan(wanted, spec, command_line(wanted, words))
        return 0
    if not wanted.data:
        raise UserError("no data", "data=FILE.jsonl, or the name of a dataset")
    from ..extras import need_finetune_modules, need_module

    need_finetune_modules("finetune", wanted.deepspeed is not None)
    need_trackers(wanted.trackers)
    if wanted.optimizer == "adamw8bit":
        need_module("optimizer=adamw8bit", "torchao")
    if preview is not None:
        from ..tokenizer import load_tokenizer

        show(wanted, load_tokenizer(tokenizer_folder(wanted.model)), preview)
        return 0
    wanted.checked_run()
    if wanted.machine is not None:
        raise UserError(f"machine={wanted.machine} is for --dry-run", "leave it out")
    spec, folder = resolve(wanted.model, need_weights=True)
    assert folder is not None
    if place is None and wanted.needs_torchrun:
        # what would not fit is said here once; rank 0 prints it
        print_plan(wanted, spec, command_line(wanted, words), quiet=True)
        run = wanted.checked_run()
        check_data(wanted, run)
        make_folder(run)
        return start_ranks(wanted.world_size, words, run / STOP_FILE)
    from ..finetune_rank import finetune

    return finetune(wanted, spec, folder, place, command_line(wanted, words))


def check_data(settings: FinetuneSettings, run: Path) -> None:
    """Raises UserError, once, for data that each rank would look for in vain when torchrun has started it."""
    from ...parallel.training.saves import saves
    from ..records import check_source

    if not saves(run):  # else the samples are in the run's folder
        for source in (*settings.data, *settings.eval_data):
            check_source(source)


def command_line(settings: FinetuneSettings, words: list[str]) -> str:
    return torchrun_line(settings.world_size, words) if settings.needs_torchrun else shlex.join([PROGRAM, *words])


def show(settings: FinetuneSettings, tokenizer: "Tokenizer", count: int) -> None:
    """The first samples of the data, in its order. Those of a bad record are an error, as they are to a run."""
    from rich.console import Console

    from ..conversations import read_samples
    from ..preview import preview, summary
    from ..records import read_records
    from ..training_data import WANTED, rules_of

    console = Console(highlight=False, markup=False, emoji=False)
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
        if not shown:
            raise UserError(f"data {source.name}: nothing in it to train on", WANTED)

"""Settings -> the samples of a run: every source read, split and counted; written once into the run's folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..parallel.errors import UserError
from ..parallel.training import samples as stored
from ..parallel.training.job import EVAL_FILE, TRAIN_FILE
from ..parallel.training.samples import Sample
from .conversations import Rules, read_samples
from .finetune_settings import FinetuneSettings
from .records import Record, Source, read_records
from .tokenizer import Tokenizer

WANTED = "records hold messages, or prompt and completion, or text"


@dataclass(frozen=True)
class Data:
    """skipped: a line for each bad record that was left out; none where the data was there from before."""

    train: list[Sample]
    evaluation: list[Sample]
    skipped: tuple[str, ...] = ()


def rules_of(settings: FinetuneSettings) -> Rules:
    return Rules(settings.loss, settings.reasoning_effort, settings.date, settings.sequence_tokens)


def data_in_words(settings: FinetuneSettings) -> str:
    """Every setting that samples depend on: a run goes on with the samples that it began with, or not at all."""
    sources = {
        "data": [f"{one.name}:{one.split}x{one.weight:g}" for one in settings.data],
        "eval_data": [f"{one.name}:{one.split}" for one in settings.eval_data],
    }
    names = ("eval_fraction", "skip_bad_records", "loss", "reasoning_effort", "date")
    return json.dumps(sources | {name: getattr(settings, name) for name in names}, default=str)


def read_data(settings: FinetuneSettings, tokenizer: Tokenizer, vocab: int) -> Data:
    """Raises UserError for data that cannot be read, holds nothing to train on, or has ids outside `vocab`."""
    rules = rules_of(settings)
    train: list[Sample] = []
    evaluation: list[Sample] = []
    skipped: list[str] = []

    def read(records: Sequence[Record], source: int) -> list[Sample]:
        samples, bad = read_samples(records, source, rules, tokenizer, settings.skip_bad_records)
        skipped.extend(bad)
        return samples

    for number, source in enumerate(settings.data):
        kept, held_out = _split(source, number, settings)
        of_source = read(kept, number)
        if not of_source:
            raise UserError(f"data {source.name}: nothing in it to train on", skipped[0] if skipped else WANTED)
        train += of_source
        evaluation += read(held_out, number)
    for source in settings.eval_data:
        of_source = read(list(read_records(source)), 0)
        if not of_source:
            raise UserError(f"eval_data {source.name}: nothing in it to measure on", skipped[-1] if skipped else WANTED)
        evaluation += of_source
    largest = max(max(one.tokens) for one in (*train, *evaluation))
    if largest >= vocab:
        raise UserError(f"token id {largest}, and the vocabulary has {vocab}", "is the tokenizer.json of this model?")
    return Data(train, evaluation, tuple(skipped))


def _split(source: Source, number: int, settings: FinetuneSettings) -> tuple[list[Record], list[Record]]:
    """(to train on, to measure on): a record goes as a whole, and by its place alone."""
    rng = Random(f"{settings.seed}/split {number}")
    fraction = 0.0 if settings.eval_data else settings.eval_fraction
    parts: tuple[list[Record], list[Record]] = ([], [])
    for record in read_records(source):
        parts[rng.random() < fraction].append(record)
    return parts


def stored_data(run: Path) -> Data:
    """What an earlier start of the run has written. Raises UserError where it is gone or cut."""
    from safetensors import SafetensorError

    try:
        return Data(stored.read_samples(run / TRAIN_FILE), stored.read_samples(run / EVAL_FILE))
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{run}: its samples cannot be read: {reason}", "run=NEW FOLDER: without them none goes on"
        ) from None


def write_data(run: Path, data: Data) -> None:
    stored.write_samples(run / TRAIN_FILE, data.train)
    stored.write_samples(run / EVAL_FILE, data.evaluation)

"""Records of training data, from JSONL files and Hugging Face datasets, each with a name to complain by.

Does not know what a record has to hold (see `conversations.py`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..parallel.errors import UserError, did_you_mean

WEIGHTS = (1e-6, 1e3)  # of a source: below, epochs would take nothing for ever; above, one would not end


@dataclass(frozen=True)
class Source:
    """Where records come from. name: a .jsonl file, a folder that `datasets` reads, or a dataset's name on the hub.

    split: of a dataset. weight: how often an epoch takes each record (parallel.training.order).
    """

    name: str
    split: str = "train"
    weight: float = 1.0


def read_source(value: Any) -> Source:
    """A setting's value: a name, or a mapping with source, split and weight. Raises UserError."""
    if isinstance(value, str) and value:
        return Source(value)
    known = ("source", "split", "weight")
    if not isinstance(value, dict) or not isinstance(value.get("source"), str):
        raise UserError(f"{value!r} names no data", "FILE.jsonl, or {source: NAME, split: train, weight: 1}")
    for key in value:
        if key not in known:
            raise UserError(f"unknown key {key!r}", did_you_mean(str(key), known))
    weight, split = value.get("weight", 1.0), value.get("split", "train")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not WEIGHTS[0] <= weight <= WEIGHTS[1]:
        raise UserError(f"weight: {weight!r} is no number from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}")
    if not isinstance(split, str):
        raise UserError(f"split: {split!r} is no text")
    return Source(value["source"], split, float(weight))


@dataclass(frozen=True)
class Record:
    """fields: None where the line could not be read; `fault` then says why."""

    where: str  # FILE:LINE, or NAME[NUMBER]
    fields: dict[str, Any] | None
    fault: str = ""


def read_records(source: Source) -> Iterator[Record]:
    """Every record of a source, in its order. Raises UserError for a source that cannot be opened."""
    path = Path(source.name).expanduser()
    if _is_jsonl(path):
        _no_split(source)
        yield from _read_jsonl(path)
    else:
        yield from _read_dataset(source, path)


def check_source(source: Source) -> None:
    """Raises UserError for a file that cannot be opened; a dataset is looked for where it is read."""
    path = Path(source.name).expanduser()
    if _is_jsonl(path):
        _no_split(source)
        _open(path).close()


def _is_jsonl(path: Path) -> bool:
    return path.suffix in (".jsonl", ".json") or path.is_file()


def _no_split(source: Source) -> None:
    """A part of it would be taken for the whole, and what is measured on for what is trained on."""
    if source.split != "train":
        raise UserError(
            f"data {source.name}: it has no splits, and split {source.split} is asked for",
            "leave split out; eval_fraction measures on a part of the records",
        )


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: not readable: {error.strerror}", "data names a .jsonl file or a dataset") from None


def _read_jsonl(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Record(where, None, f"no JSON: {error}")
                continue
            if isinstance(fields, dict):
                yield Record(where, fields)
            else:
                yield Record(where, None, f"a JSON {type(fields).__name__}, not an object")


def _read_dataset(source: Source, path: Path) -> Iterator[Record]:
    from .extras import need_train_extra

    need_train_extra(f"data {source.name}")
    import datasets

    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded: Any = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                rows = loaded[source.split]
            else:
                _no_split(source)
                rows = loaded
        else:
            rows = datasets.load_dataset(str(path) if path.is_dir() else source.name, split=source.split)
    except UserError:
        raise
    except Exception as error:  # whatever the library raises: its own errors, OSError, ValueError, KeyError
        reason = " ".join(str(error).split())
        raise UserError(
            f"data {source.name}, split {source.split}: {type(error).__name__}: {reason}",
            "name a .jsonl file, a folder of `datasets`, or a dataset of the hub and one of its splits",
        ) from None
    for number, row in enumerate(rows):
        # a table has every column in every row: what a record leaves out is null there
        yield Record(f"{source.name}[{number}]", _without_nulls(dict(row)))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value

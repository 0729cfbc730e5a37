"""`checkpoint random OUT`: a random checkpoint in the published layout, of a published or a given size."""

import dataclasses
import shutil
from pathlib import Path

import click

from ...parallel.errors import UserError, did_you_mean
from ...parallel.planning.machine import format_size
from ...parallel.planning.shards import checkpoint_bytes
from ...parallel.planning.spec import PUBLISHED, Spec, alternating_kinds, read_config

SIZES = {name.rpartition("-")[2]: spec for name, spec in PUBLISHED.items()}  # 20b, 120b


@click.group
def command() -> None:
    """Write checkpoints."""


@command.command
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--model", "size", metavar="|".join(SIZES), help="A published size.")
@click.option("--spec", "spec_file", type=click.Path(path_type=Path), metavar="FILE", help="A config.json of any size.")
@click.option("--layers", type=click.IntRange(1), metavar="N", help="Keep only this many layers.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, metavar="N", help="Which values.  [default: 0]")
def random(out: Path, size: str | None, spec_file: Path | None, layers: int | None, seed: int) -> None:
    """Write a random checkpoint to the new folder OUT.

    The same seed gives the same bytes on any machine. Layout, names and dtypes are the published ones; the tokenizer is
    the one of tiny. Speed on such weights is real, text is not. Uses a GPU if there is one.
    """
    spec = read_spec(size, spec_file, layers)
    check_folder(out, checkpoint_bytes(spec))

    import torch

    from ...parallel.model.random_checkpoint import write_checkpoint
    from ..loading import progress_bar
    from ..resolve import tiny_folder

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with progress_bar("writing") as bar:
        write_checkpoint(out, spec, tiny_folder() / "tokenizer.json", seed, device, bar.show)
    click.echo(out)


def read_spec(size: str | None, spec_file: Path | None, layers: int | None) -> Spec:
    """The architecture that the options name; UserError unless exactly one of them does."""
    if (size is None) == (spec_file is None):
        raise UserError("one of --model and --spec is wanted", f"--model is {' or '.join(SIZES)}, --spec a config.json")
    if size is not None and size not in SIZES:
        raise UserError(f"--model {size}: no such size", did_you_mean(size, SIZES))
    if spec_file is not None and not spec_file.is_file():
        raise UserError(f"--spec {spec_file}: no such file", "the config.json of a checkpoint")
    spec = SIZES[size] if size is not None else read_config(spec_file or Path())
    return spec if layers is None else dataclasses.replace(spec, layers=layers, layer_kinds=alternating_kinds(layers))


def check_folder(out: Path, needed_bytes: int) -> None:
    """Raise UserError unless `out` is new or empty and its disk has room."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder", "name a new folder")
    existing = next(parent for parent in [out, *out.absolute().parents] if parent.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{out}: {format_size(needed_bytes)} wanted, {format_size(free_bytes)} free",
            "name a folder on another disk",
        )

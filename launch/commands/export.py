"""`export RUN`: the last checkpoint of a run as an adapter for PEFT, or merged into a whole model."""

from pathlib import Path
from typing import Literal

import click

from ...parallel.errors import UserError
from ...parallel.planning.training import all_values
from ..finetune_folder import room_said
from .checkpoint import check_folder


@click.command
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "layout",
    type=click.Choice(["adapter", "bf16", "mxfp4"]),
    required=True,
    help="adapter: PEFT's files; bf16: for transformers; mxfp4: the published layout, which serve reads.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="A new folder.")
def command(run: Path, layout: Literal["adapter", "bf16", "mxfp4"], out: Path) -> None:
    """Write what a run has trained in a format that others read.

    RUN is the folder that finetune wrote. mxfp4 rounds experts that were adapted; with mode=full they were trained so.
    """
    from ...parallel.training.job import read_job
    from ...parallel.training.saves import saves

    job = read_job(run)
    found = saves(run)
    if not found:
        raise UserError(f"{run}: no checkpoint in it", "finish the run, or stop it with a signal, which saves")
    check_folder(out, 0 if layout == "adapter" else all_values(job.spec) * (2 if layout == "bf16" else 1))
    from ..extras import need_finetune_modules

    need_finetune_modules("export")
    from ...parallel.training.export import export_adapter, export_checkpoint
    from ..loading import progress_bar

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}", "name a folder that can be written to") from None
    with room_said(out):
        if layout == "adapter":
            export_adapter(job, found[-1][1], out)
        else:
            with progress_bar("writing") as bar:
                export_checkpoint(job, found[-1][1], out, layout, bar.show)
    click.echo(out)

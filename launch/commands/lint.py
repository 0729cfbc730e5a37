"""`lint FILE.sbatch`: the traps in a batch script of any origin, with line numbers. Runs nothing, loads no torch."""

from pathlib import Path

import click

from ...parallel.errors import UserError

FOUND = 4  # a check failed


@click.command
@click.argument("file", type=click.Path(path_type=Path))
def command(file: Path) -> int:
    """Find the traps in FILE, a batch script for Slurm. Exits with 4 if there are any."""
    from ..slurm_lint import lint

    try:
        text = file.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}", "name a batch script") from None
    findings = lint(text, file.absolute().parent)
    for finding in findings:
        click.echo(f"{file}:{finding.line}: {finding.message}")
        click.echo(f"    hint: {finding.hint}")
    if not findings:
        click.echo(f"{file}: no trap found", err=True)
    return FOUND if findings else 0

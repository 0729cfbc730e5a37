"""`doctor [MODEL]`: is this machine fit to run it. Loads no torch and downloads nothing."""

import json as json_text

import click

FAILED = 4


@click.command
@click.argument("model", required=False)
@click.option("--json", is_flag=True, help="One JSON object on stdout, nothing else there.")
def command(model: str | None, json: bool) -> int:
    """Check this machine, and MODEL if it is named: what was found, what is wanted, what to do.

    Exits with 4 if something must be put right. `submit preflight` runs it on every node of a job.
    """
    from ..doctor import judge, look

    checks = judge(look(model))
    fine = all(check.ok for check in checks)
    if json:
        click.echo(json_text.dumps({"checks": [check.to_json() for check in checks], "ok": fine}))
        return 0 if fine else FAILED
    width = max(len(check.name) for check in checks)
    for check in checks:
        click.echo(f"{'ok ' if check.ok else 'BAD'}  {check.name:{width}}  {check.found}")
        if not check.ok:
            click.echo(f"     {'':{width}}  wanted: {check.wanted}")
            if check.hint:
                click.echo(f"     {'':{width}}  hint: {check.hint}")
    return 0 if fine else FAILED

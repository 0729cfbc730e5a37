"""`doctor [MODEL]`: is this machine, or are several together, fit to run it. Downloads nothing."""

import asyncio
import json as json_text
from dataclasses import asdict
from typing import Any

import click

from ..settings import NODE_SETTINGS, ServeSettings, setting_options

FAILED = 4


@click.command
@click.argument("model", required=False)
@setting_options(NODE_SETTINGS)
@click.option("--measure", is_flag=True, help="Also try kernels and links between GPUs; takes a minute, loads torch.")
@click.option("--json", is_flag=True, help="One JSON object on stdout, nothing else there.")
def command(model: str | None, measure: bool, json: bool, **flags: Any) -> int:
    """Check this machine, and MODEL if it is named: what was found, what is wanted, what to do.

    Exits with 4 if something must be put right. On several nodes run the same command on each, with its own
    --node-rank: each is compared with the others, and node 0 says how all are. `submit preflight` does that in a job.
    """
    from ..doctor import equal_on_all_nodes, judge, look
    from ..node_reports import Check, with_other_nodes
    from ..nodes import read_nodes, refuse_loopback

    nodes = read_nodes(ServeSettings(**{name: value for name, value in flags.items() if value is not None}))

    def looked() -> tuple[list[Check], dict[str, str]]:
        facts = look(model)
        checks = judge(facts)
        if measure:
            from ..doctor_measures import measure as measured

            checks += measured(facts.gpus)
        return checks, equal_on_all_nodes(facts)

    if nodes is None:
        checks, _ = looked()
    else:
        refuse_loopback(nodes)
        checks = asyncio.run(with_other_nodes(nodes, looked))
    fine = all(check.ok for check in checks)
    if json:
        click.echo(json_text.dumps({"checks": [asdict(check) for check in checks], "ok": fine}))
        return 0 if fine else FAILED
    width = max(len(check.name) for check in checks)
    for check in checks:
        click.echo(f"{'ok ' if check.ok else 'BAD'}  {check.name:{width}}  {check.found}")
        if not check.ok:
            click.echo(f"     {'':{width}}  wanted: {check.wanted}")
            if check.hint:
                click.echo(f"     {'':{width}}  hint: {check.hint}")
    return 0 if fine else FAILED

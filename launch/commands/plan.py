"""`plan MODEL`: what would run, where, in how many bytes, and why. Starts nothing, needs no torch and no weights."""

from typing import Any

import click

from ..settings import Settings, load_settings, settings_options


@click.command
@click.argument("model")
@settings_options(Settings)
def command(model: str, config: str | None, json: bool, **flags: Any) -> None:
    """Show what would run here, or on a named machine, and why.

    MODEL is a checkpoint folder, a hub id such as openai/gpt-oss-20b, or tiny.
    """
    from ..resolve import make_plan

    plan = make_plan(model, load_settings(Settings, config, flags), need_weights=False)
    if json:
        from json import dumps

        click.echo(dumps(plan.to_json(), indent=1))
    else:
        from ..tables import print_plan

        print_plan(plan)

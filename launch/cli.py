"""The command line: the Click group, and errors as one line, a hint and an exit code.

Commands are a table of names, modules and help lines, imported when they are used, so that `--help` loads none of them.
Knows no command's options.
"""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import click

from ..parallel.errors import NoPlanError, UserError, did_you_mean, lacks_disk

PROGRAM = "gptoss-launch"
SETTINGS = "[KEY=VALUE]..."  # metavar of the argument of commands that take settings

# name: (module in launch.commands whose `command` is the Click command, help line)
COMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("plan", "Show what would run here, or on a named machine, and why."),
    "serve": ("serve", "Serve a model through the OpenAI API."),
    "generate": ("generate", "Answer one prompt in the terminal."),
    "finetune": ("finetune", "Fine-tune a model on conversations."),
    "export": ("export", "Write what a run has trained as an adapter or a whole model."),
    "eval": ("eval", "Count right answers to a file of conversations."),
    "bench": ("bench", "Measure how fast a model decodes, prefills and serves."),
    "top": ("top", "Watch a running server in the terminal."),
    "doctor": ("doctor", "Check whether this machine is fit to run a model."),
    "submit": ("submit", "Submit a job to Slurm: serve, finetune, bench or preflight."),
    "jobs": ("jobs", "Follow, stop and enter the jobs that were submitted."),
    "lint": ("lint", "Find the traps in a batch script of your own."),
    "checkpoint": ("checkpoint", "Write random checkpoints in the published layout."),
}

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class _LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f".commands.{COMMANDS[cmd_name][0]}", __package__).command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise UserError(f"no command {args[0]!r}", did_you_mean(args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])


def _print_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from .version import own_version

    click.echo(f"{PROGRAM} {own_version()}")
    ctx.exit()


@click.group(cls=_LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
@click.pass_context
def group(ctx: click.Context) -> None:
    """Plan, serve and fine-tune gpt-oss-20b and 120b on your own GPUs."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code. Errors that a person can cause go to stderr, others are raised."""
    try:
        code = group.main(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UserError as error:
        tried = error.tried if isinstance(error, NoPlanError) else ()
        _complain(error.message, tried, error.hint)
        return error.exit_code
    except click.UsageError as error:
        _complain(*_usage(error))
        return error.exit_code
    except click.ClickException as error:
        _complain(error.format_message(), (), "")
        return error.exit_code
    except click.Abort:
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read our output has left, as in `plan | head`
        _drop_output()
        return 1
    except OSError as error:
        if not lacks_disk(error):  # that of a file of ours, or of a redirected stdout
            raise
        _drop_output()
        _complain(
            f"{error.filename or 'output'} cannot be written: {error.strerror}", (), "make room, or write elsewhere"
        )
        return UserError.exit_code


def _drop_output() -> None:
    """What is still in the buffer of stdout goes nowhere, or Python would complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(error: click.UsageError) -> tuple[str, tuple[str, ...], str]:
    """(message, nothing tried, hint) of what Click says."""
    path = error.ctx.command_path if error.ctx else f"{PROGRAM} COMMAND"
    help_line = f"{path} --help lists what it takes"
    if isinstance(error, click.NoSuchOption):
        params = error.ctx.command.params if error.ctx else []
        options = [param for param in params if isinstance(param, click.Option)]
        near = get_close_matches(error.option_name, [name for option in options for name in option.opts], n=1)
        if not near and any(param.metavar == SETTINGS for param in params if isinstance(param, click.Argument)):
            key = error.option_name.lstrip("-").replace("-", "_")
            return f"no option {error.option_name}", (), f"a setting has no dashes: {key}=VALUE; {help_line}"
        shown = {name for option in options if not option.hidden for name in option.opts}
        return f"no option {error.option_name}", (), did_you_mean(error.option_name, shown.union(near))
    return error.format_message().rstrip("."), (), help_line


def _complain(message: str, tried: tuple[str, ...], hint: str) -> None:
    click.echo(f"error: {message}", err=True)
    for line in tried:
        click.echo(f"tried: {line}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)


def main() -> None:
    for name in ("stdin", "stdout", "stderr"):  # in this order: a file gets the lowest number that is free
        if getattr(sys, name) is None:  # closed by whoever started us, as by `>&-`; a socket must not take its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr does: no locale is a reason to end with a traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))

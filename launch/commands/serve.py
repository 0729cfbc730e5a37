"""`serve MODEL`: the OpenAI API on a port, from plan to URL, until a signal ends it."""

import asyncio
import json as json_text
import socket
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ...parallel.errors import UserError
from ...parallel.planning.plan import Plan
from ..nodes import HEAD_HINT, Meeting, Nodes, read_nodes, refuse_loopback, reserve_port
from ..restarts import RESTARTS, Restarts
from ..settings import ServeSettings, load_settings, settings_options

ERRORS_OUT_S = 1.0  # after a rank died: for the HTTP process to tell its clients


@dataclass(frozen=True)
class Door:
    """How clients come in, and other nodes. url: what clients put as base_url."""

    listener: socket.socket
    url: str
    drain_s: float
    arguments: tuple[str, ...]  # of the HTTP process
    nodes: socket.socket | None = None


@click.command
@click.argument("model")
@settings_options(ServeSettings)
@click.option(
    "--record-routing",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write how often each expert is used, for plan --routing.",
)
@click.option("--check-ranks", is_flag=True, help="Compare sums and router choices across ranks; slow.")
def command(
    model: str, config: str | None, json: bool, record_routing: Path | None, check_ranks: bool, **flags: Any
) -> None:
    """Serve MODEL through the OpenAI API.

    MODEL is a checkpoint folder, a hub id such as openai/gpt-oss-20b, or tiny. Prints one line with the URL on stdout
    once it can answer. SIGTERM or Ctrl-C lets running answers finish for --drain-s seconds; a second one ends at once.

    On several nodes run the same command on each, with its own --node-rank: replicas of all nodes answer through
    node 0, which alone has the port and prints the URL. A replica that no node holds lies on several; it is over when
    one of them is lost. Traffic between nodes is not encrypted.
    """
    from ..extras import need_serve_extra
    from ..resolve import make_plan
    from ..tables import print_plan

    settings = load_settings(ServeSettings, config, flags)
    if settings.engine == "vllm":
        if record_routing is not None or check_ranks:
            flag = "--check-ranks" if check_ranks else "--record-routing"
            raise UserError(f"--engine vllm: {flag}", "it looks into ranks of ours: leave --engine out")
        if settings.nnodes > 1:
            raise UserError(f"--engine vllm: --nnodes {settings.nnodes}", "one node at a time: leave --engine out")
        serve_vllm(model, settings, json)
        return
    need_serve_extra("serve")
    from ..supervise import WORKER

    watching = ["--check-ranks"] if check_ranks else []
    if record_routing is not None:
        if not record_routing.absolute().parent.is_dir():
            raise UserError(f"--record-routing {record_routing}: no such folder", "name a file in an existing folder")
        watching += ["--record-routing", str(record_routing.absolute())]
    nodes = read_nodes(settings)
    if nodes is not None:
        refuse_loopback(nodes)
        if nodes.rank > 0:
            from ..follower import follow

            asyncio.run(follow(nodes, model, settings.drain_s, WORKER, worker_arguments=watching))
            return
    door = open_door(model, settings, nodes)
    with door.listener, door.nodes or nullcontext():
        plan = make_plan(model, settings, need_weights=True)
        if plan.nodes != settings.nnodes:
            message = f"--dp {plan.dp} gives work to {plan.nodes} of --nnodes {settings.nnodes}"
            raise UserError(message, f"--nnodes {plan.nodes}, or more replicas")
        print_plan(plan, to_stderr=True)
        if nodes is not None:
            click.echo(f"other nodes join at {nodes.head}, by the same command with a --node-rank of theirs", err=True)
        asyncio.run(serve(plan, door, WORKER, worker_arguments=watching, json=json, nodes=nodes))


def serve_vllm(model: str, settings: ServeSettings, json: bool) -> None:
    """The plan through vLLM, until a signal. The URL comes on stdout once it answers, as with our own engine."""
    import os
    import shlex
    import tempfile

    from ..keys import read_keys
    from ..resolve import make_plan
    from ..stop import StopSignals
    from ..tables import print_plan
    from ..vllm import (
        VOCABULARY_VARIABLE,
        run_vllm,
        vllm_arguments,
        vllm_environment,
        vllm_notes,
        vllm_program,
        write_vocabulary,
    )

    program = vllm_program()
    door = open_door(model, settings)
    with door.listener:
        plan = make_plan(model, settings, need_weights=True)
        port = door.listener.getsockname()[1]
        command = [*program, *vllm_arguments(plan, settings, settings.served_name or model, port)]
        keys = read_keys(settings.api_key_file)
        environment = vllm_environment(os.environ, keys, settings.api_key_file)
    print_plan(plan, to_stderr=True)

    def ready() -> None:
        click.echo(json_text.dumps({"url": door.url, "plan": plan.to_json()}) if json else door.url)

    async def run() -> None:
        with StopSignals().caught() as stop:
            await run_vllm(command, environment, door.url, settings.drain_s, stop, ready)

    with tempfile.TemporaryDirectory(prefix="gptoss-") as folder:
        assert plan.checkpoint is not None
        if VOCABULARY_VARIABLE not in environment and write_vocabulary(Path(plan.checkpoint), Path(folder)):
            environment[VOCABULARY_VARIABLE] = folder
        for line in (*vllm_notes(plan, keys, VOCABULARY_VARIABLE in environment), shlex.join(command)):
            click.echo(line, err=True)
        asyncio.run(run())


def open_door(model: str, settings: ServeSettings, nodes: Nodes | None = None) -> Door:
    """Binds the port, and that of other nodes, and reads keys and certificates, so that what is wrong with them is
    said before anything else."""
    from ..extras import need_tools_extra
    from ..keys import KEYS_VARIABLE, read_keys
    from ..listen import bind, is_loopback, tls_files

    keys = read_keys(settings.api_key_file)
    tls = tls_files(settings.tls_cert, settings.tls_key)
    if settings.otlp is not None and find_spec("opentelemetry.exporter") is None:
        need = "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        raise UserError(f"--otlp {settings.otlp} needs OpenTelemetry's exporter", need)
    if settings.tool_server:
        need_tools_extra(f"--tool-server {settings.tool_server[0]}")
    if settings.access_log not in (None, "-") and not Path(settings.access_log).absolute().parent.is_dir():
        raise UserError(f"--access-log {settings.access_log}: no such folder", "name a file in an existing folder")
    if not keys and not is_loopback(settings.host):
        advice = f"set --api-key-file or {KEYS_VARIABLE}"
        click.echo(f"warning: whoever reaches {settings.host} may use this server, without a key: {advice}", err=True)
    if keys and tls is None and not is_loopback(settings.host):
        click.echo("warning: keys travel in the clear without --tls-cert and --tls-key", err=True)
    listener = bind(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"{'https' if tls else 'http'}://{host}:{listener.getsockname()[1]}/v1"
    arguments = ["--served-name", settings.served_name or model, "--drain-s", str(settings.drain_s)]
    options = {"api-key-file": settings.api_key_file, "access-log": settings.access_log, "otlp": settings.otlp}
    options |= {"tls-cert": tls[0], "tls-key": tls[1]} if tls else {}
    for name, value in options.items():
        arguments += [] if value is None else [f"--{name}", str(value)]
    for origin in settings.cors_origin:
        arguments += ["--cors-origin", origin]
    for server in settings.tool_server:
        arguments += ["--tool-server", server]
    if nodes is None:
        return Door(listener, url, settings.drain_s, tuple(arguments))
    arguments += ["--node-key-file", str(settings.node_key_file)]
    try:
        others = bind(nodes.host, nodes.port, HEAD_HINT)
    except UserError:
        listener.close()
        raise
    return Door(listener, url, settings.drain_s, tuple(arguments), others)


async def serve(
    plan: Plan,
    door: Door,
    worker: str,
    *,
    worker_arguments: Sequence[str] = (),
    json: bool = False,
    restarts: Restarts = RESTARTS,
    nodes: Nodes | None = None,
) -> None:
    """Runs until a signal. worker: the module that every rank runs. restarts: of replicas, if there are several. nodes:
    where there are several, of which this is the first.

    Raises UserError for what keeps it from starting, RankDiedError when the HTTP process or the last replica dies.
    """
    from ..loading import memory_lines, note_lines, progress_bar, say_tiny
    from ..stop import StopSignals, until
    from ..supervise import Supervisor

    def say(text: str) -> None:
        click.echo(text, err=True)

    held = reserve_port(nodes.host) if nodes is not None and plan.span > 1 else None
    meeting = None if nodes is None or held is None else Meeting(nodes.host, held.getsockname()[1])
    with StopSignals().caught() as stop, progress_bar() as bar, held or nullcontext():
        async with Supervisor(plan, worker, bar.show, worker_arguments, say, restarts, meeting=meeting) as supervisor:
            # The HTTP process first: alive, not ready, while the ranks load.
            await supervisor.start_http(door.listener, door.arguments, door.nodes)
            await supervisor.start_replicas()
            answers = await until(supervisor.ready(), stop.first)
            if answers is None:
                return
            bar.stop()
            for line in (*memory_lines(plan, answers), *note_lines(answers)):
                click.echo(line, err=True)
            say_tiny(plan)
            click.echo(json_text.dumps({"url": door.url, "plan": plan.to_json()}) if json else door.url)
            error = await until(supervisor.failed(), stop.first)
            if error is not None:
                await supervisor.drain(ERRORS_OUT_S)
                raise error
            click.echo(f"stopping: running answers get {door.drain_s:g} s; a second signal ends at once", err=True)
            # One second more than the answers have: for what is said to those that are cut short.
            await until(supervisor.drain(door.drain_s + 1), stop.second)

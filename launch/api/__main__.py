"""The HTTP process, started by `supervise`: python -m gptoss_launch.launch.api --control SOCKET --fd N ...

Answers at once (alive, not ready), reports Ready when every replica answers, and ends with its supervisor. SIGTERM lets
running answers finish for --drain-s seconds; those that remain end with an error event.
"""

import argparse
import asyncio
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import uvicorn
from prometheus_client import CollectorRegistry

from ...parallel.engine.lifeline import hold
from ...parallel.engine.wire import Failed, Ready, encode
from ...parallel.errors import UserError
from ...parallel.planning.plan import Plan
from ..dispatch import Dispatch
from ..engine_client import EngineClient, local
from ..keys import read_keys
from ..nodes import read_node_key
from ..tokenizer import load_tokenizer
from .app import create_app
from .front import Front, open_front
from .lag import watch_lag
from .metrics import Metrics
from .node_door import NodeDoor
from .openapi import add_openapi
from .page import page_routes
from .protocol import connection
from .record import AccessLog, make_tracer
from .replicas import REQUEST_LIMIT, Replicas
from .served import Served
from .tidy import keep_tidy, settle
from .tool_server import find_tools


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again after the drain; `_serve` takes it instead."""
        yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="gptoss_launch.launch.api")
    parser.add_argument("--control", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True, help="the listening socket, inherited")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--engine", type=Path, action="append", help="a leader's socket, one a replica of this node")
    parser.add_argument("--nodes-fd", type=int, help="where other nodes come in, inherited")
    parser.add_argument("--node-key-file", type=Path)
    parser.add_argument("--meeting-port", type=int, default=0, help="where ranks of several nodes meet")
    parser.add_argument("--served-name", required=True)
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--tls-cert", type=Path)
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--cors-origin", action="append", default=[])
    parser.add_argument("--tool-server", action="append", default=[])
    parser.add_argument("--access-log")
    parser.add_argument("--otlp")
    parser.add_argument("--drain-s", type=float, required=True)
    arguments = parser.parse_args()
    lifeline = hold(arguments.control, role="http")
    # Each stream takes a descriptor, and the usual limit is 1,024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        asyncio.run(_serve(arguments, lifeline))
    except UserError as error:
        lifeline.sendall(encode(Failed(-1, error.message, error.hint, error.exit_code)))
        raise SystemExit(1) from None


async def _serve(arguments: argparse.Namespace, lifeline: socket.socket) -> None:
    plan = Plan.load(arguments.plan)
    assert plan.checkpoint is not None, "only a plan with weights is served"
    dials = [local(path) for path in arguments.engine]
    door = None
    if arguments.nodes_fd is not None:
        door = NodeDoor(
            plan,
            read_node_key(arguments.node_key_file),
            partial(print, file=sys.stderr, flush=True),
            lambda failed: lifeline.sendall(encode(failed)),
            arguments.meeting_port,
        )
        dials += [door.dial(replica) for replica in range(len(dials), plan.dp)]
    dispatch = Dispatch(len(dials))
    metrics = Metrics(CollectorRegistry(), arguments.served_name, len(dials))
    engines = [
        EngineClient(dial, partial(metrics.report, replica), partial(dispatch.forget, replica))
        for replica, dial in enumerate(dials)
    ]
    tokenizer = load_tokenizer(Path(plan.checkpoint))
    replicas = Replicas(engines, dispatch, metrics)
    tools = await find_tools(arguments.tool_server) if arguments.tool_server else None
    routes = create_app(Served(arguments.served_name, plan.context_tokens, tokenizer, replicas, tools=tools))
    routes.include_router(page_routes(plan))
    add_openapi(routes)
    front = Front(
        keys=read_keys(arguments.api_key_file),
        cors_origins=arguments.cors_origin,
        most=REQUEST_LIMIT * len(engines),
        log=AccessLog(arguments.access_log) if arguments.access_log else None,
        count=metrics.http,
        tracer=make_tracer(arguments.otlp) if arguments.otlp else None,
    )
    config = uvicorn.Config(
        open_front(routes, front),
        http=connection(),
        ssl_certfile=arguments.tls_cert,
        ssl_keyfile=arguments.tls_key,
        proxy_headers=False,  # who is in front of us is not known, and nothing is decided by where a client comes from
        server_header=False,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(arguments.drain_s) + 1,  # after the drain, which ends the streams itself
    )
    server = _Server(config)

    def drain() -> None:
        server.should_exit = True
        asyncio.get_running_loop().call_later(arguments.drain_s, close_all)

    def close_all() -> None:
        for engine in engines:
            engine.close("the server is stopping")

    async def announce() -> None:
        await asyncio.gather(*(engine.found.wait() for engine in engines))
        lifeline.sendall(encode(Ready(-1, plan.digest, {}, {}, 0.0)))

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, drain)
    settle()
    if door is not None:
        await door.open(socket.socket(fileno=arguments.nodes_fd), engines)
    works = [announce(), watch_lag(metrics.lag), keep_tidy(lambda: sum(one.running for one in engines))]
    works += [one.keep_connected() for one in engines]
    background = [asyncio.create_task(work) for work in works]
    with socket.socket(fileno=arguments.fd) as listener:
        await server.serve(sockets=[listener])
    for task in background:
        task.cancel()
    died = any(engine.dead for engine in engines)  # before it is us who closes them
    close_all()
    if door is not None:
        await door.close(died)


if __name__ == "__main__":
    main()

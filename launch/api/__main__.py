"""The HTTP process, started by `supervise`: python -m gptoss_launch.launch.api --control SOCKET --fd N ...

Answers at once (alive, not ready), reports Ready when every replica answers, and ends with its supervisor. SIGTERM lets
running answers finish for --drain-s seconds; those that remain end with an error event.
"""

import argparse
import asyncio
import signal
import socket
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
from ..engine_client import EngineClient
from ..listen import read_api_key
from ..tokenizer import load_tokenizer
from .app import create_app
from .metrics import Metrics
from .replicas import Replicas
from .served import Served


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
    parser.add_argument("--engine", type=Path, action="append", required=True, help="a leader's socket, one a replica")
    parser.add_argument("--served-name", required=True)
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--drain-s", type=float, required=True)
    arguments = parser.parse_args()
    lifeline = hold(arguments.control, role="http")
    try:
        asyncio.run(_serve(arguments, lifeline))
    except UserError as error:
        lifeline.sendall(encode(Failed(-1, error.message, error.hint, error.exit_code)))
        raise SystemExit(1) from None


async def _serve(arguments: argparse.Namespace, lifeline: socket.socket) -> None:
    plan = Plan.load(arguments.plan)
    assert plan.checkpoint is not None, "only a plan with weights is served"
    key = read_api_key(arguments.api_key_file) if arguments.api_key_file else None
    dispatch = Dispatch(len(arguments.engine))
    metrics = Metrics(CollectorRegistry(), arguments.served_name, len(arguments.engine))
    engines = [
        EngineClient(path, partial(metrics.report, replica), partial(dispatch.forget, replica))
        for replica, path in enumerate(arguments.engine)
    ]
    tokenizer = load_tokenizer(Path(plan.checkpoint))
    replicas = Replicas(engines, dispatch, metrics)
    app = create_app(Served(arguments.served_name, plan.context_tokens, tokenizer, replicas, key))
    config = uvicorn.Config(
        app,
        http="h11",
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
    background = [asyncio.create_task(work) for work in (announce(), *(one.keep_connected() for one in engines))]
    with socket.socket(fileno=arguments.fd) as listener:
        await server.serve(sockets=[listener])
    for task in background:
        task.cancel()
    close_all()


if __name__ == "__main__":
    main()

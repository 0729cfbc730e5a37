"""A rank's entry point: torchrun runs this module with --plan FILE --control SOCKET --listen SOCKET.

Loads this rank's share of the model as the plan says and reports to the supervisor over the control socket. Rank 0, the
leader, then serves front ends on its own socket, one request at a time, the others waiting their turn; the other ranks
follow its word. Knows no text and no HTTP.
"""

import argparse
import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..planning.plan import Plan
from .front_ends import FrontEnds
from .lifeline import hold
from .request import Request, Token
from .trace import Trace, trace_file
from .wire import Cancel, Failed, Generate, Message, Progress, Refused, Tokens, encode

if TYPE_CHECKING:
    from .engine import Engine
    from .lockstep import Broadcast, Lockstep
    from .routes import Recorder

PROGRESS_EVERY_S = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--plan", "--control", "--listen"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--check-ranks", action="store_true", help="compare sums and router choices across ranks")
    parser.add_argument("--record-routing", type=Path, help="where rank 0 writes how often each expert is used")
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])  # set by torchrun
    control = hold(arguments.control, "rank", rank)  # before torch is loaded: from here on nothing outlives the command
    trace = Trace(trace_file(arguments.control, rank))
    try:
        run(arguments, Plan.load(arguments.plan), rank, control, trace)
    except UserError as error:
        fail(control, Failed(rank, error.message, error.hint, error.exit_code))
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {str(error).partition(os.linesep)[0]}"
        fail(control, Failed(rank, said, "", exit_code=1, follows=trace.waits))


def fail(control: socket.socket, message: Failed) -> None:
    control.sendall(encode(message))
    sys.exit(message.exit_code)


def run(arguments: argparse.Namespace, plan: Plan, rank: int, control: socket.socket, trace: Trace) -> None:
    """Load, report, serve; returns never."""
    from .lockstep import Broadcast, NoFollowers
    from .start import Options, join, start

    last_s = 0.0

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PROGRESS_EVERY_S or done_bytes == total_bytes:
            last_s = time.monotonic()
            control.sendall(encode(Progress(rank, done_bytes, total_bytes)))

    options = Options(arguments.check_ranks, arguments.record_routing if rank == 0 else None)
    join(plan)
    engine, recorder, ready = start(plan, rank, options, trace, progress)
    if rank == 0:
        front_ends = FrontEnds(arguments.listen)
        control.sendall(encode(ready))
        lead(engine, front_ends, NoFollowers() if plan.ranks == 1 else Broadcast(), trace, recorder)
    control.sendall(encode(ready))
    follow(engine, Broadcast(), trace)


class Turns:
    """Whose request runs, and who waits in which order. On the leader."""

    def __init__(self, engine: "Engine", front_ends: FrontEnds, lockstep: "Lockstep", trace: Trace) -> None:
        self._engine = engine
        self._trace = trace
        self._front_ends = front_ends
        self._lockstep = lockstep
        self._waiting: deque[Ticket] = deque()
        self._running: tuple[Ticket, Generator[Token]] | None = None

    @property
    def idle(self) -> bool:
        return self._running is None and not self._waiting

    def take(self, front_end: socket.socket, message: Message | None) -> None:
        """One message from `front_end`; None: it is gone, and so is all that it asked for."""
        match message:
            case Generate(request):
                self._waiting.append(Ticket(front_end, request))
            case Cancel(request_id):
                self._drop(lambda ticket: ticket.front_end is front_end and ticket.request.id == request_id)
            case None:
                self._drop(lambda ticket: ticket.front_end is front_end)

    def step(self) -> None:
        """One token of the running request, after starting the next one if none runs."""
        if self._running is None:
            ticket = self._waiting.popleft()
            reason = self._engine.refusal(ticket.request)
            if reason is not None:
                self._front_ends.send(ticket.front_end, Refused(ticket.request.id, reason))
                return
            self._lockstep.tell("start", ticket.request)
            self._running = ticket, self._engine.generate(ticket.request)
        ticket, stream = self._running
        self._lockstep.tell("go_on")
        self._trace.step()
        token = next(stream)
        self._trace.idle()
        self._front_ends.send(ticket.front_end, Tokens((token,)))
        if token.finish_reason is not None:
            self._end()

    def _drop(self, is_over: Callable[["Ticket"], bool]) -> None:
        self._waiting = deque(ticket for ticket in self._waiting if not is_over(ticket))
        if self._running and is_over(self._running[0]):
            self._end()

    def _end(self) -> None:
        assert self._running is not None
        self._lockstep.tell("end")
        self._running[1].close()  # frees its pages
        self._running = None


@dataclass(frozen=True)
class Ticket:
    """A request, and who asked for it."""

    front_end: socket.socket
    request: Request


def lead(
    engine: "Engine", front_ends: FrontEnds, lockstep: "Lockstep", trace: Trace, recorder: "Recorder | None"
) -> None:
    """One request at a time, for as long as the process lives."""
    from .lockstep import IDLE_EVERY_S

    turns = Turns(engine, front_ends, lockstep, trace)
    while True:
        for front_end, message in front_ends.poll(IDLE_EVERY_S if turns.idle else 0):
            turns.take(front_end, message)
        if turns.idle:
            lockstep.tell("idle")
        else:
            turns.step()
        if recorder is not None:
            recorder.write(at_once=turns.idle)


def follow(engine: "Engine", lockstep: "Broadcast", trace: Trace) -> None:
    """Do what the leader does, for as long as the process lives."""
    stream: Generator[Token] | None = None
    while True:
        word, request = lockstep.hear()
        if word == "start":
            assert request is not None
            stream = engine.generate(request)
        elif word == "go_on":
            assert stream is not None
            trace.step()
            next(stream)
            trace.idle()
        elif word == "end" and stream is not None:
            stream.close()
            stream = None


if __name__ == "__main__":
    main()

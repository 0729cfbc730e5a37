"""A rank's entry point: torchrun, or the supervisor itself where one rank is all there is, runs this module with
--plan FILE --control SOCKET --listen SOCKET.

Loads this rank's share of the model as the plan says and reports to the supervisor over the control socket. Rank 0, the
leader, then serves front ends on its own socket; the other ranks do what its step records say. Knows no text and no
HTTP.
"""

import argparse
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, lacks_host_memory
from ..planning.plan import Plan
from .front_ends import FrontEnds
from .laps import Laps
from .lifeline import hold
from .trace import Trace, trace_file
from .wire import Failed, Progress, Ready, encode

if TYPE_CHECKING:
    from .engine import Engine
    from .grammars import Grammars
    from .leader import Launched
    from .lockstep import Steps
    from .profile import Profiler
    from .record import Record
    from .routes import Recorder

PROGRESS_EVERY_S = 0.1
IDLE_POLL_S = 5.0
QUIET_S = 0.05  # before a graph is prepared, which takes as long, and which whoever asks meanwhile waits for


def main() -> None:
    laps = Laps()
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--plan", "--control", "--listen"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--check-ranks", action="store_true", help="compare sums and router choices across ranks")
    parser.add_argument("--record-routing", type=Path, help="where rank 0 writes how often each expert is used")
    parser.add_argument("--profile", type=Path, help="where rank 0 writes which kernels decode steps spend time in")
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])  # as torchrun sets it
    control = hold(arguments.control, "rank", rank)  # before torch is loaded: from here on nothing outlives the command
    trace = Trace(trace_file(arguments.control, rank))
    try:
        run(arguments, Plan.load(arguments.plan), rank, control, trace, laps)
    except UserError as error:
        fail(control, Failed(rank, error.message, error.hint, error.exit_code))
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {str(error).partition(os.linesep)[0]}"
        fail(control, Failed(rank, said, "", exit_code=1, follows=trace.waits))


def fail(control: socket.socket, message: Failed) -> None:
    control.sendall(encode(message))
    sys.exit(message.exit_code)


def run(arguments: argparse.Namespace, plan: Plan, rank: int, control: socket.socket, trace: Trace, laps: Laps) -> None:
    """Load, report, serve; returns never."""
    from .engine import sizes_of
    from .grammars import grammars_of
    from .lockstep import steps_file
    from .start import Options, join_in_step, start

    laps.mark("imports")
    last_s = 0.0

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= PROGRESS_EVERY_S or done_bytes == total_bytes:
            last_s = time.monotonic()
            control.sendall(encode(Progress(rank, done_bytes, total_bytes)))

    options = Options(arguments.check_ranks, arguments.record_routing)
    grammars = grammars_of(plan.checkpoint, plan.spec.vocab) if rank == 0 else None
    steps = join_in_step(plan, rank, options, steps_file(arguments.control), sizes_of(plan).words)
    laps.mark("joining")
    engine, recorder, ready = start(plan, rank, options, trace, progress, laps)
    if grammars is not None:
        front_ends = FrontEnds(arguments.listen)
        control.sendall(encode(ready))
        profiler = None
        if arguments.profile is not None:
            from .profile import Profiler

            profiler = Profiler(arguments.profile, engine.device)
        lead(engine, front_ends, steps, grammars, trace, recorder, ready, profiler)
    control.sendall(encode(ready))
    assert steps is not None, "only the leader is alone"
    follow(engine, steps, trace)


def lead(
    engine: "Engine",
    front_ends: FrontEnds,
    steps: "Steps | None",
    grammars: "Grammars",
    trace: Trace,
    recorder: "Recorder | None",
    ready: Ready,
    profiler: "Profiler | None" = None,
) -> None:
    """Steps, as long as there is anything to do, for as long as the process lives."""
    from .engine import refusal, scheduler_for
    from .leader import Device, Facts, Launched, Leader
    from .record import Record

    def launch(record: Record) -> Launched:
        trace.step()
        if profiler is not None:
            profiler.step(record.head)
        if steps is not None:
            steps.publish(record)
        return launch_step(engine, record)

    times = ready.times
    leader = Leader(
        scheduler_for(engine.plan),
        Device(
            launch,
            engine.graphs.of,
            engine.sizes,
            ahead=engine.device.type == "cuda",
            unprepared=engine.graphs.chunks[:-1],  # the start has captured the largest
        ),
        front_ends.send,
        lambda request: refusal(engine.plan, request),
        grammars,
        facts=Facts(times["decode_step_s"], times.get("communication_s", 0.0), ready.slow_paths),
        experts=engine.experts,
    )
    trace.idle()
    while True:
        polled_s = time.monotonic()
        longest_s = QUIET_S if leader.unprepared else IDLE_POLL_S
        for front_end, message in front_ends.poll(longest_s if leader.idle else 0):
            leader.take(front_end, message)
        if leader.idle and time.monotonic() - polled_s >= longest_s:
            if leader.unprepared:
                leader.prepare()
            else:
                grammars.load()
        leader.turn()
        if leader.idle:
            trace.idle()
            if profiler is not None:
                profiler.idle()
        if recorder is not None:
            recorder.write(at_once=leader.idle)


def launch_step(engine: "Engine", record: "Record") -> "Launched":
    """Raises StepError where the device or the host has no memory left for the step, if this rank is alone: others
    would have taken it, and wait for this one. And where a file that experts are read from has been cut, which only a
    rank alone does.
    """
    import torch

    from .leader import StepError

    try:
        return engine.launch(record)
    except UserError as error:
        raise StepError(f"{error.message}: {error.hint}") from None
    except (RuntimeError, MemoryError) as error:
        of_device = isinstance(error, torch.OutOfMemoryError)
        if engine.plan.ranks > 1 or not (of_device or lacks_host_memory(error)):
            raise
        sentences = " ".join(str(error).split()).split(". ")
    wanted = ". ".join(sentences[:2])  # that it is full, and how much was wanted; then come figures and advice
    if of_device:
        torch.cuda.empty_cache()  # outside of the handler, whose traceback keeps the step's tensors
    where = "on the device" if of_device else "in the host"
    raise StepError(f"no memory {where} for a step of {record.head.tokens} tokens: {wanted}")


def follow(engine: "Engine", steps: "Steps", trace: Trace) -> None:
    """Do what the leader's records say, for as long as the process lives."""
    from .record import after

    number = 1
    while True:
        trace.idle()
        record = steps.wait(number)
        trace.step()
        engine.launch(record)
        number = after(number)


if __name__ == "__main__":
    main()

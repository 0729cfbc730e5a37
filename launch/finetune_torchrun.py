"""Several ranks on this host: starts torchrun, passes a wish to stop on, and tells from the ranks' ends how all ended.

Ranks are this program again, which finds torchrun's variables in its environment. Does not know what they do.
"""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ..parallel.errors import RankDiedError
from .cli import PROGRAM

MODULE = "gptoss_launch.launch"
STOPPED = 75  # resumable (contract of exit codes; EX_TEMPFAIL of sysexits.h)
SAVING = b"\nending after this step, with a checkpoint; Ctrl-C once more ends it at once\n"
SAID = (1, 2, 4, 6)  # a rank that ends with one of these has said why


def torchrun_arguments(ranks: int, words: Sequence[str]) -> list[str]:
    """Of torchrun; words: of this program. Port 0: the rendezvous takes a free one."""
    return [
        *("--nnodes", "1", "--nproc-per-node", str(ranks), "--max-restarts", "0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *("--signals-to-handle", "SIGHUP,SIGQUIT"),  # the others are ours
        *("-m", MODULE, *words),
    ]


def torchrun_line(ranks: int, words: Sequence[str]) -> str:
    """What a person can type instead. Signals then go to the ranks."""
    arguments = torchrun_arguments(ranks, words)
    place = arguments.index("--signals-to-handle")
    return shlex.join(["torchrun", *arguments[:place], *arguments[place + 2 :]])


def start_ranks(ranks: int, words: Sequence[str], stop_file: Path) -> int:
    """The exit code of all ranks. SIGTERM, SIGUSR1 or Ctrl-C writes `stop_file`, which they look at after each step; a
    second one ends them at once. Raises RankDiedError, which names the rank that ended first and did not say why."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    log = logging.getLogger("torch.distributed.elastic")  # it would print what we say in a line
    log.addHandler(logging.NullHandler())
    log.propagate = False
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config, entry, arguments = config_from_args(parse_args(torchrun_arguments(ranks, words)))
    try:
        with _stop_by_file(stop_file, SignalException):
            elastic_launch(config, entry)(*arguments)
    except ChildFailedError as error:
        return ended({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def ended(codes: Mapping[int, int]) -> int:
    """The exit code of a run from those of the ranks that had ended when torchrun looked, or that it ended then. A rank
    stops (75) together with all; one that lost the others (7), or that torchrun ended, is only the cause where there is
    no other."""
    follows = {STOPPED: 1, RankDiedError.exit_code: 2, -signal.SIGTERM: 3}
    rank, code = min(codes.items(), key=lambda item: (follows.get(item[1], 0), item[0]))
    if code == STOPPED or code in SAID:
        if code != STOPPED:
            print(f"{PROGRAM}: rank {rank} ended with exit code {code}, and with it the run", file=sys.stderr)
        return code
    how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    hint = "the last checkpoint stands, and the same command goes on from it"
    if -code == signal.SIGKILL:
        hint += "; without a message it was mostly the kernel, short of memory"
    raise RankDiedError(f"rank {rank} {how}", hint)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _stop_by_file(stop_file: Path, at_once: Any) -> Iterator[None]:
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            raise at_once(f"signal {number} came twice", signal.SIGKILL)
        if number == signal.SIGINT:
            os.write(2, SAVING)
        stop_file.touch()

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

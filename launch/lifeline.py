"""Puts torchrun, and the HTTP process, on a lifeline (`parallel/engine/lifeline.py`) of the supervisor.

    python -m gptoss_launch.launch.lifeline CONTROL_SOCKET torch.distributed.run ARGUMENTS...

runs a module that knows nothing of us as a process that ends with the command. Ranks hold lifelines of their own.
"""

import runpy
import socket
import sys
from pathlib import Path

from ..parallel.engine.lifeline import hold, remove_folder


def attach(control: Path, role: str) -> socket.socket:
    """`hold`, for a process that may be the last one: if the supervisor died before it was reached, the run folder is
    removed here, because nobody else will."""
    try:
        return hold(control, role)
    except ConnectionRefusedError:  # the socket is there, and nobody listens: it is a run folder, and a dead one
        remove_folder(control.parent)
        raise SystemExit(1) from None
    except FileNotFoundError:  # another process has removed it
        raise SystemExit(1) from None


def main() -> None:
    control, module, *arguments = sys.argv[1:]
    attach(Path(control), role="torchrun")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""The lifeline: a connection to the supervisor whose end is the end of this process.

Whatever kills the command (kill -9 too), the kernel closes its end of the Unix socket; every process that holds the
other end then removes the run folder and exits. The HTTP process calls `hold`; torchrun is run through this file:

    python -m gptoss_launch.launch.lifeline CONTROL_SOCKET torch.distributed.run ARGUMENTS...

Ranks hold a lifeline of their own (`parallel/engine/worker.py`). Knows nothing of what its process does.
"""

import os
import runpy
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

from ..parallel.engine.wire import Hello, encode

REMOVE_S = 1.0  # longest wait for others to stop writing into the run folder


def hold(control: Path, role: str) -> socket.socket:
    """Connects to the supervisor and says hello. From then on this process ends, and the folder that holds `control` is
    removed, as soon as the supervisor's end closes. The socket returned carries Ready or Failed the other way.

    Raises OSError if the supervisor is gone already.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(control))
    connection.sendall(encode(Hello(role=role, rank=-1, pid=os.getpid(), host=socket.gethostname())))
    threading.Thread(target=_end_with, args=(connection, control.parent), name="lifeline", daemon=True).start()
    return connection


def remove_folder(folder: Path) -> None:
    """Removes a run folder whose other users may be removing it, or still writing into it, at the same moment."""
    deadline = time.monotonic() + REMOVE_S
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def _end_with(connection: socket.socket, folder: Path) -> None:
    try:
        while connection.recv(4096):
            pass
    except OSError:
        pass  # a reset is an end as well
    remove_folder(folder)
    os._exit(1)  # not sys.exit: only this thread would end


def main() -> None:
    control, module, *arguments = sys.argv[1:]
    hold(Path(control), role=module)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""The lifeline: a connection to the supervisor whose end is the end of this process.

Whatever kills the command (kill -9 too), the kernel closes its end of the Unix socket; every process that holds the
other end then removes the run folder and exits. Knows nothing of what its process does.
"""

import os
import shutil
import socket
import threading
import time
from pathlib import Path

from .wire import Hello, encode

REMOVE_S = 1.0  # longest wait for others to stop writing into the run folder


def hold(control: Path, role: str, rank: int = -1) -> socket.socket:
    """Connects to the supervisor and says hello. From then on this process ends, and the folder that holds `control` is
    removed, as soon as the supervisor's end closes. The socket returned carries Progress, Ready or Failed the other
    way.

    If the supervisor died before it was reached, the process ends here: with nobody else left, it removes the folder.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(control))
    except ConnectionRefusedError:  # the socket is there, and nobody listens: it is a run folder, and a dead one
        remove_folder(control.parent)
        raise SystemExit(1) from None
    except FileNotFoundError:  # another process has removed it
        raise SystemExit(1) from None
    connection.sendall(encode(Hello(role=role, rank=rank, pid=os.getpid(), host=socket.gethostname())))
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

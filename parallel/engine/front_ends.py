"""The leader's Unix socket: front ends connect, are greeted, send Generate and Cancel, and get Tokens and Refused.

Knows connections and messages; knows nothing of the engine. A connection that ends is told as a None in place of a
message.
"""

import os
import selectors
import socket
from collections.abc import Iterator
from pathlib import Path

from .wire import Decoder, Hello, Message, encode

READ_BYTES = 256 << 10  # of one connection in one poll; if it is prompts, that takes about 5 ms, which streams wait for
SEND_LIMIT_S = 10.0  # a front end that reads nothing for so long is taken for dead; the engine waits for nobody


class FrontEnds:
    """All connections of one leader."""

    def __init__(self, path: Path) -> None:
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._decoders: dict[socket.socket, Decoder] = {}
        # Told at once: to whom nothing was said, the kernel alone may have connected, and the process be dead.
        self._greeting = Hello("leader", 0, os.getpid(), socket.gethostname())

    def poll(self, timeout_s: float | None) -> Iterator[tuple[socket.socket, Message | None]]:
        """What has arrived; waits for at most timeout_s if nothing has (None: as long as it takes)."""
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                connection.settimeout(SEND_LIMIT_S)
                self._decoders[connection] = Decoder()
                self._selector.register(connection, selectors.EVENT_READ)
                self.send(connection, self._greeting)
                continue
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            try:
                data = _read(connection)
                messages = list(self._decoders[connection].feed(data))
            except (OSError, ValueError):  # reset, or no message of ours: nothing more can be understood
                data, messages = b"", []
            for message in messages:
                yield connection, message
            if not data:
                self._close(connection)
                yield connection, None

    def send(self, connection: socket.socket, message: Message) -> None:
        """A connection that cannot take it is shut down; `poll` then tells its end."""
        try:
            connection.sendall(encode(message))
        except OSError:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed by the other side already

    def _close(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._decoders[connection]
        connection.close()


def _read(connection: socket.socket) -> bytes:
    """What has come, at least a byte; empty at the end. The kernel holds little of what is on its way (unix(7)), and
    whoever sends goes on as it is read: with a single read for each step, long prompts would hold up for many steps
    what comes behind them, a Cancel for instance."""
    parts = [connection.recv(READ_BYTES)]
    left = READ_BYTES - len(parts[0])
    while parts[-1] and left > 0:
        try:
            parts.append(os.read(connection.fileno(), left))  # recv would wait, for as long as sending may take
        except BlockingIOError:
            break
        left -= len(parts[-1])
    return b"".join(parts)

"""What serve settles before anything is loaded: the listening socket, and the key that lets clients in."""

import socket
from pathlib import Path

from ..parallel.errors import UserError


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket, to be inherited by the HTTP process. Raises UserError if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot listen on {host} port {port}: {reason}", "choose another --port or --host") from None
    return listener


def read_api_key(path: Path) -> bytes:
    """The key that clients must send: the first line of a file. Raises UserError if there is none."""
    try:
        key = path.read_bytes().partition(b"\n")[0].strip()
    except OSError as error:
        raise UserError(f"--api-key-file {path}: {error.strerror}", "put the key on the file's first line") from None
    if not key:
        raise UserError(f"--api-key-file {path}: its first line is empty", "put the key there")
    return key

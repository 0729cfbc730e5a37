"""What serve settles before anything is loaded: the listening socket, and the files of TLS."""

import ipaddress
import socket
import ssl
from pathlib import Path

from ..parallel.errors import UserError

STALLED_S = 60.0  # a client may leave what it is sent unread for so long


def bind(host: str, port: int, hint: str = "choose another --port or --host") -> socket.socket:
    """A listening TCP socket, to be inherited by the HTTP process. Raises UserError, with `hint`, if the address cannot
    be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            # Accepted connections inherit both. A client that reads nothing, or is gone, ends after that time.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED_S * 1000))
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot listen on {host} port {port}: {reason}", hint) from None
    return listener


def tls_files(cert: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    """The certificate chain and its private key, checked to belong together; None without. Raises UserError."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise UserError("--tls-cert and --tls-key belong together", "give both, or neither")

    def no_password() -> bytes:
        raise UserError(f"--tls-key {key}: it is encrypted", "nobody is there to type its password: decrypt it")

    for path, flag in ((cert, "--tls-cert"), (key, "--tls-key")):
        if not path.is_file():
            raise UserError(f"{flag} {path}: no such file", "a PEM file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, no_password)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"--tls-cert {cert}, --tls-key {key}: {error}", "PEM files that belong together") from None
    return cert, key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

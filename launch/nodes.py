"""Which of several nodes this one is, where the first one is found, and the secret that they know each other by.

Read from --nnodes, --node-rank, --head and --node-key-file, as torchrun has the first three. Opens no connection.
"""

import ipaddress
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from ..parallel.errors import UserError
from .settings import ServeSettings

PORT = 29500  # torchrun's own for its first node
KEY_BYTES = 16  # at least
HEAD_HINT = "--head is an address of this node, node 0, with a free port"  # where it cannot be listened on
MAKE_KEY = "umask 077; head -c 32 /dev/urandom | base64 > FILE, and the same file on every node"


@dataclass(frozen=True)
class Nodes:
    """count: of all nodes. rank: of this one. host, port: of node 0, where the others join."""

    count: int
    rank: int
    host: str
    port: int
    key: bytes = field(repr=False)

    @property
    def head(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def read_nodes(settings: ServeSettings) -> Nodes | None:
    """None where one node serves alone. Raises UserError for what is missing or cannot be."""
    if settings.node_rank >= settings.nnodes:
        message = f"--node-rank {settings.node_rank} of --nnodes {settings.nnodes}: there is none"
        raise UserError(message, f"they are numbered from 0 to {settings.nnodes - 1}")
    if settings.nnodes == 1:
        return None
    if settings.head is None:
        raise UserError(f"--nnodes {settings.nnodes} needs --head", "the address of node 0, the same on every node")
    if settings.node_key_file is None:
        raise UserError(f"--nnodes {settings.nnodes} needs --node-key-file", MAKE_KEY)
    host, port = read_head(settings.head)
    return Nodes(settings.nnodes, settings.node_rank, host, port, read_node_key(settings.node_key_file))


def read_head(text: str) -> tuple[str, int]:
    """HOST, HOST:PORT, or an IPv6 address, in brackets where a port follows."""
    match = re.fullmatch(r"(?:\[([^\]\s]+)\]|([^:\s\[\]]+))(?::(\d{1,5}))?|((?:[0-9A-Fa-f]*:){2,}[0-9A-Fa-f]*)", text)
    host, port = (match[1] or match[2] or match[4], match[3]) if match else (None, None)
    if host is None or not 0 < int(port or PORT) < 65536:
        raise UserError(
            f"--head {text!r} is no HOST or HOST:PORT", "such as node-0.cluster:29500, or [2001:db8::1]:29500"
        )
    return host, int(port or PORT)


def read_node_key(path: Path) -> bytes:
    """Raises UserError for a file that is missing, short, or readable for everybody."""
    try:
        mode, key = path.stat().st_mode, path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"--node-key-file {path}: {error.strerror}", MAKE_KEY) from None
    if mode & 0o007:
        raise UserError(f"--node-key-file {path}: everybody on this machine may use it", f"chmod 600 {path}")
    if len(key) < KEY_BYTES:
        raise UserError(f"--node-key-file {path}: {len(key)} bytes, at least {KEY_BYTES} are needed", MAKE_KEY)
    return key


def refuse_loopback(nodes: Nodes) -> None:
    """Raises UserError if the head's name means this very machine alone, as a host's own name does on many systems. A
    name that is not known yet may be later."""
    try:
        found = socket.getaddrinfo(nodes.host, nodes.port, type=socket.SOCK_STREAM)
    except OSError:
        return
    for *_, address in found:
        if ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise UserError(
                f"--head {nodes.host} is {address[0]} here, where no other node reaches it",
                "name node 0 by its address on the network that the nodes share",
            )


def replica_names(replicas: range) -> str:
    last = replicas.stop - 1
    return f"replica {last}" if len(replicas) == 1 else f"replicas {replicas.start} to {last}"

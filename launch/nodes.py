"""Which of several nodes this one is, where the first one is found, and the secret that they know each other by.

Read from --nnodes, --node-rank, --head and --node-key-file, as torchrun has the first three. Opens no connection.
"""

import fcntl
import ipaddress
import re
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

from ..parallel.errors import UserError
from ..parallel.planning.plan import Plan
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


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a replica meet that lies on several nodes: at the head, on a port of its own."""

    host: str
    port: int


def reserve_port(host: str) -> socket.socket:
    """Holds a free port of `host`, an address of this node, as long as the socket is open: nobody gets it by chance,
    and whoever asks for it by number, and may reuse addresses as torchrun does, can listen on it."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    held = socket.socket(family, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(address)
    return held


def interface_to(host: str) -> str | None:
    """The network interface by which this node reaches `host`, an IPv4 address or the name of one; None where that
    cannot be told. Its own interface, where that is this node's address."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probing:
            probing.connect((host, PORT))  # sends nothing
            own = socket.inet_aton(probing.getsockname()[0])
            for _, name in socket.if_nameindex():
                if _address_of(probing, name) == own:
                    return name
    except OSError:
        pass
    return None


def _address_of(probing: socket.socket, interface: str) -> bytes | None:
    """netdevice(7)"""
    SIOCGIFADDR = 0x8915
    try:
        found = fcntl.ioctl(probing.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:  # it has none
        return None
    return found[20:24]


def work_names(plan: Plan, node: int) -> str:
    """What runs on this node, in words."""
    replicas, ranks = plan.replicas_of(node), plan.ranks_of(node)
    names = _names("replica", replicas)
    return names if plan.span == 1 else f"{_names('rank', ranks)} of {names}"


def _names(what: str, numbers: range) -> str:
    last = numbers.stop - 1
    return f"{what} {last}" if len(numbers) == 1 else f"{what}s {numbers.start} to {last}"

"""Connections between the nodes of one server: to the head, and from a replica's own socket through to there.

A node that is lost without a word, its power or its network gone, is noticed by keepalive. Knows the handshake and how
long to try; does not know what is said afterwards.
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from ..parallel.engine.wire import Assigned, Decoder, Failed, Hello, Message, encode
from ..parallel.errors import RankDiedError, UserError
from .engine_client import READ_BYTES, Connection, local
from .handshake import HandshakeError, introduce
from .nodes import Nodes

# The other end is taken for lost after IDLE_S + PROBES * EVERY_S without a sign of life, 11 s.
IDLE_S, EVERY_S, PROBES = 5, 2, 3
AGAIN_S = 1.0  # between attempts


class HeadLostError(RankDiedError):
    """The head was not reached for as long as one may try."""


def notice_loss(writer: asyncio.StreamWriter) -> None:
    """Has the kernel look whether the other end is still there."""
    connection: socket.socket = writer.get_extra_info("socket")
    options = {"SO_KEEPALIVE": (socket.SOL_SOCKET, 1), "TCP_KEEPIDLE": (socket.IPPROTO_TCP, IDLE_S)}
    options |= {"TCP_KEEPINTVL": (socket.IPPROTO_TCP, EVERY_S), "TCP_KEEPCNT": (socket.IPPROTO_TCP, PROBES)}
    options |= {"TCP_USER_TIMEOUT": (socket.IPPROTO_TCP, 1000 * (IDLE_S + PROBES * EVERY_S))}  # with data under way
    for name, (level, value) in options.items():
        if hasattr(socket, name):  # not all of them on macOS
            connection.setsockopt(level, getattr(socket, name), value)


async def dial_head(nodes: Nodes, role: str, rank: int) -> Connection:
    """A connection that has introduced itself. Raises HandshakeError, OSError or EOFError."""
    async with asyncio.timeout(IDLE_S + PROBES * EVERY_S):
        reader, writer = await asyncio.open_connection(nodes.host, nodes.port)
    try:
        notice_loss(writer)
        await introduce(reader, writer, nodes.key, encode(Hello(role, rank, os.getpid(), socket.gethostname())))
    except BaseException:
        writer.close()
        raise
    return reader, writer


async def join_head(nodes: Nodes, limit_s: float, say: Callable[[str], None]) -> tuple[Connection, Assigned]:
    """The connection of this node to the head, which may have to be waited for, and what it is told first.

    Raises HeadLostError after limit_s, UserError for a key that is not the head's.
    """
    deadline_s = time.monotonic() + limit_s
    said = ""
    while True:
        hint = f"is node 0 up, and port {nodes.port} open to this node?"
        try:
            reader, writer = await dial_head(nodes, "node", nodes.rank)
            answer = await next_message(reader)
            if isinstance(answer, Assigned):
                return (reader, writer), answer
            writer.close()
            reason = "it hung up"
            if isinstance(answer, Failed):
                reason, hint = answer.message, answer.hint
        except HandshakeError as error:
            raise UserError(f"head {nodes.head}: {error}", "every node needs the same --node-key-file") from None
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            reason = "no answer" if isinstance(error, TimeoutError) else str(error)
        if time.monotonic() >= deadline_s:
            raise HeadLostError(f"head {nodes.head} did not take this node in {limit_s:g} s: {reason}", hint)
        if reason != said:
            say(f"waiting for head {nodes.head}: {reason}")
            said = reason
        await asyncio.sleep(AGAIN_S)


async def next_message(reader: asyncio.StreamReader) -> Message | None:
    """The head's next message, of which it never has two under way; None at the end of the connection."""
    decoder = Decoder()
    try:
        while data := await reader.read(READ_BYTES):
            for message in decoder.feed(data):
                return message
    except (OSError, ValueError):
        pass
    return None


async def keep_linked(nodes: Nodes, replica: int, path: Path) -> None:
    """Puts the head through to a replica's own socket, whenever both are there; for ever."""
    dial = local(path)
    while True:
        engine = await dial()
        try:
            await _put_through(engine, await dial_head(nodes, "replica", replica))
        except (HandshakeError, OSError, EOFError):
            pass  # `join_head` says why
        finally:
            engine[1].close()
        await asyncio.sleep(AGAIN_S)


async def _put_through(one: Connection, other: Connection) -> None:
    """Until either end closes, which closes the other."""
    ways = [asyncio.create_task(_copy(one[0], other[1])), asyncio.create_task(_copy(other[0], one[1]))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for _, writer in (one, other):
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(READ_BYTES):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # an end like any other

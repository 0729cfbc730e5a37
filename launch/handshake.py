"""How two nodes know each other: both ends of a connection prove that they hold one secret, which never travels.

    listening end   GREETING, nonce
    dialling end    nonce, length, introduction, HMAC-SHA256 over all of this and the other nonce
    listening end   HMAC-SHA256 over both nonces; zeros: not the same secret

What the dialling end says of itself, its introduction, is part of what it proves. Nonces are new each time, so a
recorded handshake proves nothing later. What follows on the connection is neither signed nor encrypted: it is for a
network of one's own. Knows no messages.
"""

import asyncio
import hmac
import os

GREETING = b"gptoss-launch node 1\n"  # the number is this handshake's
NONCE_BYTES, PROOF_BYTES = 32, 32
INTRODUCTION_LIMIT_BYTES = 4096
LIMIT_S = 10.0  # for the whole of it; TimeoutError, an OSError, after that


class HandshakeError(Exception):
    """The other end is none of ours. The message says what it lacks."""


async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> bytes:
    """The listening end. The introduction of the other one, or HandshakeError, OSError, EOFError."""
    async with asyncio.timeout(LIMIT_S):
        mine = os.urandom(NONCE_BYTES)
        writer.write(GREETING + mine)
        theirs = await reader.readexactly(NONCE_BYTES)
        length = int.from_bytes(await reader.readexactly(2))
        if length > INTRODUCTION_LIMIT_BYTES:
            raise HandshakeError("it does not speak as a node does")
        introduction = await reader.readexactly(length)
        proof = await reader.readexactly(PROOF_BYTES)
        known = hmac.compare_digest(proof, _proof(key, b"dial", mine, theirs, introduction))
        writer.write(_proof(key, b"head", mine, theirs) if known else bytes(PROOF_BYTES))
        await writer.drain()
    if not known:
        raise HandshakeError("its node key is another one")
    return introduction


async def introduce(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes, introduction: bytes
) -> None:
    """The dialling end. Raises HandshakeError, OSError or EOFError."""
    async with asyncio.timeout(LIMIT_S):
        if await reader.readexactly(len(GREETING)) != GREETING:
            raise HandshakeError("no head of this version of gptoss-launch listens there")
        theirs = await reader.readexactly(NONCE_BYTES)
        mine = os.urandom(NONCE_BYTES)
        writer.write(mine + len(introduction).to_bytes(2) + introduction)
        writer.write(_proof(key, b"dial", theirs, mine, introduction))
        proof = await reader.readexactly(PROOF_BYTES)
    if not hmac.compare_digest(proof, _proof(key, b"head", theirs, mine)):
        raise HandshakeError("its node key is another one")


def _proof(key: bytes, end: bytes, listening: bytes, dialling: bytes, introduction: bytes = b"") -> bytes:
    """end: which one proves; all before the introduction is of fixed length, so nothing can be read in two ways."""
    return hmac.digest(key, end + listening + dialling + introduction, "sha256")

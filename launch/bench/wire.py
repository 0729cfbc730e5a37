"""HTTP/1.1 with server-sent events as a benchmark wants it: while a stream runs, bytes are only noted with their time.

Reading them (JSON and all) comes after, so that the measuring process takes as little as can be of what it measures.
One connection a request. Knows no API.
"""

import asyncio
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

QUIET_S = 600.0  # a server that says nothing for so long is given up
_END_OF_CHUNKS = b"0\r\n\r\n"

Pieces = Sequence[tuple[float, bytes]]


class BrokenError(Exception):
    """The answer is not whole, or no HTTP."""


@dataclass(frozen=True)
class Answer:
    """sent_s, and in pieces when each byte came: seconds of time.perf_counter. lost: why the connection ended early."""

    sent_s: float
    pieces: tuple[tuple[float, bytes], ...]
    lost: str = ""


async def ask(url: str, body: bytes | None, key: str | None, quiet_s: float = QUIET_S) -> Answer:
    """The answer to a GET, or to a POST of `body`, JSON. Raises OSError where nobody answers."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    host = parts.hostname or ""
    context = ssl.create_default_context() if secure else None
    reader, writer = await asyncio.open_connection(host, port, ssl=context, limit=1 << 22)
    try:
        sent_s = time.perf_counter()
        writer.write(request_bytes(parts.netloc, parts.path or "/", body, key))
        pieces: list[tuple[float, bytes]] = []
        lost, tail = "", b""
        try:
            while True:
                data = await asyncio.wait_for(reader.read(1 << 18), quiet_s)
                if not data:
                    break
                pieces.append((time.perf_counter(), data))
                tail = (tail + data)[-len(_END_OF_CHUNKS) :]
                if tail == _END_OF_CHUNKS and _is_over(pieces):
                    break
        except TimeoutError:
            lost = f"silent for {quiet_s:g} s"
        except OSError as error:
            lost = error.strerror or str(error)
        return Answer(sent_s, tuple(pieces), lost)
    finally:
        writer.close()


def request_bytes(host: str, path: str, body: bytes | None, key: str | None) -> bytes:
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += ["Accept: */*", *([f"Authorization: Bearer {key}"] if key else [])]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


def read_status(pieces: Pieces) -> int:
    """The status code. Raises BrokenError if there is none."""
    first = b"".join(data for _, data in pieces).partition(b"\r\n")[0].split(b" ")
    if len(first) < 2 or not first[0].startswith(b"HTTP/1.") or not first[1].isdigit():
        raise BrokenError("the connection ended before any answer" if not pieces else "no HTTP/1.1")
    return int(first[1])


def read_body(pieces: Pieces) -> list[tuple[float, bytes]]:
    """The body without its headers and chunk sizes, each piece with its time. Raises BrokenError if it is cut off."""
    whole = b"".join(data for _, data in pieces)
    head, gap, _ = whole.partition(b"\r\n\r\n")
    if not gap:
        raise BrokenError("the connection ended in the headers")
    headers = dict(_header(line) for line in head.split(b"\r\n")[1:])
    at = len(head) + len(gap)
    if headers.get(b"transfer-encoding", b"").lower() != b"chunked":
        length = headers.get(b"content-length")
        if length is not None and len(whole) - at < int(length):
            raise BrokenError("the connection ended in the body")
        return _timed(pieces, [(at, len(whole))])
    spans = []
    while True:
        end = whole.find(b"\r\n", at)
        if end < 0:
            raise _Cut(_timed(pieces, spans))
        try:
            size = int(whole[at:end].split(b";")[0], 16)
        except ValueError:
            raise BrokenError("a chunk without its size") from None
        if size == 0:
            return _timed(pieces, spans)
        spans.append((end + 2, min(end + 2 + size, len(whole))))
        at = end + 2 + size + 2
        if at > len(whole):
            raise _Cut(_timed(pieces, spans))


class _Cut(BrokenError):
    """came: what there is of the body."""

    def __init__(self, came: list[tuple[float, bytes]]) -> None:
        super().__init__("the stream was cut off")
        self.came = came


def read_events(pieces: Pieces) -> tuple[list[tuple[float, bytes]], str]:
    """(data of each server-sent event, with the time at which it was whole; why there are no more: "" or a fault)."""
    fault = ""
    try:
        body = read_body(pieces)
    except _Cut as cut:
        body, fault = cut.came, str(cut)
    except BrokenError as broken:
        body, fault = [], str(broken)
    events, rest = [], b""
    for came_s, data in body:
        *lines, rest = (rest + data).split(b"\n")
        events += [(came_s, line[5:].strip()) for line in lines if line.startswith(b"data:")]
    if rest.startswith(b"data:") and not fault:
        events.append((body[-1][0], rest[5:].strip()))
    return events, fault


def _is_over(pieces: Pieces) -> bool:
    """Whether the last bytes, which look like the end of a chunked body, are that: some servers keep the connection."""
    try:
        read_body(pieces)
    except BrokenError:
        return False
    return True


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.strip().lower(), value.strip()


def _timed(pieces: Pieces, spans: Sequence[tuple[int, int]]) -> list[tuple[float, bytes]]:
    """The bytes of `spans`, places in all pieces put together, cut where pieces end."""
    timed = []
    begin, number = 0, 0
    for start, stop in spans:
        while number < len(pieces) and start < stop:
            came_s, data = pieces[number]
            end = begin + len(data)
            if start >= end:
                begin, number = end, number + 1
                continue
            upto = min(stop, end)
            timed.append((came_s, data[start - begin : upto - begin]))
            start = upto
    return timed

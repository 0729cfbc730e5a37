"""Many streams at once through the real HTTP process, with neither model nor ranks behind it.

Three processes beside the caller: the HTTP process (`launch.api`, as `serve` starts it), an engine that gives every
running request one token a step, and clients on raw sockets that compare each answer letter by letter. What a token
costs is read from the HTTP process's own CPU time, so other work on the machine does not count.

    python http_load.py engine SOCKET STEP_S        python http_load.py clients PORT STREAMS SECONDS WORDS
"""

import json
import os
import random
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REFERENCE_S = 0.012  # `slowness` takes so long on a quiet core of a cloud server of 2026, Python 3.11
SAME_WORDS = "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima".split()


def answer_text(seed: int, words: int) -> str:
    """What the engine says to a request with this seed; no two seeds say the same, nor two places in it."""
    draw = random.Random(seed)
    return f"{seed}:" + "".join(f" {place}{draw.choice(SAME_WORDS)}" for place in range(words))


# --- the engine


def engine(path: str, step_s: float) -> None:
    """Answers Generate with the ids of `answer_text(seed, max_tokens - 1000)`, all requests in step."""
    from gptoss_launch.launch.resolve import make_plan
    from gptoss_launch.launch.settings import Settings
    from gptoss_launch.launch.tokenizer import load_tokenizer
    from gptoss_launch.parallel.engine.request import Token
    from gptoss_launch.parallel.engine.wire import Cancel, Decoder, Done, Generate, Hello, Tokens, encode

    plan = make_plan("tiny", Settings(machine="cpu", context_tokens=16384), need_weights=True)
    tokenizer = load_tokenizer(Path(str(plan.checkpoint)))
    special = tokenizer.special
    head = [special["<|channel|>"], *tokenizer.encode("final"), special["<|message|>"]]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        connection, _ = listener.accept()
    connection.sendall(encode(Hello("leader", 0, os.getpid(), "here")))
    running: dict[str, Iterator[int]] = {}
    lengths: dict[str, int] = {}
    lock = threading.Lock()

    def read() -> None:
        decoder = Decoder()
        while data := connection.recv(1 << 20):
            for message in decoder.feed(data):
                if isinstance(message, Generate):
                    request = message.request
                    text = answer_text(request.sampling.seed, request.max_tokens - 1000)
                    ids = [*head, *tokenizer.encode(text), special["<|return|>"]]
                    with lock:
                        running[request.id], lengths[request.id] = iter(ids), len(ids)
                elif isinstance(message, Cancel):
                    with lock:
                        running.pop(message.request_id, None)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    due_s = time.monotonic()
    while True:
        due_s = max(due_s + step_s, time.monotonic())
        time.sleep(max(due_s - time.monotonic(), 0))
        tokens, done = [], []
        with lock:
            for name, ids in running.items():
                token = next(ids)
                ended = token == special["<|return|>"]
                tokens.append(Token(name, token, "stop" if ended else None))
                if ended:
                    done.append(name)
            for name in done:
                del running[name]
        if tokens:
            messages = [encode(Tokens(tuple(tokens)))]
            messages += [encode(Done(name, 0.0, step_s, step_s, 1, 0, lengths[name])) for name in done]
            connection.sendall(b"".join(messages))


# --- the clients


@dataclass
class Seen:
    """What the clients saw. tokens: of answers that are complete, as the server counted them."""

    answers: int = 0
    tokens: int = 0
    events: int = 0
    first_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


@dataclass
class Client:
    """One connection, one answer at a time."""

    connection: socket.socket
    seed: int = 0
    data: bytes = b""
    text: str = ""
    asked_s: float = 0.0
    begun: bool = False
    finish: str | None = None


def clients(port: int, streams: int, seconds: float, words: int) -> Seen:
    """Keeps `streams` answers under way for so long, then lets those under way end."""
    seen, seeds = Seen(), iter(range(1, 1 << 40))
    selector = selectors.DefaultSelector()
    until_s = time.monotonic() + seconds

    def ask(client: Client) -> None:
        client.seed = next(seeds)
        client.text, client.finish, client.begun, client.asked_s = "", None, False, time.monotonic()
        client.connection.sendall(request(client.seed, words))

    def fail(client: Client, why: str) -> None:
        seen.errors[why] += 1
        selector.unregister(client.connection)
        client.connection.close()

    for _ in range(streams):
        client = Client(socket.create_connection(("127.0.0.1", port)))
        selector.register(client.connection, selectors.EVENT_READ, client)
        ask(client)
    last_s = until_s + 180
    while selector.get_map() and time.monotonic() < last_s:
        for key, _ in selector.select(1.0):
            client = key.data
            try:
                data = client.connection.recv(1 << 16)
            except OSError as error:
                fail(client, f"{error!r}")
                continue
            if not data:
                fail(client, "closed in mid-answer")
                continue
            if not client.begun:
                client.begun = True
                seen.first_s.append(time.monotonic() - client.asked_s)
            client.data += data
            done = read_events(client, seen)
            if not done:
                continue
            if client.text != answer_text(client.seed, words) or client.finish != "stop":
                seen.errors[f"another answer: {client.text[:60]!r} ({client.finish})"] += 1
            seen.answers += 1
            if time.monotonic() < until_s:
                ask(client)
            else:
                selector.unregister(client.connection)
                client.connection.close()
    seen.errors["stuck"] += len(selector.get_map())
    return seen


def request(seed: int, words: int, **fields: Any) -> bytes:
    """A whole HTTP request."""
    message = {"role": "user", "content": f"Question {seed}"}
    body: dict[str, Any] = {"model": "tiny", "messages": [message], "stream": True, "seed": seed}
    body |= {"max_tokens": words + 1000, "stream_options": {"include_usage": True}} | fields
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
    return head.encode() + text


def read_events(client: Client, seen: Seen) -> bool:
    """Takes the whole events off what has come; True once the last one is read. A chunk holds whole events."""
    *events, rest = client.data.split(b"\n\n")
    ended = False
    for event in events:
        start = event.find(b"data: ")
        if start < 0:
            continue
        if event[start + 6 :] == b"[DONE]":
            ended = True
            break
        chunk = json.loads(event[start + 6 :])
        seen.events += 1
        if usage := chunk.get("usage"):
            seen.tokens += usage["completion_tokens"]
        for choice in chunk.get("choices", ()):
            client.text += choice["delta"].get("content") or ""
            client.finish = choice["finish_reason"] or client.finish
        if "error" in chunk:
            seen.errors[chunk["error"]["message"]] += 1
    # After the last event come the chunk's end and the empty chunk that ends the body.
    client.data = rest if not ended else client.data
    if ended and client.data.endswith(b"0\r\n\r\n"):
        client.data = b""
        return True
    return False


# --- the HTTP process


@dataclass(frozen=True)
class Front:
    """The HTTP process under load."""

    process: subprocess.Popen[bytes]
    port: int

    def cpu_s(self) -> float:
        """CPU time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def front(step_s: float, *arguments: str, plan_context: int = 16384) -> Iterator[Front]:
    """The HTTP process with the engine behind it. arguments: more of its command line."""
    from gptoss_launch.launch.resolve import make_plan
    from gptoss_launch.launch.settings import Settings
    from gptoss_launch.parallel.engine.wire import Decoder, Ready

    folder = Path(tempfile.mkdtemp(prefix="gl-", dir="/tmp"))
    plan = make_plan("tiny", Settings(machine="cpu", context_tokens=plan_context), need_weights=True)
    plan.save(folder / "plan.json")
    control, engine_path = folder / "http.sock", folder / "engine.sock"
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    port = listener.getsockname()[1]
    supervisor = socket.socket(socket.AF_UNIX)
    supervisor.bind(str(control))
    supervisor.listen()
    supervisor.settimeout(60)
    working = subprocess.Popen([sys.executable, __file__, "engine", str(engine_path), str(step_s)])
    command = [sys.executable, "-m", "gptoss_launch.launch.api", "--control", str(control)]
    command += ["--fd", str(listener.fileno()), "--plan", str(folder / "plan.json"), "--served-name", "tiny"]
    command += ["--drain-s", "5", "--engine", str(engine_path), *arguments]
    process = subprocess.Popen(command, pass_fds=(listener.fileno(),))
    listener.close()
    connection = None
    try:
        connection, _ = supervisor.accept()
        connection.settimeout(60)
        decoder, ready = Decoder(), False
        while not ready:
            data = connection.recv(1 << 16)
            assert data, "the HTTP process ended"
            ready = any(isinstance(message, Ready) for message in decoder.feed(data))
        yield Front(process, port)
    finally:
        if connection is not None:
            connection.close()  # ends the HTTP process
        for one in (process, working):
            one.terminate()
            one.wait(10)
        supervisor.close()
        shutil.rmtree(folder, ignore_errors=True)


def run_clients(port: int, streams: int, seconds: float, words: int) -> dict[str, Any]:
    """`clients` in a process of their own."""
    command = [sys.executable, __file__, "clients", *map(str, (port, streams, seconds, words))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds + 240, check=True)
    return json.loads(done.stdout)


def get(port: int, path: str) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        data = b""
        while part := connection.recv(1 << 16):
            data += part
    return data.partition(b"\r\n\r\n")[2].decode()


def quantile_from_buckets(metrics: str, name: str, share: float) -> float:
    """The upper edge of the bucket in which this quantile lies."""
    rows = []
    for line in metrics.splitlines():
        if line.startswith(f"{name}_bucket"):
            edge = line.partition('le="')[2].partition('"')[0]
            rows.append((float(edge), float(line.rpartition(" ")[2])))
    rows.sort()
    return next(edge for edge, count in rows if count >= share * rows[-1][1])


def slowness() -> float:
    """How much more CPU time some encoding and sending takes here and now than on a quiet core of the kind that the
    limits are for; at least 1."""
    ours, theirs = socket.socketpair()
    begun_s = time.process_time()
    with ours, theirs:
        for number in range(1000):
            ours.send(json.dumps({"id": number, "choices": [{"index": 0, "delta": {"content": str(number)}}]}).encode())
            json.loads(theirs.recv(1 << 16))
    return max((time.process_time() - begun_s) / REFERENCE_S, 1.0)


def bad_clients(port: int, words: int) -> list[socket.socket]:
    """Some that ask and read nothing, and some that half close."""
    connections = []
    for number in range(20):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(request(1 << 50 | number, words))
        if number % 2:
            connection.shutdown(socket.SHUT_WR)
        connections.append(connection)
    return connections


def measure(streams: int, seconds: float, words: int, step_s: float, *arguments: str) -> dict[str, Any]:
    """One row: what came of it, with bad clients beside, and what a token cost. Tokens for bad clients are not counted,
    so their cost falls on the others."""
    with front(step_s, *arguments) as served:
        before_s = served.cpu_s()
        bad = bad_clients(served.port, words)
        with ThreadPoolExecutor() as pool:
            running = pool.submit(run_clients, served.port, streams, seconds, words)
            speeds = []
            while not running.done():
                speeds.append(slowness())
                time.sleep(1)
            row = running.result()
        row["cpu_us_per_token"] = round((served.cpu_s() - before_s) / max(row["tokens"], 1) * 1e6, 1)
        row["slowness"] = round(statistics.median(speeds), 2)
        row["memory_bytes"] = served.memory_bytes()
        metrics = get(served.port, "/metrics")
        for connection in bad:
            connection.close()
    for name in ("late", "turn"):
        row[f"{name}_p99_s"] = quantile_from_buckets(metrics, f"gptoss:event_loop_{name}_seconds", 0.99)
    return row


def main(arguments: Sequence[str]) -> None:
    what, *rest = arguments
    if what == "engine":
        engine(rest[0], float(rest[1]))
    elif what == "clients":
        seen = clients(int(rest[0]), int(rest[1]), float(rest[2]), int(rest[3]))
        firsts = sorted(seen.first_s)
        row = {"streams": int(rest[1]), "seconds": float(rest[2]), "answers": seen.answers, "tokens": seen.tokens}
        row |= {"events": seen.events, "errors": {why: count for why, count in seen.errors.items() if count}}
        row |= {"first_event_p99_s": round(firsts[int(0.99 * (len(firsts) - 1))], 3) if firsts else None}
        print(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1:])

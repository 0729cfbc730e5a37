"""A rank with no model behind it, for tests: the contract of parallel/engine/worker.py, tokens from a script.

    python -m fake_worker --plan PLAN --control SOCKET --listen SOCKET

FAKE_SCRIPT names a JSON file: {"tokens": [ids], "delay_s": 0.01, "load_s": 0.0, "log": FILE, "fail": {"message",
"hint", "exit_code"}, "says": TEXT}. After the script's tokens come hashes of the sequence. `log` collects a line for
each request that began or was cancelled. Each request ends with Done and Stats; a deadline is kept from its first step
on. With `says` it ends at once, with this in its log.
"""

import argparse
import hashlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from gptoss_launch.parallel.engine.lifeline import hold
from gptoss_launch.parallel.engine.request import Request, Token
from gptoss_launch.parallel.engine.wire import (
    Cancel,
    Decoder,
    Done,
    Failed,
    Generate,
    Hello,
    Progress,
    Ready,
    Refused,
    Stats,
    Tokens,
    encode,
)
from gptoss_launch.parallel.planning.plan import Plan

TURN = threading.Lock()  # one request at a time
ENDED = 0  # requests so far


def next_token(sequence: list[int], script: dict, answered: int, vocab: int) -> int:
    """The scripted token, or a hash of everything so far, which is no special token of tiny (ids from 1000 on)."""
    if answered < len(script["tokens"]):
        return script["tokens"][answered]
    return int.from_bytes(hashlib.sha256(repr(sequence).encode()).digest()[:4]) % min(vocab, 1000)


def report(connection: socket.socket, request: Request, waited_s: float, tokens: int) -> None:
    """After the last token of a request. The totals are as good as any: three requests are looked up for each hit."""
    global ENDED
    ENDED += 1
    prompt = len(request.prompt_tokens)
    connection.sendall(encode(Done(request.id, waited_s, 0.01, 0.02, prompt, 0, tokens)))
    totals = {"prefix_queried_tokens_total": 3 * ENDED, "prefix_hit_tokens_total": ENDED, "preemptions_total": 0}
    totals |= {"exact_draws_total": 0, "steps_total": ENDED, "prefill_tokens_total": 0, "decode_tokens_total": 0}
    experts = ("hits", "misses", "moved_bytes", "waited_s", "stalled_s", "ahead", "ahead_hits")
    totals |= dict.fromkeys((f"expert_{name}_total" for name in experts), 0)
    stats = Stats(1, 2, 10, 5, **totals, decode_step_s=0.01, communication_s=0.002, slow_paths=("a fake",))
    connection.sendall(encode(stats))


def answer_connection(connection: socket.socket, script: dict, plan: Plan, name: str) -> None:
    """Reads Generate and Cancel until the end, which cancels what is left."""
    cancelled: set[str] = set()
    running: set[str] = set()

    def note(line: str) -> None:
        if "log" in script:
            with open(script["log"], "a") as file:
                file.write(line + "\n")

    def run(request: Request) -> None:
        arrived_s = time.monotonic()
        with TURN:
            waited_s = time.monotonic() - arrived_s
            if len(request.prompt_tokens) + request.max_tokens > plan.context_tokens:
                connection.sendall(encode(Refused(request.id, "too long for the fake")))
                return
            sequence = list(request.prompt_tokens)
            note(
                f"begin {request.id} {request.sampling.temperature} {request.sampling.seed} {request.max_tokens} {name}"
            )
            for answered in range(request.max_tokens):
                if request.id in cancelled:
                    note(f"cancel {request.id} {answered}")
                    return
                if request.deadline_s is not None and time.monotonic() - arrived_s > request.deadline_s:
                    connection.sendall(encode(Tokens((Token(request.id, -1, "deadline"),))))
                    running.discard(request.id)
                    report(connection, request, waited_s, answered)
                    return
                token = next_token(sequence, script, answered, plan.spec.vocab)
                sequence.append(token)
                ended = "stop" if token in request.stop_tokens else None
                ended = ended or ("length" if answered + 1 == request.max_tokens else None)
                try:
                    connection.sendall(encode(Tokens((Token(request.id, token, ended),))))
                    if ended:
                        report(connection, request, waited_s, answered + 1)
                except OSError:
                    cancelled.add(request.id)
                if ended:
                    running.discard(request.id)
                    return
                time.sleep(script["delay_s"])

    connection.sendall(encode(Hello("leader", 0, os.getpid(), socket.gethostname())))
    decoder = Decoder()
    while data := connection.recv(1 << 16):
        for message in decoder.feed(data):
            if isinstance(message, Generate):
                running.add(message.request.id)
                threading.Thread(target=run, args=(message.request,), daemon=True).start()
            elif isinstance(message, Cancel):
                cancelled.add(message.request_id)
    cancelled |= running


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("plan", "control", "listen"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    script = {"tokens": [], "delay_s": 0.0, "load_s": 0.0} | json.loads(Path(os.environ["FAKE_SCRIPT"]).read_text())
    if "says" in script:
        sys.exit(script["says"])
    control = hold(Path(arguments.control), "rank", rank)
    plan = Plan.load(Path(arguments.plan))
    print("fake worker speaks", file=sys.stderr, flush=True)
    for done in range(5):
        control.sendall(encode(Progress(rank, done * 100, 500)))
        time.sleep(script["load_s"] / 5)
    if "fail" in script:
        control.sendall(encode(Failed(rank, **script["fail"])))
        sys.exit(1)
    listener = socket.socket(socket.AF_UNIX)
    if rank == 0:
        listener.bind(arguments.listen)
        listener.listen()
    control.sendall(encode(Ready(rank, plan.digest, {"weights_bytes": 500}, {}, script["load_s"])))
    name = Path(arguments.listen).stem
    while rank == 0:
        connection, _ = listener.accept()
        threading.Thread(target=answer_connection, args=(connection, script, plan, name), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()

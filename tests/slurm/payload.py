"""Stands in for `python -m gptoss_launch.launch` on the nodes: what a job's ranks do, without a model behind them.

finetune: counts to steps=N, one each step_s=SECONDS; fail=RANK:CODE ends that rank so at step 2; USR1 and TERM save the
count and end with 75, and the next attempt goes on from there. serve: /health and /ready over HTTP until TERM.
"""

import http.server
import os
import signal
import sys
import threading
import time
from pathlib import Path


def finetune(words: list[str]) -> int:
    options = dict(word.split("=", 1) for word in words if "=" in word)
    rank = int(os.environ["RANK"])
    asked: list[int] = []  # a plain list: an Event's lock may be held by the very code that a handler interrupts
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    saved = Path(options["saved"]) / f"rank{rank}"
    step = int(saved.read_text()) if saved.exists() else 0
    print(f"begins at step {step} of {options['steps']} world {os.environ['WORLD_SIZE']}", flush=True)
    print("a warning", file=sys.stderr, flush=True)
    failing, _, code = options.get("fail", "-1:0").partition(":")
    while step < int(options["steps"]):
        time.sleep(float(options.get("step_s", "0.1")))
        if asked:
            saved.write_text(str(step))
            print(f"saved step {step}", flush=True)
            return 75
        step += 1
        if step == 1:
            print("has made a step", flush=True)
        if rank == int(failing) and step == 2:
            print("breaks", file=sys.stderr, flush=True)
            os._exit(int(code))
    saved.write_text(str(step))
    print(f"ends at step {step}", flush=True)
    return 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path in ("/health", "/ready") else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(words: list[str]) -> int:
    host, port = (words[words.index(flag) + 1] for flag in ("--host", "--port"))
    server = http.server.ThreadingHTTPServer((host, int(port)), Handler)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"http://{host}:{port}/v1", flush=True)
    server.serve_forever(poll_interval=0.1)
    print("drained", flush=True)
    return 0


def preflight(words: list[str]) -> int:
    time.sleep(0.1)
    print("looked at", os.uname().nodename, *words)
    return 0


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    sys.exit({"finetune": finetune, "serve": serve, "doctor": preflight}[command](rest))

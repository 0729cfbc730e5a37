"""Seconds from `serve` to its URL and to the first streamed token: `python start.py CHECKPOINT [--warm 3] [FLAGS ...]`.

Once with nothing compiled yet (empty folders for Triton's, CUDA's and the user's caches), then with what that start
left there. The checkpoint's files are read once before, so that they are in the page cache. FLAGS go to `serve`. Prints
one JSON object a line, with what the ranks say of their start. A random checkpoint may have the tokenizer of `tiny`;
put the published tokenizer.json there for true figures.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

CACHES = ("TRITON_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")
BLOCK_BYTES = 64 << 20


def read_all(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            while file.read(BLOCK_BYTES):
                pass


def first_token_s(url: str, began_s: float) -> float:
    """Of a streamed chat, over HTTP: the first chunk that carries text."""
    with urllib.request.urlopen(f"{url}/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "stream": True, "max_tokens": 32}
    headers = {"content-type": "application/json"}
    asked = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            delta = json.loads(line[len("data: ") :])["choices"][0]["delta"]
            if delta.get("content") or delta.get("reasoning_content"):
                return time.monotonic() - began_s
    raise SystemExit("no chunk of the answer had text: its tokens have none")


def start(checkpoint: Path, flags: list[str], caches: Path) -> dict[str, Any]:
    environment = os.environ | {name: str(caches / name) for name in CACHES}
    command = [sys.executable, "-m", "gptoss_launch.launch", "serve", str(checkpoint), "--port", "0", *flags]
    with tempfile.TemporaryFile("w+") as said:
        began_s = time.monotonic()
        serve = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True)
        assert serve.stdout is not None
        url = serve.stdout.readline().strip()
        ready_s = time.monotonic() - began_s
        try:
            token_s = first_token_s(url, began_s) if url else None
        finally:
            serve.send_signal(signal.SIGTERM)
            status = serve.wait()
        said.seek(0)
        text = said.read()
    if token_s is None:
        raise SystemExit(text)
    ranks = re.findall(r"loaded in ([\d.]+) s \(([^)]*)\)", text)
    return {
        "ready_s": round(ready_s, 2),
        "first_token_s": round(token_s, 2),
        "ranks": [{"loaded_s": float(loaded_s), "parts": parts} for loaded_s, parts in ranks],
        "status": status,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--warm", type=int, default=3, help="starts after the first")
    asked, flags = parser.parse_known_args()
    read_all(asked.checkpoint)
    with tempfile.TemporaryDirectory() as caches:
        for number in range(1 + asked.warm):
            row = {"bench": "start", "model": asked.checkpoint.name, "flags": flags, "cold": number == 0}
            print(json.dumps(row | start(asked.checkpoint, flags, Path(caches))), flush=True)


if __name__ == "__main__":
    main()

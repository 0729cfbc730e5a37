"""A scripted server of the OpenAI API, to hold the benchmark's client to: vLLM's ways, stricter ones, and broken ones.

Answers `max_tokens` tokens with STEP_S between them. Imports nothing of ours.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STEP_S = 0.002
FIXED_TOKENS = 70  # of a chat's markup


@dataclass
class Script:
    """takes_ids: /v1/completions with token ids; else there is only chat. takes_ignore_eos: else it is refused by name.
    fault: "", or what goes wrong with answers of more than fault_after tokens: 429, drop, error, silence, garbage.
    every: only each so-manieth of them. together: tokens in one piece. seen: bodies of requests."""

    takes_ids: bool = True
    takes_ignore_eos: bool = True
    counts: bool = True
    owner: str = "vllm"
    model: str = "some-model"
    vocab: int = 201_088
    fault: str = ""
    fault_after: int = 4
    every: int = 1
    together: int = 1
    ends_at: int = 10**9
    key: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    metrics: str = ""
    long_ones: int = 0
    lock: Any = field(default_factory=threading.Lock)


def handler_for(script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/metrics":
                return self._send(200, script.metrics.encode(), "text/plain")
            if script.key and self.headers.get("authorization") != f"Bearer {script.key}":
                return self._refuse(401, "a key is needed")
            if self.path == "/v1/models":
                model = {"id": script.model, "owned_by": script.owner, "max_model_len": 4096}
                return self._send(200, json.dumps({"data": [model]}).encode())
            if self.path == "/version":
                return self._send(200, b'{"version": "9.8.7"}')
            return self._refuse(404, "no such route")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with script.lock:
                script.seen.append(body)
            chat = self.path == "/v1/chat/completions"
            if not chat and not (script.takes_ids and self.path == "/v1/completions"):
                return self._refuse(404, f"no route {self.path}")
            if "ignore_eos" in body and not script.takes_ignore_eos:
                return self._refuse(400, "ignore_eos: unknown or unsupported field")
            if not chat and max(body["prompt"]) >= script.vocab:
                return self._refuse(400, "a token id is outside the vocabulary")
            fault = ""
            if body["max_tokens"] > script.fault_after and script.fault:
                with script.lock:
                    script.long_ones += 1
                    fault = script.fault if script.long_ones % script.every == 0 else ""
            if fault == "429":
                return self._refuse(429, "the queue is full")
            self._stream(body, chat, fault)

        def _stream(self, body: dict[str, Any], chat: bool, fault: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            tokens = min(body["max_tokens"], script.ends_at)
            for number in range(1, tokens + 1):
                time.sleep(STEP_S)
                if number == 3 and fault:
                    return self._break(fault)
                if number % script.together and number < tokens:
                    continue
                end = None if number < tokens else "length" if tokens == body["max_tokens"] else "stop"
                text = {"delta": {"content": "a"}} if chat else {"text": "a"}
                self._event({"choices": [{"index": 0, "finish_reason": end, **text}]})
            if body["stream_options"]["include_usage"] and script.counts:
                prompt = len(body["prompt"]) if not chat else FIXED_TOKENS + 2 * len(_words(body))
                self._event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": tokens}})
            self._chunk(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")

        def _break(self, fault: str) -> None:
            if fault == "error":
                self._event({"error": {"message": "a rank died"}})
                self.wfile.write(b"0\r\n\r\n")
            elif fault == "garbage":
                self._chunk(b"data: {not json\n\n")
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def _event(self, body: dict[str, Any]) -> None:
            self._chunk(b"data: " + json.dumps(body).encode() + b"\n\n")

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        def _refuse(self, code: int, message: str) -> None:
            self._send(code, json.dumps({"error": {"message": message, "type": "x"}}).encode())

        def _send(self, code: int, data: bytes, kind: str = "application/json") -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


@contextmanager
def stub(script: Script, port: int = 0) -> Iterator[str]:
    """The URL of a server that follows `script`, which may change while it runs."""
    with _Server(("127.0.0.1", port), handler_for(script)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _words(body: dict[str, Any]) -> list[str]:
    return body["messages"][0]["content"].split()

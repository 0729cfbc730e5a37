"""Two replicas, of which one dies: `serve` as processes, with the fake worker for ranks."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

TOKENS = 80


def body(text: str, **fields) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0} | fields


def wait_for(found, limit_s=15.0):
    deadline = time.monotonic() + limit_s
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def begun(running, replica: int) -> list[str]:
    """Requests that this replica has begun with, in any of its lives."""
    path = running.tmp / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split()[1] for line in lines if line.startswith("begin") and line.endswith(f"engine-{replica}")]


def status(running, path: str) -> tuple[int, dict]:
    answer = httpx.get(f"http://127.0.0.1:{running.port}{path}")
    return answer.status_code, answer.json()


def figures(running) -> dict[tuple[str, str], float]:
    """(name without prefix, replica) -> value, of those that have no other labels."""
    answer = httpx.get(f"http://127.0.0.1:{running.port}/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.text))
    samples = [sample for family in families for sample in family.samples]
    assert all(sample.name.startswith("gptoss:") and sample.labels["model_name"] == "tiny" for sample in samples)
    return {
        (sample.name.removeprefix("gptoss:"), sample.labels["replica"]): sample.value
        for sample in samples
        if sample.labels.keys() == {"model_name", "replica"}
    }


class Stream:
    """A client that reads one streamed answer in a thread."""

    def __init__(self, running, text: str) -> None:
        self.id, self.content, self.finish_reason, self.error, self.done = "", "", None, None, False
        self.text, self.chunks = text, 0
        self._url, self._body = f"{running.url}/chat/completions", body(text, max_tokens=TOKENS, stream=True)
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=60) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self._take(json.loads(line[6:]))

    def _take(self, event: dict) -> None:
        if "error" in event:
            self.error = event["error"]
            return
        self.chunks += 1
        self.id = event["id"].removeprefix("chatcmpl-")
        choice = event["choices"][0]
        self.content += choice["delta"].get("content") or ""
        self.finish_reason = choice["finish_reason"]


@contextmanager
def down(running, replica: int):
    """kill -9 of its rank; afterwards it is back."""
    role = "rank" if replica == 0 else f"rank {replica}"
    os.kill(running.pids()[role], signal.SIGKILL)
    wait_for(lambda: status(running, "/health")[0] == 503)
    yield
    wait_for(lambda: status(running, "/health")[0] == 200)


@pytest.mark.slow
def test_one_of_two_replicas_is_killed_under_load(start):
    running = start("serve", 0, 2, 10, script={"delay_s": 0.015})
    for replica in (0, 1):
        assert f"replica {replica} rank 0: " in running.stderr()
    assert running.pids().keys() == {"command", "http", "rank", "torchrun", "rank 1", "torchrun 1"}

    streams = [Stream(running, f"Hello {i}") for i in range(8)]
    wait_for(lambda: sum(stream.chunks > 5 for stream in streams) == 2)  # a replica answers one at a time
    with down(running, 1):
        assert status(running, "/health") == (503, {"ok": False, "dead_replicas": 1, "replicas": 2})
        assert status(running, "/ready") == (503, {"ready_replicas": 1, "replicas": 2})
        now = figures(running)
        assert (now["replica_up", "0"], now["replica_up", "1"]) == (1, 0)
        assert ("num_requests_running", "1") not in now
        # A request that comes now is answered.
        answer = httpx.post(f"{running.url}/chat/completions", json=body("x", max_tokens=2), timeout=30)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2
    for stream in streams:
        stream.thread.join(30)
    lost = [stream for stream in streams if stream.error is not None]
    assert [stream.error["code"] for stream in lost] == ["replica_died"]  # the one that ran there, and no other
    assert lost[0].error["retryable"] is True and "send the request again" in lost[0].error["message"]
    assert not lost[0].done and lost[0].id in begun(running, 1)
    whole = [stream for stream in streams if stream.error is None]
    assert len(whole) == 7 and all(stream.done and stream.finish_reason == "length" for stream in whole)
    assert {stream.id for stream in whole} <= set(begun(running, 0))
    for stream in (whole[0], whole[-1]):  # with every token that it has alone
        alone = Stream(running, stream.text)
        alone.thread.join(30)
        assert alone.content == stream.content != ""

    wait_for(lambda: "replica 1 answers again, " in running.stderr())
    (said,) = [line for line in running.stderr().splitlines() if line.startswith("replica 1 died")]
    assert said.startswith("replica 1 died, restart 1 of 3 in 0.1 s: rank 0 on ") and "died while" in said
    assert status(running, "/ready") == (200, {"ready_replicas": 2, "replicas": 2})
    assert len(list(running.tmp.glob("gptoss-*/replica-1*"))) == 2  # nothing is left of its first life

    now = figures(running)
    assert now["replica_up", "1"] == 1 and now["replica_restarts_total", "1"] == 1
    assert now["prefix_cache_queries_total", "0"] == 3 * now["prefix_cache_hits_total", "0"] > 0
    running.process.send_signal(signal.SIGTERM)
    running.gone_within()
    assert running.process.wait() == 0


@pytest.mark.slow
def test_a_replica_that_dies_too_often_is_left_out_and_the_last_one_ends_serve(start):
    running = start("serve", 0, 2, 10, script={"delay_s": 0.01})
    script = json.loads((running.tmp / "script").read_text())
    fail = {"message": "tensor x is short", "hint": "fetch it again", "exit_code": 2}
    (running.tmp / "script").write_text(json.dumps(script | {"fail": fail}))
    os.kill(running.pids()["rank 1"], signal.SIGKILL)
    left = (
        "replica 1 died after 3 restarts within 600 s: 1 of 2 replicas are left: replica 1 cannot be restarted: tensor"
    )
    wait_for(lambda: left in running.stderr(), 60)
    for count in (1, 2, 3):
        assert running.stderr().count(f"replica 1 died, restart {count} of 3 in ") == 1
    assert running.stderr().count("replica 1 cannot be restarted: tensor x is short\nhint: fetch it again") == 3
    assert status(running, "/health") == (503, {"ok": False, "dead_replicas": 1, "replicas": 2})
    answer = httpx.post(f"{running.url}/chat/completions", json=body("x", max_tokens=2), timeout=30)
    assert answer.status_code == 200
    assert not list(running.tmp.glob("gptoss-*/replica-1*"))
    os.kill(running.pids()["rank"], signal.SIGKILL)
    wait_for(lambda: running.process.poll() is not None, 60)
    assert running.process.wait() == 7
    assert running.stderr().count("replicas are left") == 1
    assert running.stderr().endswith("\nreplica 0 cannot be restarted: tensor x is short\nhint: fetch it again\n")
    running.gone_within()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["command", "http", "torchrun 1"])
def test_kill_9_of_the_others(start, victim):
    running = start("serve", 0, 2, 10)
    os.kill(running.pids()[victim], signal.SIGKILL)
    if victim == "torchrun 1":  # a replica's own death, whose rank ends with it
        wait_for(lambda: "replica 1 answers again" in running.stderr())
        assert running.pids().keys() == {"command", "http", "rank", "torchrun", "rank 1", "torchrun 1"}
        running.process.send_signal(signal.SIGTERM)
    running.gone_within()
    assert running.process.wait() == {"command": -9, "http": 7, "torchrun 1": 0}[victim]


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 0.5, 1.5, 2.5])
def test_the_command_is_killed_while_a_replica_is_restarted(start, after_s):
    running = start("serve", 0, 2, 10)
    os.kill(running.pids()["rank 1"], signal.SIGKILL)
    wait_for(lambda: "replica 1 died, restart 1" in running.stderr())
    time.sleep(after_s)
    running.process.kill()
    running.gone_within()


@pytest.mark.slow
def test_sigterm_while_a_replica_is_restarted(start):
    running = start("serve", 0, 2, 10)
    os.kill(running.pids()["rank 1"], signal.SIGKILL)
    wait_for(lambda: "replica 1 died, restart 1" in running.stderr())
    time.sleep(1.0)
    running.process.send_signal(signal.SIGTERM)
    running.gone_within()
    assert running.process.wait() == 0

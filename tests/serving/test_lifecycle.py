"""serve and generate as processes, with the fake worker for ranks: signals, deaths, and that nothing is left behind."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

HELLO = [{"role": "user", "content": "Hello"}]


def ask(running, **fields):
    client = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)
    return client.chat.completions.create(model="tiny", messages=HELLO, **fields)


def wait_for(found, limit_s=5.0):
    deadline = time.monotonic() + limit_s
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log(running) -> str:
    path = running.tmp / "log"
    return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def server(start):
    return start("serve", 0, 10, script={"delay_s": 0.02})


def test_the_official_client_is_answered_plain_and_streamed(server):
    whole = ask(server, max_completion_tokens=12, seed=5, temperature=0)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 12
    chunks = list(ask(server, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert " 0.0 5 12" in log(server)


def test_tokens_come_as_they_are_made(server):
    times = []
    for _ in ask(server, max_tokens=40, stream=True):
        times.append(time.monotonic())
    assert times[-1] - times[0] > 0.5  # 40 tokens, 0.02 s each: not collected and sent at once


def test_a_client_that_leaves_cancels_its_request(server):
    stream = ask(server, max_tokens=2000, stream=True)
    next(iter(stream))
    # A second one, which waits for its turn, leaves first.
    waiting = httpx.Client()
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 2000}
        waiting.post(f"{server.url}/chat/completions", json=body, timeout=0.3)
    waiting.close()
    assert "cancel" not in log(server)
    stream.close()
    wait_for(lambda: log(server).count("cancel") == 2)
    last = [line for line in log(server).splitlines() if line.startswith("cancel")][-1]
    assert last.endswith(" 0")  # cancelled before its first token
    assert ask(server, max_tokens=3).usage.completion_tokens == 3


def test_a_deadline_ends_an_answer_and_metrics_say_so(server):
    begun_s = time.monotonic()
    answer = ask(server, max_tokens=2000, extra_body={"deadline_s": 0.5})
    assert 0.5 < time.monotonic() - begun_s < 5
    assert answer.choices[0].finish_reason == "length" and 0 < answer.usage.completion_tokens < 26  # 0.02 s each
    text = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
    assert 'gptoss:request_success_total{finish_reason="deadline",model_name="tiny",replica="0"} 1.0' in text
    assert 'gptoss:replica_up{model_name="tiny",replica="0"} 1.0' in text


def test_a_body_that_is_too_large(server):
    answer = httpx.post(f"{server.url}/chat/completions", content=b" " * (40 << 20))
    assert answer.status_code == 413 and "33,554,432 bytes" in answer.json()["error"]["message"]


def test_sigterm_lets_a_running_answer_finish(server):
    """Last of those that share the server."""
    stream = iter(ask(server, max_tokens=40, stream=True))
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    server.gone_within()
    assert server.process.wait() == 0
    assert "10 s; a second signal ends at once" in server.stderr()


def test_ctrl_c_when_idle(start):
    running = start("serve", 0, 30)
    assert httpx.get(f"http://127.0.0.1:{running.port}/ready").status_code == 200
    running.process.send_signal(signal.SIGINT)
    running.gone_within()
    assert running.process.wait() == 0


def test_a_drain_that_takes_too_long_ends_with_an_error_event(start):
    running = start("serve", 0, 1, script={"delay_s": 0.05})
    stream = iter(ask(running, max_tokens=2000, stream=True))
    next(stream)
    running.process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(stream)
    running.gone_within()
    assert running.process.wait() == 0


def test_a_second_signal_ends_at_once(start):
    running = start("serve", 0, 60, script={"delay_s": 0.05})
    stream = iter(ask(running, max_tokens=2000, stream=True))
    next(stream)
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGINT)
    running.gone_within()
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(stream)


@pytest.mark.parametrize("victim", ["command", "rank", "http"])
def test_kill_9_leaves_nothing(start, victim):
    running = start("serve", 0, 30, script={"delay_s": 0.05})
    assert running.pids().keys() == {"command", "rank", "http"}  # a single rank has no torchrun
    errors = []

    def read():
        try:
            list(ask(running, max_tokens=2000, stream=True))
        except (openai.APIError, httpx.HTTPError) as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: "begin" in log(running))
    os.kill(running.pids()[victim], signal.SIGKILL)
    running.gone_within()
    reader.join(5)
    assert len(errors) == 1
    if victim == "command":
        return
    assert running.process.wait() == 7
    said = running.stderr()
    name = {"rank": "rank 0 on", "http": "the HTTP process on"}[victim]
    assert f"{name} {socket.gethostname()} died while" in said
    if victim == "rank":
        assert "the log of rank 0 ended with\n  | fake worker speaks" in said
        assert "engine died" in str(errors[0])


def test_a_busy_port_is_said_before_anything_starts(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = start("serve", port, 30, url=False)
        assert running.process.wait(10) == 2
    assert running.stderr().startswith(f"cannot listen on 127.0.0.1 port {port}: Address already in use\nhint: ")
    running.gone_within()


def test_what_a_rank_says_before_it_ends_is_passed_on(start):
    said = {
        2: "tensor x is short\nhint: fetch it again\n",
        1: f"rank 0 on {socket.gethostname()} failed while loading (0.0 of 0.0 GB read): tensor x is short\n"
        "hint: fetch it again\nthe log of rank 0 ended with\n  | fake worker speaks\n",
    }
    for code, expected in {2: 2, 1: 7}.items():  # 1: not the user's fault
        fail = {"message": "tensor x is short", "hint": "fetch it again", "exit_code": code}
        running = start("serve", 0, 30, script={"fail": fail}, url=False)
        assert running.process.wait(20) == expected
        assert running.stderr() == said[code]
        running.gone_within()


def test_a_rank_that_ends_before_it_is_heard_of(start):
    running = start("serve", 0, 30, script={"says": "no such library"}, url=False)
    assert running.process.wait(20) == 7
    said = "replica-0 ended with exit code 1\nhint: the log of rank 0 ended with\n  | no such library\n"
    assert running.stderr() == said
    running.gone_within()


def test_alive_but_not_ready_while_loading_then_sigterm(start, free_port):
    running = start("serve", free_port, 30, script={"load_s": 60.0}, url=False)
    running.url = f"http://127.0.0.1:{free_port}/v1"
    address = f"http://127.0.0.1:{free_port}"
    wait_for(lambda: running._held_port() == ["port"], 10)
    assert httpx.get(f"{address}/health", timeout=10).status_code == 200
    assert httpx.get(f"{address}/ready").status_code == 503
    refused = httpx.post(f"{address}/v1/chat/completions", json={"model": "tiny", "messages": HELLO})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "not_ready"
    running.process.send_signal(signal.SIGTERM)
    running.gone_within()
    assert running.process.wait() == 0


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_generate(start, markup):
    answer = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Hi there<|return|>"
    running = start("generate", 100, script={"tokens": markup(answer)}, url=False)
    result = json.loads(running.process.stdout.read())
    assert running.process.wait() == 0
    running.gone_within()
    assert (result["reasoning"], result["content"], result["finish_reason"]) == ("Hm", "Hi there", "stop")
    assert result["tokens"] == markup(answer) and result["tool_calls"] == []
    assert result["usage"]["prompt_tokens"] == len(result["prompt_tokens"])
    assert result["timings"].keys() == {"load_s", "ttft_s", "decode_tok_s"}


def test_generate_when_killed(start):
    running = start("generate", 2000, script={"delay_s": 0.05}, url=False)
    wait_for(lambda: "begin" in log(running), 20)
    running.process.kill()
    running.gone_within()


def test_ctrl_c_ends_generate(start):
    running = start("generate", 2000, script={"delay_s": 0.05}, url=False)
    wait_for(lambda: "begin" in log(running), 20)
    running.process.send_signal(signal.SIGINT)
    running.gone_within()
    assert json.loads(running.process.stdout.read()) is None


def test_run_folders_of_deep_temporary_folders_are_short(monkeypatch, tmp_path):
    from gptoss_launch.launch import supervise

    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(supervise.tempfile, "tempdir", str(deep))
    folder = supervise.run_folder()
    assert folder.parent == Path("/tmp") and folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()


@pytest.mark.parametrize("after_s", [0.5, 1.5])
def test_kill_9_while_processes_are_still_starting(start, after_s):
    running = start("serve", 0, 30, url=False)
    wait_for(lambda: list(running.tmp.glob("gptoss-*/plan.json")), 20)
    time.sleep(after_s)
    running.process.kill()
    running.gone_within()

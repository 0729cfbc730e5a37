"""`serve --engine vllm`: command lines of five plans against a file, what is refused, and a stand-in that is run.

After an intended change write the file anew, look at the difference, and commit it:
    python tests/cli/test_vllm.py
"""

import asyncio
import json
import shlex
import signal
import socket
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from gptoss_launch.launch.cli import run as run_command
from gptoss_launch.launch.keys import KEYS_VARIABLE, read_keys
from gptoss_launch.launch.resolve import tiny_folder
from gptoss_launch.launch.settings import ServeSettings
from gptoss_launch.launch.stop import StopSignals
from gptoss_launch.launch.vllm import run_vllm, vllm_arguments, vllm_environment, vllm_notes, write_vocabulary
from gptoss_launch.parallel.errors import RankDiedError, UserError
from gptoss_launch.parallel.planning.choice import Asked
from gptoss_launch.parallel.planning.machine import read_machine
from gptoss_launch.parallel.planning.plan import Plan
from gptoss_launch.parallel.planning.planner import plan as choose_plan
from gptoss_launch.parallel.planning.spec import PUBLISHED

GOLDEN = Path(__file__).parent / "golden" / "vllm.txt"
LOCAL = ServeSettings()
OPEN = ServeSettings(
    host="0.0.0.0",
    cors_origin=("https://chat.example.org",),
    tls_cert=Path("/etc/ssl/one.pem"),
    tls_key=Path("/etc/ssl/one.key"),
    otlp="http://127.0.0.1:4318/v1/traces",
)
# size, machine, what is asked, how it is served
PLANS = (
    ("20b", "h100", Asked(), LOCAL),
    ("120b", "h100", Asked(kv_dtype="fp8", context_tokens=16384), OPEN),
    ("120b", "h100x8", Asked(), LOCAL),
    ("120b", "h100x8", Asked(dp=4, ranks=2, ep=2, workload="throughput"), LOCAL),
    ("20b", "a100-40x4", Asked(ranks=4, sequences=64), LOCAL),
)


def make(size: str, machine: str, asked: Asked) -> Plan:
    model = f"openai/gpt-oss-{size}"
    return choose_plan(PUBLISHED[model], read_machine(machine), asked, model=model)


def golden() -> str:
    lines = []
    for size, machine, asked, settings in PLANS:
        plan = make(size, machine, asked)
        lines += [f"# {size}, {machine}: dp {plan.dp}, {plan.ranks} ranks, ep {plan.ep}"]
        lines += [f"# {note}" for note in vllm_notes(plan, ())]
        lines += [f"vllm serve {shlex.join(vllm_arguments(plan, settings, plan.model, 8000))}"]
    return "\n".join(lines) + "\n"


def test_command_lines_of_five_plans() -> None:
    assert golden() == GOLDEN.read_text(encoding="utf-8")


def test_what_has_no_equivalent_is_refused_by_name() -> None:
    plan = make("20b", "h100x8", Asked(ranks=4, dp=1, ep=1))
    for change, named in (
        ({"ranks": 3}, "3 ranks"),
        ({"ep": 2}, "ep 2 of 4 ranks"),
        ({"nodes": 2}, "2 nodes"),
        ({"device": "cpu"}, "a CPU"),
        ({"kv_dtype": "fp32"}, "a KV cache of fp32 beside bf16"),
        ({"expert_order": ((1, 0),)}, "--routing"),
        ({"rest": "int8"}, "--rest int8"),
    ):
        with pytest.raises(UserError, match=named):
            vllm_arguments(replace(plan, **change), LOCAL, "x", 1)
    with pytest.raises(UserError, match="--access-log"):
        vllm_arguments(plan, ServeSettings(access_log="-"), "x", 1)
    with pytest.raises(UserError, match="cannot hold all experts"):
        vllm_arguments(make("20b", "rtx2080ti", Asked()), LOCAL, "x", 1)


def test_a_key_is_passed_on_where_nobody_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\nfirst name=a\n")
    by_bus = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert vllm_environment({"A": "1"}, (), None) == {"A": "1"} | by_bus
    assert vllm_environment({"A": "1"}, read_keys(file, {}), file) == {"A": "1", "VLLM_API_KEY": "first"} | by_bus
    given = {KEYS_VARIABLE: "# theirs\nsecond\n", "VLLM_API_KEY": "another"}
    assert vllm_environment(given, read_keys(None, given), None) == {"VLLM_API_KEY": "second"} | by_bus
    plan = make("20b", "h100", Asked())
    assert not vllm_notes(plan, ()) and "/invocations" in vllm_notes(plan, read_keys(None, given))[0]
    for text in ("one\ntwo\n", "one per_minute=5\n"):
        file.write_text(text)
        with pytest.raises(UserError, match="API keys, or limits"):
            vllm_environment({}, read_keys(file, {}), file)


def test_without_vllm_it_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert run_command(["serve", "tiny", "--engine", "vllm"]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err


def test_what_is_no_vocabulary_of_gpt_oss_is_said(tmp_path: Path) -> None:
    """That of a true checkpoint is in tests/harmony."""
    assert not write_vocabulary(tiny_folder(), tmp_path) and not list(tmp_path.iterdir())
    assert "downloads" in vllm_notes(make("20b", "h100", Asked()), (), vocabulary=False)[0]


STAND_IN = """
import http.server, os, signal, subprocess, sys, threading, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
engine = subprocess.Popen([sys.executable, "-c", deaf])
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path in ("/health", "/key") else 404)
        self.end_headers()
        answer = f"{os.environ.get('VLLM_API_KEY')} {engine.pid}" if self.path == "/key" else ""
        self.wfile.write(answer.encode())
    def log_message(self, *arguments): pass
print("a banner", flush=True)
port, ends_after_s, slow_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(slow_s), os._exit(0)))
if ends_after_s: threading.Timer(ends_after_s, os._exit, (3,)).start()
http.server.HTTPServer(("127.0.0.1", port), Answers).serve_forever()
"""


def run(signals: int, ends_after_s: float = 0.0, slow_s: float = 0.0) -> tuple[list[str], float]:
    """The key that it was given, and how long the end took. signals: how many are sent once it is ready.

    Its engine, a process of its own that no SIGTERM ends, must be gone then.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", STAND_IN, str(port), str(ends_after_s), str(slow_s)]
    told: list[str] = []

    async def whole() -> float:
        loop, begun_s = asyncio.get_running_loop(), [0.0]

        def ready() -> None:
            begun_s[0] = loop.time()
            told.extend(urllib.request.urlopen(f"http://127.0.0.1:{port}/key").read().decode().split())
            for _ in range(signals):
                signal.raise_signal(signal.SIGTERM)

        with StopSignals().caught() as stop:
            await run_vllm(command, {"VLLM_API_KEY": "k"}, f"http://127.0.0.1:{port}/v1", 60.0, stop, ready)
        return loop.time() - begun_s[0]

    took_s = asyncio.run(whole())
    pid, given_up_s = int(told.pop()), time.monotonic() + 10
    while not ended(pid):  # a signal that kills has been sent: on a busy machine it takes a moment
        assert time.monotonic() < given_up_s
        time.sleep(0.01)
    return told, took_s


def ended(pid: int) -> bool:
    """Or about to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_it_runs_until_a_signal_and_a_second_one_ends_it_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    told, took_s = run(signals=1, slow_s=0.5)
    assert told == ["k"] and took_s >= 0.5
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "a banner\n")
    told, took_s = run(signals=2, slow_s=30)
    assert told == ["k"] and took_s < 20


@pytest.mark.parametrize("ends_after_s", [0.001, 1.0])  # before it answers, and later
def test_an_end_of_its_own_is_an_error(ends_after_s: float) -> None:
    with pytest.raises(RankDiedError, match="vLLM ended with code 3"):
        run(signals=0, ends_after_s=ends_after_s)


if __name__ == "__main__":
    GOLDEN.write_text(golden(), encoding="utf-8")
    print(json.dumps({"written": str(GOLDEN)}))

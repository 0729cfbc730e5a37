"""`top`: metrics as Prometheus' own parser reads them, figures by hand, and the screen in a pseudo-terminal."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fcntl import ioctl

import engine_stats
import pytest
from gptoss_launch.launch.api.metrics import Metrics
from gptoss_launch.launch.api.metrics import Replica as Served
from gptoss_launch.launch.cli import run
from gptoss_launch.launch.prometheus import Reading, parse, quantile, rate, rise
from gptoss_launch.launch.top import View, bar, lines, render, snapshot, sparkline
from gptoss_launch.parallel.engine.request import Token
from gptoss_launch.parallel.engine.wire import Stats
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from stub_server import Script, stub

WAIT_S = 60.0  # on a machine that is busy with other things
STATS = replace(engine_stats.STATS, slow_paths=('a "slow" \\ path',))


def metrics_text(tokens: int, stats: Stats = STATS, replicas: int = 1) -> str:
    """What our own server writes after one request of so many tokens on each replica."""
    metrics = Metrics(CollectorRegistry(), "tiny", replicas)
    for number in range(replicas):
        metrics.report(number, stats)
        watch = metrics.watch(prompt_tokens=12)
        watch.sent(number)
        for place in range(tokens):
            watch.token(Token("a", place, "length" if place == tokens - 1 else None))
    return metrics.text([Served(True, 0)] * replicas).decode()


# --- reading


def test_our_own_metrics_are_read_as_prometheus_reads_them() -> None:
    text = metrics_text(5, replicas=2)
    wanted = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert dict(parse(text, 0.0).values) == wanted and len(wanted) > 100


def test_no_metrics() -> None:
    with pytest.raises(ValueError, match="no line of metrics: '<html>'"):
        parse("<html>\n</html>", 0.0)
    with pytest.raises(ValueError, match="no metrics of gptoss-launch or vLLM"):
        snapshot(parse("go_threads 7\n", 0.0), parse("go_threads 7\n", 1.0))


def test_counters_that_begin_again() -> None:
    before, now = parse('n{r="0"} 10\nn{r="1"} 5\n', 1.0), parse('n{r="0"} 4\nn{r="1"} 8\nn{r="2"} 2\n', 3.0)
    assert rise(before, now, "n") == 4 + 3 + 2 and rate(before, now, "n") == 4.5
    assert rise(before, now, "m") is None and rate(now, now, "n") is None


def histogram(*counts: int) -> str:
    edges = ("0.1", "0.2", "0.4", "+Inf")
    return "".join(f'h_bucket{{le="{edge}"}} {count}\n' for edge, count in zip(edges, counts, strict=True))


def test_quantiles_by_hand() -> None:
    """Of the ten since the first reading: two up to 0.1, six up to 0.2, two up to 0.4."""
    before, now = parse(histogram(5, 5, 5, 5), 0.0), parse(histogram(7, 13, 15, 15), 1.0)
    assert quantile(before, now, "h", 0.2) == pytest.approx(0.1)
    assert quantile(before, now, "h", 0.5) == pytest.approx(0.1 + 0.1 * 3 / 6)
    assert quantile(before, now, "h", 0.9) == pytest.approx(0.3)
    assert quantile(now, now, "h", 0.5) is None
    beyond = parse(histogram(5, 5, 5, 9), 1.0)
    assert quantile(before, beyond, "h", 0.5) == 0.4  # all that is known


def test_a_snapshot_of_our_own_server() -> None:
    before = parse(metrics_text(1, replace(STATS, prefix_queried_tokens_total=900, prefix_hit_tokens_total=560)), 10.0)
    shown = snapshot(before, parse(metrics_text(21), 12.0))
    assert shown.model == "tiny" and shown.generation_tok_s == 10.0 and shown.prompt_tok_s == 0.0
    assert (shown.running, shown.waiting, shown.kv_share, shown.preemptions) == (3, 4, 0.25, 7)
    assert shown.prefix_hit_share == pytest.approx(0.4)
    assert shown.communication_share == 0.25 and shown.decode_step_s == 0.02
    assert shown.itl_p50_s is not None and shown.itl_p50_s <= 0.001 and shown.ttft_p50_s is None
    assert shown.slow_paths == ('a "slow" \\ path',) and shown.gpu_used_bytes is None
    assert dict(lines(shown))["GPU memory"] == "not told" and "40.0 %" in dict(lines(shown))["prefix hits"]


def test_vllms_names_are_read_as_well() -> None:
    text = metrics_text(3).replace("gptoss:", "vllm:") + "vllm:gpu_memory_used_bytes 1073741824\n"
    shown = snapshot(parse(text, 0.0), parse(text, 1.0))
    assert shown.running == 3 and dict(lines(shown))["GPU memory"] == "1.0 GiB"


def test_replicas_are_told_apart() -> None:
    text = metrics_text(3, replicas=2)
    shown = snapshot(parse(text, 0.0), parse(text, 1.0))
    assert [(one.name, one.up, one.running, one.kv_share) for one in shown.replicas] == [
        ("0", True, 3, 0.25),
        ("1", True, 3, 0.25),
    ]
    assert shown.running == 6 and shown.kv_share == 0.25
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(View("http://h:1", shown, "", [1.0, 2.0])))
    assert re.search(r"1\s+up\s+3\s+4", console.export_text())


def test_bars() -> None:
    assert bar(0.5) == "████████████░░░░░░░░░░░░ 50.0%" and bar(None) == "-" and bar(1.5).startswith("█" * 24)
    assert sparkline([0, 50, 100]) == "▁▄█" and sparkline([]) == "" and sparkline([0.0]) == "▁"


# --- as it is called


def test_json_is_one_snapshot(capsys: pytest.CaptureFixture[str]) -> None:
    with stub(Script(metrics=metrics_text(4))) as url:
        assert run(["top", f"{url}/v1", "--json", "--every", "0.1"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert err == "" and shown["running"] == 3 and shown["generation_tok_s"] == 0 and shown["model"] == "tiny"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1/metrics: "),
        ("127.0.0.1:1", "is no URL of a server"),
        ("http://h/v2", "is no URL of a server"),
        ("EMPTY", "no metrics of gptoss-launch or vLLM"),
        ("HTML", "no line of metrics: '<html>'"),
    ],
)
def test_wrong_input(url: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with stub(Script(metrics="<html>" if url == "HTML" else "")) as server:
        target = server if url in ("EMPTY", "HTML") else url
        assert run(["top", target, "--json", "--every", "0.1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "\nhint: " in err


def test_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "http://127.0.0.1:1"]) == 2
    assert "--json prints one snapshot" in capsys.readouterr().err


# --- in a terminal


class Terminal:
    """`top` in a pseudo-terminal of 40 lines of 120 columns; `text` is all that it ever wrote, without controls."""

    def __init__(self, *arguments: str) -> None:
        self.keys, inner = pty.openpty()
        ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.before = termios.tcgetattr(inner)
        command = [sys.executable, "-m", "gptoss_launch.launch", "top", *arguments]
        environment = os.environ | {"TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True,
            preexec_fn=lambda: ioctl(inner, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.inner, self.raw = inner, b""

    def read(self) -> None:
        while select.select([self.keys], [], [], 0.05)[0]:
            self.raw += os.read(self.keys, 1 << 16)

    def wait_for(self, words: str) -> None:
        """Reads on until `words` come, and forgets what came before."""
        until_s = time.monotonic() + WAIT_S
        while words not in self.text:
            assert time.monotonic() < until_s and self.process.poll() is None, f"no {words!r} in {self.text[-2000:]!r}"
            self.read()
        self.raw = b""

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace"))

    def end(self, key: bytes) -> int:
        os.write(self.keys, key)
        until_s = time.monotonic() + WAIT_S
        while self.process.poll() is None and time.monotonic() < until_s:
            self.read()
        return self.process.wait(1)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> Terminal:
            one = Terminal(*arguments)
            stack.callback(os.close, one.keys)
            stack.callback(os.close, one.inner)
            stack.callback(one.process.wait)
            stack.callback(lambda: one.process.poll() is None and os.kill(one.process.pid, signal.SIGKILL))
            return one

        yield start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_leaves_and_returns(terminal: Callable[..., Terminal]) -> None:
    """Figures are drawn and follow the server; while it is gone the last ones stay, and it is found again; q leaves,
    with exit code 0, the terminal as it was, and the screen given back."""
    port, script = free_port(), Script(metrics=metrics_text(3))
    top = terminal(f"http://127.0.0.1:{port}", "--every", "0.2")
    top.wait_for("still trying")
    with stub(script, port):
        top.wait_for("3 running   4 waiting")
        script.metrics = metrics_text(50, replace(STATS, running=9, kv_pages_used=100))
        top.wait_for("9 running   4 waiting")
        top.wait_for("50.0%")
    top.wait_for("still trying")
    top.wait_for("9 running")  # the last that is known
    script.metrics = metrics_text(2, replace(STATS, running=1))  # another process: its counters begin again
    with stub(script, port):
        top.wait_for("1 running   4 waiting")
        assert top.end(b"q") == 0
    assert b"\x1b[?1049l" in top.raw and b"\x1b[?25h" in top.raw  # the screen and the cursor are back
    assert termios.tcgetattr(top.inner) == top.before


def test_ctrl_c_leaves_as_q_does(terminal: Callable[..., Terminal]) -> None:
    with stub(Script(metrics=metrics_text(3))) as url:
        top = terminal(url)
        top.wait_for("tokens/s")
        assert top.end(b"\x03") == 0
    assert b"\x1b[?1049l" in top.raw and "Traceback" not in top.text
    assert termios.tcgetattr(top.inner) == top.before


def test_a_reading_sums_over_labels() -> None:
    reading = Reading(0.0, {("n", (("r", "0"),)): 1.0, ("n", (("r", "1"),)): 3.0})
    assert reading.total("n") == 4.0 and reading.mean("n") == 2.0 and reading.by("n", "r") == {"0": 1.0, "1": 3.0}
    assert reading.total("m") is None and reading.mean("m") is None

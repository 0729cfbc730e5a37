"""Two real ranks on tiny, over gloo: what a person is told when one of them dies or hangs, and that nothing is left.

Each test starts `serve` as a user does and needs a server of its own, as it destroys it. Where a rank is, is read from
its trace, so that it is hit within a step and not between two.
"""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from gptoss_launch.launch.resolve import make_plan
from gptoss_launch.launch.settings import Settings
from gptoss_launch.parallel.engine.trace import Trace, Where, read_where, trace_file
from gptoss_launch.parallel.planning.limits import step_limit_s

PROGRAM = ("-m", "gptoss_launch.launch")
ARGUMENTS = ("--machine", "cpu", "--ranks", "2", "--dp", "1", "--context", "256", "--port", "0")
HELLO = [{"role": "user", "content": "Hello"}]
GONE_S = 10.0
HOST = socket.gethostname()


@pytest.fixture
def server(start):
    running = start("serve", "tiny", *ARGUMENTS, program=PROGRAM)
    assert rank_pids(running).keys() == {0, 1}
    yield running
    for pid in rank_pids(running).values():  # of a test that failed: a stopped process does not end by itself
        os.kill(pid, signal.SIGKILL)


def rank_pids(running, replica: int = 0) -> dict[int, int]:
    """rank -> pid of what lives of one replica."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().decode().split("\0")
            environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        ends = f"/engine-{replica}.sock"
        of_ours = any(word.startswith(str(running.tmp)) and word.endswith(ends) for word in arguments)
        rank = next((entry[5:] for entry in environment if entry.startswith("RANK=")), None)
        if of_ours and rank is not None and state != "Z":
            found[int(rank)] = int(folder.name)
    return found


def where(running, rank: int) -> Where:
    (folder,) = running.tmp.glob("gptoss-*")
    found = read_where(trace_file(folder / "replica-0.1" / "replica-0.sock", rank))
    assert found is not None
    return found


class Stream:
    """A client that reads an answer in a thread, and then the next one, until the server is gone."""

    def __init__(self, running) -> None:
        self.errors: list[Exception] = []
        self.chunks = 0
        self._client = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=60)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        deadline = time.monotonic() + 20
        while self.chunks < 5:
            assert time.monotonic() < deadline and not self.errors, self.errors
            time.sleep(0.01)

    def _read(self) -> None:
        try:
            while True:
                stream = self._client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=150, stream=True)
                for _ in stream:
                    self.chunks += 1
        except (openai.APIError, httpx.HTTPError) as error:
            self.errors.append(error)

    def ended(self) -> None:
        """It was told, and does not wait for ever."""
        self._thread.join(5)
        assert not self._thread.is_alive() and len(self.errors) == 1
        self._client.close()


def stop_within_a_step(running, rank: int) -> None:
    """SIGSTOP that hits `rank` in a step; the other rank may be in the same collective or ahead of it."""
    pid = rank_pids(running)[rank]
    for _ in range(200):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1)  # for the other to come as far as it can
        if where(running, rank).phase in ("step", "collective"):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.007)
    raise AssertionError("never stopped within a step")


def error_line(running) -> str:
    """The one line on stderr that says what went wrong."""
    (line,) = [line for line in running.stderr().splitlines() if line.startswith("error: ")]
    return line


def test_progress_grows_as_a_rank_goes_on(tmp_path):
    """The rank with the smallest is taken for the one that holds up the others."""
    trace = Trace(tmp_path / "trace")
    steps = (trace.step, *(trace.collective_begins, trace.collective_ends) * 2, trace.idle)
    seen = []
    for go_on in (trace.collective_begins, trace.collective_ends, trace.idle):  # warming up: all of it is step 0
        go_on()
        assert read_where(tmp_path / "trace").progress[:2] == (0, 0)
    for go_on in steps * 2:
        go_on()
        seen.append(read_where(tmp_path / "trace").progress)
    assert seen == sorted(set(seen))


def test_a_killed_rank_is_named_with_where_it_was(server):
    stream = Stream(server)
    stop_within_a_step(server, 1)
    was = where(server, 1)
    os.kill(rank_pids(server)[1], signal.SIGKILL)
    print(f"gone {server.gone_within(GONE_S):.1f} s after rank 1 was killed {was}")
    assert server.process.wait() == 7
    assert error_line(server) == f"error: rank 1 on {HOST} died {was}"
    stream.ended()


@pytest.mark.slow
def test_a_hanging_rank_is_named_once_a_step_takes_too_long(server):
    settings = Settings(machine="cpu", ranks=2, dp=1, context_tokens=256)
    limit_s = step_limit_s(make_plan("tiny", settings, need_weights=True))
    stream = Stream(server)
    stop_within_a_step(server, 1)
    was = where(server, 1)
    begun_s = time.monotonic()
    while not stream.errors:
        assert time.monotonic() - begun_s < limit_s + 5
        time.sleep(0.05)
    detected_s = time.monotonic() - begun_s
    print(f"limit {limit_s:.1f} s, client told after {detected_s:.1f} s, gone {server.gone_within(GONE_S):.1f} s later")
    assert detected_s > limit_s - 1  # it is not taken for dead
    assert server.process.wait() == 7
    assert error_line(server) == f"error: rank 1 on {HOST} hangs {was}: a step may take {limit_s:.0f} s"
    assert f"rank 0 on {HOST} is in collective" in server.stderr()
    stream.ended()


@pytest.mark.parametrize("victim", ["torchrun", "http", "command"])
def test_kill_9_of_the_others_leaves_nothing(server, victim):
    stream = Stream(server)
    os.kill(server.pids()[victim], signal.SIGKILL)
    print(f"gone {server.gone_within(GONE_S):.1f} s after {victim} was killed")
    assert server.process.wait() == (-signal.SIGKILL if victim == "command" else 7)
    if victim != "command":
        name = {"torchrun": "torchrun", "http": "the HTTP process"}[victim]
        assert error_line(server).startswith(f"error: {name} on {HOST} died while ")
    stream.ended()


@pytest.mark.slow
def test_a_rank_of_one_replica_dies_and_the_replica_comes_back(start):
    """Two replicas of two ranks: the leader of the one that is hit lives at first, and waits in a collective."""
    arguments = (
        "--machine",
        "cpu",
        "--ranks",
        "2",
        "--dp",
        "2",
        "--context",
        "8192",
        "--port",
        "0",
    )  # still answering when hit
    running = start("serve", "tiny", *arguments, program=PROGRAM)
    streams = [Stream(running) for _ in range(2)]
    pids = {replica: rank_pids(running, replica) for replica in (0, 1)}
    assert all(pids[replica].keys() == {0, 1} for replica in pids)
    os.kill(pids[1][1], signal.SIGKILL)
    deadline = time.monotonic() + 90
    while "replica 1 answers again" not in running.stderr():
        assert time.monotonic() < deadline, running.stderr()
        time.sleep(0.1)
    assert f"replica 1 died, restart 1 of 3 in 1 s: rank 1 on {HOST} died " in running.stderr()
    assert rank_pids(running, 0) == pids[0]
    assert rank_pids(running, 1).keys() == {0, 1} and not set(rank_pids(running, 1).values()) & set(pids[1].values())
    while httpx.get(f"http://127.0.0.1:{running.port}/ready").status_code != 200:  # the HTTP process looks each POLL_S
        assert time.monotonic() < deadline
        time.sleep(0.1)
    told = [str(error) for stream in streams for error in stream.errors]
    assert len(told) == 1 and "send the request again" in told[0]
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    running.process.send_signal(signal.SIGINT)
    running.gone_within(GONE_S)
    assert running.process.wait() == 0
    for stream in streams:
        stream.ended()

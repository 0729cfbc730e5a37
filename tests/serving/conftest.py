"""What the serving tests share: the tiny tokenizer, scripted answers, and servers with the fake worker behind them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from gptoss_launch.launch.resolve import make_plan
from gptoss_launch.launch.settings import Settings
from gptoss_launch.launch.tokenizer import Tokenizer, load_tokenizer
from gptoss_launch.parallel.planning.plan import Plan

HERE = Path(__file__).parent
DRIVE = (str(HERE / "drive.py"),)
GONE_S = 5.0


@pytest.fixture(scope="session")
def tiny_plan() -> Plan:
    return make_plan("tiny", Settings(machine="cpu", context_tokens=4096), need_weights=True)


@pytest.fixture(scope="session")
def tokenizer(tiny_plan: Plan) -> Tokenizer:
    return load_tokenizer(Path(tiny_plan.checkpoint))


@pytest.fixture(scope="session")
def markup(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Text with harmony markup -> ids."""

    def ids(text: str) -> list[int]:
        parts = re.split(r"(<\|[a-z]+\|>)", text)
        return [
            i for part in parts for i in ([tokenizer.special[part]] if part[:2] == "<|" else tokenizer.encode(part))
        ]

    return ids


@dataclass
class Running:
    """A started command and all it started; `tmp` is its temporary folder and part of every child's arguments."""

    process: subprocess.Popen
    tmp: Path
    url: str = ""

    @property
    def port(self) -> int:
        return int(self.url.split(":")[2].split("/")[0])

    def pids(self) -> dict[str, int]:
        """role -> pid of what lives (zombies do not); roles of replicas after the first end in their number."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_bytes().decode().split("\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != "Z" and any(str(self.tmp) in argument for argument in arguments):
                names = {"gptoss_launch.launch.api": "http", "gptoss_launch.launch.lifeline": "torchrun"}
                role = next((names[argument] for argument in arguments if argument in names), "rank")
                listens = [word for word in map(Path, arguments) if word.name.startswith("engine-")]
                number = listens[0].stem.removeprefix("engine-") if role != "http" and listens else "0"
                found[role if number == "0" else f"{role} {number}"] = int(folder.name)
        if self.process.poll() is None:
            found["command"] = self.process.pid
        return found

    def gone_within(self, limit_s: float = GONE_S) -> float:
        """Seconds until nothing is left: no process, no run folder, no held port. Fails after limit_s."""
        begun = time.monotonic()
        while left := [*self.pids(), *(path.name for path in self.tmp.glob("gptoss-*")), *self._held_port()]:
            assert time.monotonic() - begun < limit_s, f"after {limit_s} s there still is {left}"
            time.sleep(0.05)
        return time.monotonic() - begun

    def _held_port(self) -> list[str]:
        if not self.url:
            return []
        with socket.socket() as probe:
            return ["port"] if probe.connect_ex(("127.0.0.1", self.port)) == 0 else []

    def stderr(self) -> str:
        return (self.tmp / "stderr").read_text()


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Running]]:
    """start(*drive.py's arguments, script={...}, url=True) -> Running, once it has printed its URL.

    program: what to run in place of drive.py.
    """
    everyone: list[Running] = []

    def run(*arguments: object, script: dict | None = None, url: bool = True, program=DRIVE) -> Running:
        tmp = Path(tempfile.mkdtemp(prefix="gl-", dir="/tmp"))  # short: sockets lie in it
        (tmp / "script").write_text(json.dumps({"log": str(tmp / "log")} | (script or {})))
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"TMPDIR": str(tmp), "FAKE_SCRIPT": str(tmp / "script"), "PYTHONPATH": path}
        with (tmp / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, *program, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                text=True,
            )
        running = Running(process, tmp)
        everyone.append(running)
        if url:
            running.url = process.stdout.readline().strip()
            assert running.url.startswith("http://127.0.0.1:"), running.stderr()
        return running

    yield run
    for running in everyone:
        for pid in running.pids().values():
            os.kill(pid, signal.SIGKILL)
        running.process.wait()
        running.process.stdout.close()
        shutil.rmtree(running.tmp, ignore_errors=True)

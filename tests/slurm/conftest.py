"""What the Slurm tests share: the command line as a process, its registry of jobs apart, and the real cluster."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from gptoss_launch.launch.cli import run
from slurm_cluster import FREEZER, Cluster, ClusterError, install

HERE = Path(__file__).parent
FAKE_PYTHON = HERE / "fake_python"
CLUSTER_ROOT = Path(
    "/tmp/gptoss-launch-test-slurm"
)  # fixed, so that what a killed run left is found; short, for sockets


class CommandLine:
    """gptoss-launch, run in `folder` as a process. environment: in place of ours for these names."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        own = {"XDG_STATE_HOME": str(folder / "state"), "XDG_CONFIG_HOME": str(folder / "config")}
        self.environment = os.environ | own | environment

    def __call__(self, *arguments: object, code: int = 0) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "gptoss_launch.launch", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: object) -> dict[str, Any]:
        return json.loads(self(*arguments, "--json").stdout)

    def status(self, job: object) -> dict[str, Any]:
        return self.json("jobs", "status", job)

    def until(self, job: object, reached: Callable[[dict[str, Any]], bool], limit_s: float = 90) -> dict[str, Any]:
        """The first status that `reached` takes."""
        deadline_s = time.monotonic() + limit_s
        while not reached(status := self.status(job)):
            assert time.monotonic() < deadline_s, f"{status}\n{self('jobs', 'logs', job).stdout}"
            time.sleep(0.5)
        return status


class InProcess(CommandLine):
    """The same within this process, which takes milliseconds."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object, code: int = 0) -> "subprocess.CompletedProcess[str]":
        words = [*map(str, arguments)]
        ended = run(words)
        out, err = self._capsys.readouterr()
        assert ended == code, f"{arguments}: {ended}\n{out}\n{err}"
        return subprocess.CompletedProcess(words, ended, out, err)


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Runs in tmp_path, with no programs on the PATH but those in its bin/."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"PATH": "bin", "XDG_STATE_HOME": "state", "XDG_CONFIG_HOME": "config"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    return InProcess(capsys)


@pytest.fixture(scope="module", params=["cgroup", "linuxproc"])
def cluster(request: pytest.FixtureRequest, skip_or_fail: Callable[[str], NoReturn]) -> Iterator[Cluster]:
    """A real two-node Slurm, once with each proctrack plugin."""
    with brought_up(Cluster(CLUSTER_ROOT, request.param), skip_or_fail) as made:
        yield made


@contextmanager
def brought_up(made: Cluster, skip_or_fail: Callable[[str], NoReturn]) -> Iterator[Cluster]:
    """The cluster, for as long as the block; skips where there can be none."""
    if os.geteuid() != 0:
        pytest.skip("a real Slurm needs root, for network namespaces")
    if made.proctrack == "cgroup" and not os.access(FREEZER, os.W_OK):
        pytest.skip("proctrack/cgroup needs a writable cgroup v1 freezer")
    try:
        install()
    except ClusterError as error:
        skip_or_fail(str(error))
    made.down()  # what a run that was killed has left
    try:
        made.up()
        yield made
    finally:
        made.down()

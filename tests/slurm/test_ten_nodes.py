"""Ten nodes: ranks are in Slurm's order, which is not that of names, and all find the first of them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from slurm_cluster import Cluster

from .conftest import CLUSTER_ROOT, FAKE_PYTHON, CommandLine, brought_up

TEN = {f"node{number}": f"203.0.113.{10 + number}" for number in range(1, 11)}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_follow_slurm(tmp_path: Path, skip_or_fail: Callable[[str], NoReturn]) -> None:
    """node10 is the last one, though by name it is the second."""
    with brought_up(Cluster(CLUSTER_ROOT, "linuxproc", TEN), skip_or_fail) as cluster:
        cli = CommandLine(tmp_path, cluster.environment)
        settings = [f"run.python={FAKE_PYTHON}", f"env.TEST_PYTHON={sys.executable}", "slurm.nodes=10"]
        words = [word for one in settings for word in ("--set", one)]
        said = cli("submit", "preflight", *words, "--wait", "--follow").stderr
    ranks = sorted(TEN, key=lambda name: int(name.removeprefix("node")))
    for rank, name in enumerate(ranks):
        (line,) = [line for line in said.splitlines() if f"[rank {rank}] looked at {name} " in line]
        assert f"--nnodes 10 --head {TEN['node1']}:" in line
        assert line.endswith(f" --node-rank {rank}") or rank == 0

"""`doctor` on several nodes: each fault is told to the node that has it, and to the first one. Nodes are tasks here."""

import asyncio
import dataclasses
import json
import socket
from pathlib import Path

import pytest
from gptoss_launch.launch.cli import run
from gptoss_launch.launch.doctor import equal_on_all_nodes
from gptoss_launch.launch.node_reports import Check, Report, compare, with_other_nodes
from gptoss_launch.launch.nodes import Nodes

from .test_doctor import H100, HEALTHY

KEY = b"k" * 32
EQUAL = equal_on_all_nodes(HEALTHY)
FINE = Check("disk", "100 GiB", "1 GiB", True, "")
HOST = socket.gethostname()


def nodes(count: int) -> list[Nodes]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    return [Nodes(count, rank, "127.0.0.1", port, KEY) for rank in range(count)]


def together(
    views: list[Nodes], checks: dict[int, Check] | None = None, equal: dict[int, dict[str, str]] | None = None
) -> list[list[Check]]:
    """What each node's doctor says."""

    async def story() -> list[list[Check]]:
        doctors = []
        for view in views:
            seen = [(checks or {}).get(view.rank, FINE)], (equal or {}).get(view.rank, EQUAL)
            doctors.append(with_other_nodes(view, lambda seen=seen: seen, limit_s=0.5))
        return await asyncio.gather(*doctors)

    return asyncio.run(story())


def bad(checks: list[Check]) -> list[tuple[str, str]]:
    assert all(check.hint and check.wanted for check in checks if not check.ok)
    return [(check.name, check.found) for check in checks if not check.ok]


def test_all_is_well() -> None:
    first, *others = together(nodes(3))
    assert [check.name for check in first] == ["disk", "versions on all nodes", "node 1", "node 2"]
    assert all([check.name for check in other] == ["disk", "head", "versions on all nodes"] for other in others)
    assert not any(map(bad, (first, *others)))


def test_a_fault_of_one_node() -> None:
    full = dataclasses.replace(FINE, found="0 B", ok=False, hint="make room")
    first, second, third = together(nodes(3), {2: full})
    assert bad(first) == [("node 2", f"{HOST}: disk")] and bad(second) == [] and bad(third) == [("disk", "0 B")]
    (check,) = [check for check in first if not check.ok]
    assert f"--exclude={HOST}" in check.hint


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_another_version_on_one_of_three(odd: int) -> None:
    said = together(nodes(3), equal={odd: EQUAL | {"torch": "2.12.0", "driver": "535.183"}})
    names = "torch on all nodes, driver on all nodes"
    for rank, checks in enumerate(said):
        wanted = [("torch on all nodes", "2.12.0"), ("driver on all nodes", "535.183")] if rank == odd else []
        assert bad(checks) == wanted + ([(f"node {odd}", f"{HOST}: {names}")] if rank == 0 and odd else [])
    (check, _) = [check for check in said[odd] if check.name.endswith("on all nodes")]
    assert check.wanted == "2.11.0, as 2 of 3 nodes have"


def test_of_two_the_first_is_right() -> None:
    reports = {rank: Report(rank, f"host-{rank}", EQUAL | {"torch": f"2.1{rank}"}, ()) for rank in range(2)}
    verdicts = compare(reports)
    assert [check.ok for check in verdicts[0]] == [True]
    assert [(check.found, check.wanted) for check in verdicts[1]] == [("2.11", "2.10, as 1 of 2 nodes have")]
    fewer = {**reports, 1: dataclasses.replace(reports[1], equal={})}
    assert {check.found for check in compare(fewer)[1]} == {"nothing"}


def test_gpus_are_compared() -> None:
    eight = dataclasses.replace(HEALTHY, gpus=(H100,) * 8)
    assert equal_on_all_nodes(eight)["GPUs"] == "8 x NVIDIA H100 80GB HBM3"
    assert equal_on_all_nodes(HEALTHY)["GPUs"] == "1 x NVIDIA H100 80GB HBM3"


def test_a_head_that_is_not_reached() -> None:
    _, second = nodes(2)
    ((name, found),) = bad(together([second])[0])
    assert name == "head" and found


def test_a_node_that_does_not_report() -> None:
    first, second, _ = nodes(3)
    checks, other = together([first, second])
    assert bad(checks) == [("node 2", "no report in 0.5 s")] and bad(other) == []


def test_another_key_and_a_rank_that_is_there_already() -> None:
    first, second = nodes(2)
    _, other = together([first, dataclasses.replace(second, key=b"o" * 32)])
    assert bad(other) == [("head", "its node key is another one")]
    first, second, third = nodes(3)
    checks, *others = together([first, second, second, third])
    assert sorted(map(bad, others)) == [[], [], [("node rank", "node 1 is there already")]] and bad(checks) == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_bytes(KEY)
    flags = ["--nnodes", "2", "--node-key-file", str(key)]
    assert run(["doctor", *flags, "--head", "127.0.0.1"]) == 2
    assert "where no other node reaches it" in capsys.readouterr().err
    assert run(["doctor", *flags]) == 2 and "--nnodes 2 needs --head" in capsys.readouterr().err
    assert run(["doctor", *flags, "--head", "192.0.2.1"]) == 2
    assert "--head is an address of this node" in capsys.readouterr().err
    code = run(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert code == (0 if answer["ok"] else 4) and set(answer["checks"][0]) == {"name", "found", "wanted", "ok", "hint"}

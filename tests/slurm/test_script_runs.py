"""The batch script itself, run by bash with a stand-in for srun: what it makes of how ranks ended, and of containers.

Signals and several nodes are for test_real_slurm.py.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gptoss_launch.launch.slurm_script import render_script
from gptoss_launch.launch.slurm_settings import make_job

from .test_submit import program

SLURM = {
    **{"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost"},
    **{"SLURMD_NODENAME": "localhost", "SLURM_RESTART_COUNT": "0"},
}


def run_script(
    tmp_path: Path, srun: str, *, kind: Any = "finetune", scontrol: str = "true", nodes: int = 1, **run: str
) -> tuple[int, list[dict[str, Any]], str]:
    """(exit code, states, standard error). srun, scontrol: what stands in for them, in bash."""
    program(tmp_path, "srun", srun)
    program(tmp_path, "scontrol", scontrol)
    program(tmp_path, "sleep", "exit 0")
    payload = {"finetune": {"config": "tiny"}, "preflight": {}, "serve": {"model": "tiny"}}[kind]
    job = make_job(kind, [{"run": {"python": "/no/python", **payload, **run}}])
    environment = {**SLURM, "SLURM_NNODES": str(nodes), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", render_script(job, str(tmp_path / "run"), "0")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    states = [json.loads(line) for line in (tmp_path / "run" / "state.jsonl").read_text().splitlines()]
    return done.returncode, states, done.stderr


def ends(*ranks: tuple[float, int], code: int = 1) -> str:
    """An srun whose ranks ended so: (when, code) each, by rank."""
    lines = ['mkdir -p "$logs/node0-a"']
    lines += [f'echo "{100 + at} {one} a" >"$logs/node0-a/rank{rank}.exit"' for rank, (at, one) in enumerate(ranks)]
    return "\n".join([*lines, f"exit {code}"])


PREEMPTED = """[ "$1" = requeue ] && echo "$@" >requeued || echo PreemptTime=2026-01-01"""


@pytest.mark.parametrize(
    ("ranks", "srun_code", "code", "state", "reason"),
    [
        ([(1, 0), (2, 0)], 0, 0, "COMPLETED", "every rank ended well"),
        ([(2, 17), (1, 143)], 1, 17, "FAILED", "rank 0 on a ended with 17"),
        ([(2, 3), (1, 17)], 1, 17, "FAILED", "rank 1 on a ended with 17"),
        ([(1, 75), (2, 137)], 1, 137, "FAILED", "rank 1 on a ended with 137"),
        ([(1, 75), (2, 17)], 1, 17, "FAILED", "rank 1 on a ended with 17"),
        ([(1, 75), (2, 75)], 0, 75, "STOPPED", "stopped, and can go on (by a signal)"),
        ([], 137, 137, "FAILED", "srun ended with 137, and no rank said why"),
    ],
)
def test_how_a_job_ended(
    tmp_path: Path, ranks: list[tuple[float, int]], srun_code: int, code: int, state: str, reason: str
) -> None:
    ended, states, err = run_script(tmp_path, ends(*ranks, code=srun_code))
    assert [one["state"] for one in states] == ["RUNNING", state]
    assert (ended, states[-1]["code"], states[-1]["reason"]) == (code, code, reason)
    assert f"gptoss-launch: {state} ({reason}), exit code {code}" in err


def test_requeues_have_a_bound(tmp_path: Path) -> None:
    """A preempted job goes back as often as max_requeues says, counted over attempts."""
    for attempt in range(3):
        ended, states, _ = run_script(tmp_path, ends((1, 75), (2, 143)), scontrol=PREEMPTED, max_requeues="2")
        requeued = [one["reason"] for one in states if one["state"] == "REQUEUED"]
        assert ended == 75 and requeued == ["preempted"] * min(attempt + 1, 2)
        assert (tmp_path / "requeued").exists() is (attempt < 2)
        (tmp_path / "requeued").unlink(missing_ok=True)
    assert states[-1]["reason"] == "stopped (preempted), and can go on; requeued 2 of 2 times"


def test_pyxis_takes_the_whole_task(tmp_path: Path) -> None:
    srun = """[ "$1" = --help ] && echo "  --container-image=..." || printf '%s\\n' "$@" >words"""
    run_script(tmp_path, srun, container_image="nvcr.io#a/b:1", container_mounts="/data:/data")
    words = (tmp_path / "words").read_text().splitlines()
    assert "--container-image=nvcr.io#a/b:1" in words
    assert f"--container-mounts={tmp_path}/run:{tmp_path}/run,/data:/data" in words
    assert words[-3:] == ["bash", f"{tmp_path}/run/logs/attempt_0/node.sh", "on_node"]
    assert "enter=()" in (tmp_path / "run/logs/attempt_0/node.sh").read_text()


def test_preflight_names_the_nodes_to_leave_out(tmp_path: Path) -> None:
    ended, _, err = run_script(tmp_path, ends((1, 0), (2, 4), code=0), kind="preflight")
    assert ended == 4 and "not fit: a; submit with --exclude=a" in err


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"a": (4, "BAD  node 1  b: driver"), "b": (4, "BAD  driver  none")}, "b"),
        ({"a": (4, "BAD  node 1  b: driver\nBAD  open files  9"), "b": (4, "BAD  driver  none")}, "a,b"),
        ({"a": (4, "BAD  node 1  no report in 60 s"), "b": (None, "")}, "b"),
        ({"a": (1, "BAD  node 1  b: driver"), "b": (0, "ok   driver")}, "a"),
    ],
)
def test_preflight_tells_a_nodes_own_faults_from_others(
    tmp_path: Path, said: dict[str, tuple[int | None, str]], named: str
) -> None:
    lines = []
    for rank, (host, (code, words)) in enumerate(said.items()):
        folder = f'"$logs/node{rank}-{host}"'
        lines += [f"mkdir -p {folder}", f"printf '%s\n' '{words}' >{folder}/rank{rank}.out"]
        lines += [] if code is None else [f'echo "1 {code} {host}" >{folder}/rank{rank}.exit']
    _, _, err = run_script(tmp_path, "\n".join(lines), kind="preflight")
    assert f"not fit: {named}; submit with --exclude={named}\n" in err


def test_a_node_runs_its_rank(tmp_path: Path) -> None:
    """The functions as a node gets them: output in files and in the job's, the code kept."""
    shim = tmp_path / "python"
    shim.write_text('#!/bin/bash\necho "words: $*"; echo wrong >&2; exit 7\n')
    shim.chmod(0o755)
    srun = 'while [ "$1" != bash ]; do shift; done; exec "$@"'
    ended, states, _ = run_script(tmp_path, srun, kind="serve", python=str(shim), port="8123", host="127.0.0.1")
    assert ended == 7 and states[-1]["reason"] == "rank 0 on localhost ended with 7"
    node = tmp_path / "run/logs/latest/node0-localhost"
    words = "words: -m gptoss_launch.launch serve tiny --host 127.0.0.1 --port 8123\n"
    assert (node / "rank0.out").read_text() == words and (node / "rank0.err").read_text() == "wrong\n"
    assert f"[rank 0] {words}" in (tmp_path / "run/logs/latest/all.log").read_text()
    place = json.loads((tmp_path / "run/endpoint.json").read_text())
    assert place == {"node": "localhost", "address": "127.0.0.1", "port": 8123}


def test_nodes_that_serve_together(tmp_path: Path) -> None:
    """The first has the port; another one joins it, again when it was killed, and until there is something to be put
    right. Their key is in a file of the run alone, and gone in the end."""
    program(tmp_path, "getent", "echo 192.0.2.1 STREAM a")
    shim = tmp_path / "python"
    shim.write_text(
        f"""#!/bin/bash
echo "words: $*" >>'{tmp_path}/words'
cp -p '{tmp_path}/run/node.key' '{tmp_path}/key'
[ "$SLURM_NODEID" = 0 ] && exit 0
case $(grep -c node-rank '{tmp_path}/words') in 1) exit 7 ;; 2) kill -9 $$ ;; *) exit 2 ;; esac
"""
    )
    shim.chmod(0o755)
    srun = """while [ "$1" != bash ]; do shift; done
SLURM_NODEID=0 SLURMD_NODENAME=a "$@" && SLURM_NODEID=1 SLURMD_NODENAME=b "$@" """
    ended, states, _ = run_script(tmp_path, srun, kind="serve", nodes=2, python=str(shim))
    assert ended == 2 and states[-1]["reason"] == "rank 1 on b ended with 2"
    common = f"--nnodes 2 --head 192.0.2.1:10007 --node-key-file {tmp_path}/run/node.key"
    serve = f"words: -m gptoss_launch.launch serve tiny --host 192.0.2.1 --port 20007 {common}"
    assert (tmp_path / "words").read_text().splitlines() == [serve, *[f"{serve} --node-rank 1"] * 3]
    key = tmp_path / "key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_bytes()) > 40
    assert not (tmp_path / "run/node.key").exists()
    said = (tmp_path / "run/logs/latest/node1-b/rank1.err").read_text()
    assert "node 1 ended with 7, and joins again in 1 s" in said and "ended with 137, and joins again in 2 s" in said

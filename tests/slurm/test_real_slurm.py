"""Jobs on a real two-node Slurm without accounting, under both proctrack plugins: how they end, and what is said of it.

payload.py stands in for the model; torchrun, signals, exit codes and the queue are real.
"""

import json
import os
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from slurm_cluster import GPUS, NODES, Cluster
from small_models import checkpoint

from .conftest import FAKE_PYTHON, CommandLine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

FIRST, SECOND = NODES  # in Slurm's order, which is not that of names


@pytest.fixture
def cli(cluster: Cluster, tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path, cluster.environment)


@pytest.fixture
def submit(cli: CommandLine, tmp_path: Path) -> Callable[..., int]:
    """submit(kind, {slurm}, {run}, *flags) -> the job's id."""

    def submit(kind: str, slurm: dict[str, Any], run: dict[str, Any], *flags: str) -> int:
        env = {"TEST_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        config = {"slurm": {"time": "5", **slurm}, "env": env, "run": {"python": str(FAKE_PYTHON), **run}}
        path = tmp_path / f"{kind}.yaml"
        path.write_text(json.dumps(config))
        done = cli("submit", kind, "--config", path, *flags)
        assert done.stdout.strip().isdigit() and done.stdout.count("\n") == 1
        return int(done.stdout)

    return submit


def training(folder: Path, **words: object) -> dict[str, Any]:
    (folder / "saved").mkdir()
    return {"config": "tiny", "set": {"saved": str(folder / "saved"), **{key: str(one) for key, one in words.items()}}}


def lines_of(cli: CommandLine, job: int, *flags: str) -> list[str]:
    return cli("jobs", "logs", job, *flags).stdout.splitlines()


def test_a_rank_that_exits_17(cli: CommandLine, submit: Callable[..., int], tmp_path: Path) -> None:
    """Its code, and not torchrun's or srun's, is the job's; the node and the rank are named; ranks follow Slurm."""
    job = submit("finetune", {"nodes": 2}, training(tmp_path, steps=200, fail="1:17") | {"interface": "eth0"})
    status = cli.until(job, lambda status: status["ended"])
    assert (status["state"], status["code"], status["source"]) == ("FAILED", 17, "scontrol")
    failure = status["failure"]
    assert (failure["rank"], failure["node"], failure["host"], failure["code"]) == (1, 1, SECOND, 17)
    assert f"rank 1 on {SECOND} (node 1) with 17" in cli("jobs", "status", job).stdout
    assert lines_of(cli, job, "--rank", "1") == [
        *("begins at step 0 of 200 world 2", "has made a step", "a warning", "breaks")
    ]
    assert lines_of(cli, job, "--node", FIRST)[0] == "begins at step 0 of 200 world 2"
    assert lines_of(cli, job, "--errors", "--node", "1") == ["a warning", "breaks"]
    assert "[rank 1] breaks" in cli("jobs", "logs", job).stdout
    # The same when Slurm has forgotten it, and from the folder alone.
    gone = CommandLine(cli.folder, {"PATH": str(tmp_path / "nothing")})
    forgotten = gone.status(status["folder"])
    assert (forgotten["state"], forgotten["code"], forgotten["source"]) == ("FAILED", 17, "state.jsonl")
    assert forgotten["failure"] == failure


def test_usr1_ahead_of_the_limit(
    cli: CommandLine, submit: Callable[..., int], cluster: Cluster, tmp_path: Path
) -> None:
    """All ranks save, the job goes back into the queue, and ends from where it was."""
    job = submit("finetune", {"nodes": 2}, training(tmp_path, steps=20, step_s=0.4))
    wait_for_lines(cli, job, "has made a step", 2)
    assert cluster.slurm("scancel", "--signal=USR1", "--batch", str(job)).returncode == 0
    status = cli.until(job, lambda status: status["ended"])
    assert (status["state"], status["code"], status["attempt"]) == ("COMPLETED", 0, 1)
    log = cli("jobs", "logs", job).stdout
    for rank in (0, 1):
        assert log.count(f"[rank {rank}] saved step ") == 1, "once, though linuxproc signals the whole tree"
        step = int(log.split(f"[rank {rank}] saved step ")[1].split()[0])
        assert 0 < step < 20 and f"[rank {rank}] begins at step {step} of 20" in log
        assert f"[rank {rank}] ends at step 20" in log
    assert [one["state"] for one in states(status)] == ["SUBMITTED", "RUNNING", "REQUEUED", "RUNNING", "COMPLETED"]


def test_a_finetune_that_is_requeued_loses_nothing(
    cli: CommandLine, submit: Callable[..., int], cluster: Cluster, tmp_path: Path
) -> None:
    """Nothing fake: two nodes train, are told to stop, come back, and end with the losses of a run without a stop."""
    if cluster.proctrack == "linuxproc":
        pytest.skip("who gets the signal is shown above; cgroup is what clusters have")
    model, steps = checkpoint("three_blocks", tmp_path), 10
    words = {"model": str(model), "steps": str(steps), "packs_per_step": "2", "sequence_tokens": "256"}
    words |= {"skip_bad_records": "true", "save_every": "0", "first_loss": "ignore"}

    def losses(run: Path) -> list[float]:
        path = run / "metrics.jsonl"
        return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []

    run = {"python": sys.executable, "config": "tiny", "set": words | {"run": str(tmp_path / "trained")}}
    job = submit("finetune", {"nodes": 2}, run)
    cli.until(job, lambda _: len(losses(tmp_path / "trained")) >= 2)
    assert cluster.slurm("scancel", "--signal=USR1", "--batch", str(job)).returncode == 0
    whole = [f"{key}={value}" for key, value in words.items()]
    cli("finetune", "--config", "tiny", *whole, f"run={tmp_path / 'whole'}")  # while the job waits to be back
    status = cli.until(job, lambda status: status["ended"])
    assert (status["state"], status["code"], status["attempt"]) == ("COMPLETED", 0, 1)
    assert re.search(r"going on after step \d+ of 10", cli("jobs", "logs", job).stdout)
    found, wanted = losses(tmp_path / "trained"), losses(tmp_path / "whole")
    assert len(found) == steps and found == pytest.approx(wanted, rel=1e-5), (found, wanted)


def test_the_time_limit_itself(cli: CommandLine, submit: Callable[..., int], cluster: Cluster, tmp_path: Path) -> None:
    """Slurm's own signal, by --signal, and a bound of 0 requeues: stopped, 75, and `requeue` is what is left to do."""
    if cluster.proctrack == "linuxproc":
        pytest.skip("the signal is Slurm's own in the same way; once is enough")
    run = training(tmp_path, steps=900) | {"lead_s": "45", "max_requeues": "0", "ranks_per_node": "2"}
    job = submit("finetune", {"nodes": 1, "time": "1"}, run)
    status = cli.until(job, lambda status: status["ended"])
    assert (status["state"], status["code"], status["failure"]) == ("STOPPED", 75, None)
    assert states(status)[-1]["reason"] == "stopped (limit), and can go on; requeued 0 of 0 times"
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["rank0", "rank1"]


def test_preemption_requeues(cli: CommandLine, submit: Callable[..., int], cluster: Cluster, tmp_path: Path) -> None:
    job = submit(
        "finetune", {"nodes": 2, "partition": "spot", "exclusive": "true"}, training(tmp_path, steps=20, step_s=0.4)
    )
    wait_for_lines(cli, job, "has made a step", 2)
    urgent = cluster.slurm("sbatch", "--parsable", "-N2", "--exclusive", "-o/dev/null", "--wrap", "sleep 2").stdout
    status = cli.until(job, lambda status: status["ended"])
    assert (status["state"], status["code"], status["attempt"]) == ("COMPLETED", 0, 1), urgent
    requeued = [one["reason"] for one in states(status) if one["state"] == "REQUEUED"]
    assert requeued == ["preempted"]
    assert cli("jobs", "logs", job).stdout.count("saved step ") == 2


def test_a_serve_job(cli: CommandLine, submit: Callable[..., int], tmp_path: Path) -> None:
    """endpoint, exec, logs -f, a graceful cancel, requeue and cancel."""
    job = submit("serve", {"gpus-per-node": GPUS}, {"model": "tiny"})
    place = cli.json("jobs", "endpoint", job, "--wait-s", "60")
    assert place["health"] == "ready" and place["node"] == FIRST
    assert place["url"] == f"http://{NODES[FIRST]}:{20000 + job % 10000}/v1"
    assert place["ssh"].startswith(f"ssh -N -L {20000 + job % 10000}:{NODES[FIRST]}:{20000 + job % 10000} ")
    with urllib.request.urlopen(place["url"].removesuffix("/v1") + "/health", timeout=5) as response:
        assert response.status == 200
    ran = cli("jobs", "exec", job, "--", "bash", "-c", "hostname; exit 3", code=3)
    assert ran.stdout == f"{FIRST}\n"
    assert json.loads(cli("jobs", "exec", "--json", job, "--", "hostname").stdout)["stdout"] == f"{FIRST}\n"
    assert cli.json("jobs", "cancel", job, "--graceful") == {"job": job, "was": "RUNNING", "graceful": True}
    followed = cli("jobs", "logs", "-f", job).stdout
    assert "[rank 0] drained" in followed and "STOPPED" in followed
    status = cli.status(job)
    assert (status["state"], status["code"]) == ("STOPPED", 75)
    assert cli.json("jobs", "requeue", job)["was"] == "STOPPED"
    cli.until(job, lambda status: status["state"] == "RUNNING")
    assert cli.json("jobs", "endpoint", job, "--wait-s", "60")["health"] == "ready"
    cli("jobs", "cancel", job)
    status = cli.until(job, lambda status: status["ended"])
    assert status["state"] == "CANCELLED" and status["attempt"] == 1
    cli("jobs", "endpoint", job, code=2)


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """(HTTP status, the answer's JSON)."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url.removesuffix("/v1") + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def wait_until(found: Callable[[], bool], limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not found():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_two_nodes_serve_together(cli: CommandLine, submit: Callable[..., int], cluster: Cluster) -> None:
    """Nothing fake: tiny on both nodes behind the first one's port. Under load everything of ours on the second is
    killed, or its cable is pulled, and it comes back; a graceful cancel lets both end."""
    killed = cluster.proctrack == "cgroup"
    run = {"model": "tiny", "gpu_memory": "0", "context": "2048", "python": sys.executable}
    job = submit("serve", {"nodes": 2}, run)
    place = cli.json("jobs", "endpoint", job, "--wait-s", "100")
    assert (place["health"], place["node"]) == ("ready", FIRST), cli("jobs", "logs", job).stdout
    url = place["url"]
    assert ask(url, "/ready") == (200, {"ready_replicas": 2, "replicas": 2})
    hello = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
    enough = Event()

    def keep_asking() -> list[int]:
        codes = []
        while not enough.is_set():
            codes.append(ask(url, "/v1/chat/completions", hello | {"max_tokens": 200})[0])
        return codes

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(keep_asking) for _ in range(4)]
        try:
            time.sleep(2)
            if killed:
                for pid in cluster.processes(SECOND, "gptoss_launch.launch", "gptoss_launch.parallel"):
                    os.kill(pid, signal.SIGKILL)
            else:
                cluster.plug(SECOND, out=True)
            wait_until(lambda: ask(url, "/health") == (503, {"ok": False, "dead_replicas": 1, "replicas": 2}))
            assert ask(url, "/v1/chat/completions", hello | {"max_tokens": 4})[0] == 200
        finally:
            enough.set()
            cluster.plug(SECOND, out=False)
    codes = [code for one in asking for code in one.result()]
    assert set(codes) <= {200, 503} and codes.count(503) <= 4 < codes.count(200), codes  # what had begun there is lost
    wait_until(lambda: ask(url, "/ready")[0] == 200 and ask(url, "/health")[0] == 200)
    assert ask(url, "/v1/chat/completions", hello | {"max_tokens": 4})[0] == 200
    # A replica's connection may be back before its node's own.
    joined = f"node 1 ({SECOND}) has joined: replica 1"
    wait_until(lambda: cli("jobs", "logs", job).stdout.count(joined) == 2)
    log = cli("jobs", "logs", job).stdout
    assert f"node 1 ({SECOND}) is lost" in log
    if not killed:
        wait_until(lambda: "is there again" in cli("jobs", "logs", "--errors", "--node", "1", job).stdout)
    errors = cli("jobs", "logs", "--errors", "--node", "1", job).stdout
    assert ("node 1 ended with 137, and joins again in 1 s" if killed else "is there again") in errors
    status = cli.status(job)
    key = (Path(status["folder"]) / "node.key").read_text().strip()
    assert key not in log + (Path(status["folder"]) / "script.sbatch").read_text()
    cli("jobs", "cancel", job, "--graceful")
    followed = cli("jobs", "logs", "-f", job).stdout
    assert "STOPPED" in followed and "Traceback" not in followed
    status = cli.status(job)
    assert (status["state"], status["code"], status["failure"]) == ("STOPPED", 75, None)


def test_a_replica_lies_on_two_nodes(cli: CommandLine, submit: Callable[..., int], cluster: Cluster) -> None:
    """Nothing fake: one rank of tiny on each node, and an answer through the first one's address. When the second
    node's rank is killed, the job ends, and says which one it was."""
    if cluster.proctrack == "cgroup":
        pytest.skip("where signals go makes no difference here; once is enough")
    run = {"model": "tiny", "gpu_memory": "0", "context": "2048", "dp": "1", "ranks": "2", "python": sys.executable}
    job = submit("serve", {"nodes": 2}, run)
    place = cli.json("jobs", "endpoint", job, "--wait-s", "100")
    assert place["health"] == "ready", cli("jobs", "logs", job).stdout
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert ask(place["url"], "/v1/chat/completions", body)[1]["usage"]["completion_tokens"] == 4
    torchrun, rank = sorted(cluster.processes(SECOND, "gptoss_launch.parallel.engine.worker"))
    os.kill(rank, signal.SIGKILL)
    status = cli.until(job, lambda status: status["ended"])
    assert (status["state"], status["code"], status["failure"]["code"]) == ("FAILED", 7, 7)
    assert f"rank 1 on {SECOND} died while serving" in cli("jobs", "logs", "--errors", "--node", "0", job).stdout


def test_wait_gives_the_jobs_own_code(cli: CommandLine, submit: Callable[..., int], tmp_path: Path) -> None:
    config = tmp_path / "looks.yaml"
    run = {"python": str(FAKE_PYTHON), "model": "tiny"}
    config.write_text(
        json.dumps({"slurm": {"nodes": 2, "time": "5"}, "env": {"TEST_PYTHON": sys.executable}, "run": run})
    )
    done = cli("submit", "preflight", "--config", config, "--wait", "--follow")
    assert done.stdout.strip().isdigit()
    assert "[rank 0] looked at node2 tiny" in done.stderr and "[rank 1] looked at node10 tiny" in done.stderr
    # A payload that cannot be started: 127 of the shell on the node.
    cli("submit", "preflight", "--config", config, "--wait", "--set", "run.python=/nowhere/python", code=127)
    late = cli("submit", "preflight", "--config", config, "--wait", "--timeout-s", "0", "--hold", code=124)
    held = cli.status(late.stdout.strip())
    assert held["state"] == "PENDING" and "held" in held["reason"]
    cli("jobs", "cancel", held["job"])


def test_preflight_finds_the_bad_node(cli: CommandLine, cluster: Cluster, tmp_path: Path) -> None:
    """Nothing fake but the faults: a low limit, and another version of a package, on the second node."""
    if cluster.proctrack == "cgroup":
        pytest.skip("no signals in it: once is enough")
    other = tmp_path / "other" / "tokenizers-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenizers\nVersion: 9.9\n")
    setup = tmp_path / "setup.sh"
    setup.write_text(
        f"""[ "$SLURMD_NODENAME" = {FIRST} ] && return
ulimit -n 256
export PYTHONPATH={other.parent}:${{PYTHONPATH:-}}
"""
    )
    flags = [
        f"run.python={sys.executable}",
        "run.model=tiny",
        "slurm.nodes=2",
        f"run.setup={setup}",
        "run.measure=false",
    ]
    done = cli("submit", "preflight", *[w for one in flags for w in ("--set", one)], "--wait", "--follow", code=4)
    lines = done.stderr.splitlines()
    assert f"gptoss-launch: not fit: {SECOND}; submit with --exclude={SECOND}" in lines
    found = [line for line in lines if "BAD  " in line]
    said = [line.split("BAD  ")[1].split("  ")[0] for line in found if "[rank 1]" in line]
    assert said == ["open files", "tokenizers on all nodes"], found
    assert any("[rank 0]" in line and f"{SECOND}: open files, tokenizers on all nodes" in line for line in found)
    assert any("[rank 1] ok   head" in line and "answers in" in line for line in lines)


def test_a_script_is_usable_by_hand(cli: CommandLine, cluster: Cluster, tmp_path: Path) -> None:
    flags = ["--set", f"run.python={FAKE_PYTHON}", "--set", f"env.TEST_PYTHON={sys.executable}", "-N2"]
    script = tmp_path / "by hand.sbatch"
    script.write_text(cli("submit", "preflight", *flags, "--set", "run.folder=a run", "--render").stdout)
    done = cluster.slurm("sbatch", "--parsable", f"--chdir={tmp_path}", str(script))
    status = cli.until(tmp_path / "a run", lambda status: status["ended"]) if wait_for(tmp_path / "a run") else {}
    assert (status["job"], status["state"], status["code"]) == (int(done.stdout), "COMPLETED", 0)


@pytest.mark.parametrize(
    ("interface", "words"),
    [("lo", "calls itself 127.0.0.1, where no other node"), ("nope0", "no IPv4 address on nope0")],
)
def test_a_head_that_others_cannot_reach(cli: CommandLine, tmp_path: Path, interface: str, words: str) -> None:
    training = tmp_path / "training.yaml"
    training.write_text(f"model: tiny\ndata: {tmp_path}/data.jsonl\nrun: {tmp_path}/run\n")
    flags = ["--nodes", "2", "--set", f"run.config={training}", "--set", f"run.interface={interface}"]
    done = cli("submit", "finetune", *flags, "--wait", code=4)
    assert words in done.stderr


def test_apptainer(cli: CommandLine, tmp_path: Path) -> None:
    """In place of the program, one that shows its arguments and runs the command: where it is put is what is tested."""
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text("""#!/bin/bash\necho "apptainer $*"\nexec "${@:6}"\n""")
    program.chmod(0o755)
    cli.environment["PATH"] = f"{program.parent}:{cli.environment['PATH']}"
    settings = [f"run.python={FAKE_PYTHON}", f"env.TEST_PYTHON={sys.executable}", "run.folder=run"]
    settings += ["run.container_image=/my image.sif", "run.container_mounts=/data:/data"]
    done = cli("submit", "preflight", *[word for one in settings for word in ("--set", one)], "--wait", "--follow")
    inside = (
        f"apptainer exec --nv --bind {tmp_path}/run,/data:/data /my image.sif {FAKE_PYTHON} -m gptoss_launch.launch"
    )
    assert f"[rank 0] {inside} doctor --measure\n" in done.stderr and "[rank 0] looked at" in done.stderr
    cli.environment["PATH"] = cli.environment["PATH"].partition(":")[2]
    settings[2] = "run.folder=another"
    done = cli("submit", "preflight", *[word for one in settings for word in ("--set", one)], "--wait", code=4)
    assert "neither pyxis nor apptainer" in done.stderr


def test_c10d_on_request(cli: CommandLine, submit: Callable[..., int], cluster: Cluster, tmp_path: Path) -> None:
    if cluster.proctrack == "linuxproc":
        pytest.skip("no signals in it: once is enough")
    job = submit("finetune", {"nodes": 2}, training(tmp_path, steps=1) | {"rendezvous": "c10d"})
    assert cli.until(job, lambda status: status["ended"])["code"] == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--partition", "nowhere"], "invalid partition specified: nowhere"),
        (["--gpus-per-node", "99"], "Requested node configuration is not available"),
        (["--time", "soon"], "Invalid --time specification"),
    ],
)
def test_slurm_refuses(cli: CommandLine, tmp_path: Path, flags: list[str], words: str) -> None:
    """Its own words, exit 3, no folder left behind; the same from --dry-run."""
    for more in ([], ["--dry-run"]):
        done = cli("submit", "preflight", *flags, *more, code=3)
        assert words in done.stderr
    assert not list((tmp_path / "runs").glob("*"))


def test_more_nodes_than_there_are(cli: CommandLine) -> None:
    """sbatch would let it wait for ever; --dry-run says so."""
    assert (
        "Requested node configuration is not available" in cli("submit", "preflight", "-N3", "--dry-run", code=3).stderr
    )


def test_every_template_is_accepted(cli: CommandLine, tmp_path: Path) -> None:
    training = tmp_path / "training.yaml"
    training.write_text(f"model: tiny\ndata: {tmp_path}/data.jsonl\nrun: {tmp_path}/run\n")
    for kind, settings in (
        ("serve", ["run.model=tiny"]),
        ("finetune", [f"run.config={training}", "slurm.nodes=2"]),
        ("bench", ["run.what=decode", "run.target=tiny"]),
        ("preflight", ["slurm.nodes=2"]),
    ):
        flags = [word for setting in settings for word in ("--set", setting)]
        done = cli("submit", kind, *flags, "--gpus-per-node", GPUS, "--time", "1:00:00", "--dry-run")
        assert "to start at" in done.stderr and done.stdout.startswith("#!/bin/bash\n")


def test_hostile_option_values_arrive_as_they_were(cli: CommandLine, cluster: Cluster, tmp_path: Path) -> None:
    name = """a "b" \\ # c, $(id) 'x' `y` ü"""
    job = cli("submit", "preflight", "--hold", "--job-name", name).stdout.strip()
    shown = cluster.slurm("scontrol", "show", "job", job).stdout
    assert f"JobName={name}\n" in shown
    cli("jobs", "cancel", job)


def test_a_job_of_somebody_else(cli: CommandLine, cluster: Cluster) -> None:
    other = cluster.slurm("sbatch", "--parsable", "--hold", "-o/dev/null", "--wrap", "true").stdout.strip()
    for verb in ("status", "logs", "cancel", "requeue", "endpoint"):
        assert "is none of ours" in cli("jobs", verb, other, code=5).stderr
    cluster.slurm("scancel", other)
    assert "known neither to Slurm nor here" in cli("jobs", "cancel", "999999", code=5).stderr


def states(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(status["folder"]) / "state.jsonl").read_text().splitlines()]


def wait_for_lines(cli: CommandLine, job: int, words: str, count: int) -> None:
    cli.until(job, lambda _: cli("jobs", "logs", job).stdout.count(words) >= count)


def wait_for(path: Path) -> bool:
    deadline_s = time.monotonic() + 30
    while not (path / "state.jsonl").exists() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return path.exists()

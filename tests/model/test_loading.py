"""A rank's load takes its own slices and one tensor of host memory more, and asks the files for nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
from gptoss_launch.parallel.planning.memory import weights_bytes
from gptoss_launch.parallel.planning.shards import is_zero_here, local_bytes, table
from small_models import checkpoint, plain_plan
from thread_ranks import with_ranks

SLACK_BYTES = 12 << 20  # what the allocator and Python's own objects take on the way

# Anonymous memory alone: mapped files may stay in the page cache for as long as nobody else wants the room.
LOAD = """
import sys, threading, time
from pathlib import Path
import torch
from gptoss_launch.parallel.model.checkpoint import load
from gptoss_launch.parallel.planning.headers import read_inventory
from gptoss_launch.parallel.planning.plan import Plan

def anonymous_bytes():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

def watch():
    global most
    while True:
        most = max(most, anonymous_bytes())
        time.sleep(0.0005)

plan, rank = Plan.load(Path(sys.argv[1])), int(sys.argv[2])
inventory = read_inventory(Path(plan.checkpoint))
torch.ones(1 << 20).to(torch.bfloat16).sum()
before = most = anonymous_bytes()
threading.Thread(target=watch, daemon=True).start()
read = []
weights = load(plan, rank, inventory, torch.device("cpu"), lambda done, total: read.append(done))
time.sleep(0.05)
print(most - before, read[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("ranks", "ep"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])
def test_peak_host_memory(ranks: int, ep: int, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = checkpoint("true_width", tmp_path_factory.getbasetemp())
    plan = with_ranks(plain_plan(folder, "bf16"), ranks, ep)
    plan.save(tmp_path / "plan.json")
    rank = ranks - 1
    command = [sys.executable, "-c", LOAD, str(tmp_path / "plan.json"), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    most, read = map(int, done.stdout.split())
    own = weights_bytes(plan.spec, plan.mesh, rank, "bf16")
    rows = [row for row in table(plan.spec) if not is_zero_here(row, plan.mesh, rank)]
    largest = max(local_bytes(row, plan.mesh, rank) for row in rows)
    print(f"rank {rank} of {ranks}, ep {ep}: peak {most:,} bytes; its slices {own:,} and one tensor {largest:,}")
    assert read == sum(local_bytes(row, plan.mesh, rank) for row in rows)
    assert most <= own + largest + SLACK_BYTES

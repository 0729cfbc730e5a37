"""Host memory that runs out while a model is loaded: said in one line, with what would help. In a process of its own,
whose data the system limits; the plan counts on more."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_models import checkpoint, plain_plan

START = """
import resource, sys
from pathlib import Path
import torch
from gptoss_launch.parallel.engine.start import Options, start
from gptoss_launch.parallel.engine.trace import Trace
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning.plan import Plan

plan, more_bytes = Plan.load(Path(sys.argv[1])), int(sys.argv[2])
fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
limit = int(fields["VmData"].split()[0]) * 1024 + more_bytes
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    start(plan, 0, Options(), Trace(Path(sys.argv[3])), lambda done, total: None)
except UserError as error:
    print(error.message, "hint:", error.hint)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the data of a process")
def test_too_little_is_said(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    plain_plan(checkpoint("true_width", tmp_path_factory.getbasetemp())).save(tmp_path / "plan.json")
    command = [sys.executable, "-c", START, str(tmp_path / "plan.json"), str(64 << 20), str(tmp_path / "trace")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("no host memory is left after ") and "--host-memory SIZE" in done.stdout

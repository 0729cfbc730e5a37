"""A script's `main` as ranks of this machine, under torchrun, with the folder of these helpers on its path."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(ranks: int, script: str, *words: object, timeout_s: float) -> str:
    """What the ranks print. Fails with the end of what they say if one of them does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command += [script, *map(str, words)]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stdout

"""What Triton's compiler makes of the project's kernels, where its interpreter would run them."""

import os
import subprocess
import sys
from pathlib import Path


def lines_of(script: str, folder: Path) -> list[str]:
    """What `script` prints, in a process of its own that compiles with an empty cache, and no interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    file = folder / "compile.py"  # Triton reads the source of what it compiles, here that of the project
    file.write_text(script)
    run = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()

"""Writes tests/slurm/golden anew: python tests/slurm/write_golden.py. The diff is what a reviewer reads."""

import importlib.util
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("test_scripts", HERE / "test_scripts.py")
    assert spec is not None and spec.loader is not None
    scripts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scripts)
    scripts.GOLDEN.mkdir(exist_ok=True)
    for kind in scripts.KINDS:
        (scripts.GOLDEN / f"{kind}.sbatch").write_text(scripts.script_of(kind))

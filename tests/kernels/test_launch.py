"""Compiling kernels together: nothing runs meanwhile, and all are there afterwards, with what launches them. For sm_90,
which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
import triton
import triton.language as tl
from gptoss_launch.parallel.kernels.triton_launch import compiled_together
from triton.backends.compiler import GPUTarget

launched, linked = [], set()


class Utils:
    def load_binary(self, *arguments):
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}


class Launcher:
    def __init__(self, source, metadata):
        self.name = metadata.name
        linked.add(metadata.hash)

    def __call__(self, *arguments):
        launched.append(self.name)


class Driver:
    utils, launcher_cls = Utils(), Launcher
    get_current_device = get_current_stream = lambda *arguments: 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@triton.jit
def double(x, SIZE: tl.constexpr):
    at = x + tl.arange(0, SIZE)
    tl.store(at, tl.load(at) * 2)


@triton.jit
def wrong(x):
    tl.store(x, nowhere)


triton.runtime.driver.set_active(Driver())
run, compiled = triton.JITFunction.run, []
triton.knobs.compilation.listener = lambda **facts: compiled.append(facts["cache_hit"])
x = torch.zeros(64)
with compiled_together(2):
    for size in (16, 32, 16):
        double[(1,)](x, SIZE=size)
assert (launched, compiled, len(linked)) == ([], [False, False], 2), (launched, compiled, linked)
double[(1,)](x, SIZE=16)
assert (launched, len(compiled)) == (["double"], 2), (launched, compiled)
double.device_caches.clear()  # as in the next process
with compiled_together(2):
    for size in (16, 32, 16):
        double[(1,)](x, SIZE=size)
assert (launched, compiled[2:]) == (["double"], [True, True]), (launched, compiled)
try:
    with compiled_together(2):
        double[(1,)](x, SIZE=64)
        wrong[(1,)](x)
except triton.CompilationError:
    pass
else:
    raise AssertionError("a kernel that does not compile is passed over")
assert triton.JITFunction.run is run
"""


def test_kernels_are_compiled_together_and_run_later(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    subprocess.run([sys.executable, str(tmp_path / "script.py")], env=environment, check=True)

"""Steps under NVIDIA's compute-sanitizer: no kernel reads or writes what is not its own, no two threads of a block
race for shared memory.

Two layers in published widths, one of each kind, with few experts: prompts, then decodes of one and of three requests,
drawn in several ways and with log probabilities. Every tensor has an allocation of its own, so that one byte past its
end is found; graphs launch the same kernels and cannot be captured so.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forced
import pytest
import torch
import triton
import triton.language as tl
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.kernels.choose import triton_operations
from gptoss_launch.parallel.model.random_checkpoint import write_checkpoint
from gptoss_launch.parallel.planning.spec import alternating_kinds, read_config
from small_models import SPECS, TINY, plain_engine, plain_plan, prompt

SANITIZER = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
FOUND = 9  # exit status if there were errors
# Its kernels wait at barriers in shared memory for what the copy engine brings there, which racecheck does not see.
CUBLAS = re.compile(r"Race reported between \w+ access at nvjet_")
PLANTED = "planted"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = dataclasses.replace(SPECS["true_width"], layers=2, layer_kinds=alternating_kinds(2))
    out = tmp_path_factory.mktemp("sanitizer") / "two-layers"
    write_checkpoint(out, spec, TINY / "tokenizer.json", 0, torch.device("cuda"))
    done = run(folder=out)  # without the tool: what is compiled is kept
    assert done.stdout.endswith("12 tokens\n"), done.stderr[-3000:]
    return out


def run(*tool: str, folder: Path | str) -> subprocess.CompletedProcess[str]:
    path = [str(Path(forced.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*tool, sys.executable, __file__, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


def sanitized(tool: str, folder: Path | str) -> subprocess.CompletedProcess[str]:
    assert SANITIZER is not None
    options = ("--tool", tool, "--target-processes", "application-only", "--error-exitcode", str(FOUND))
    done = run(SANITIZER, *options, folder=folder)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device here")
    print(f"{tool}: exit status {done.returncode}\n{done.stdout[-3000:]}")
    return done


def test_a_planted_error_is_found() -> None:
    done = sanitized("memcheck", PLANTED)
    assert done.returncode == FOUND and "Invalid __global__ write" in done.stdout


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_error_is_found(tool: str, folder: Path) -> None:
    done = sanitized(tool, folder)
    found = [line for line in done.stdout.splitlines() if "========= Error" in line or "Program hit" in line]
    ours = [line for line in found if not CUBLAS.search(line)]
    assert done.returncode == (FOUND if found else 0) and not ours, done.stdout[:6000] + done.stderr[-3000:]
    assert "12 tokens" in done.stdout


def steps(folder: Path, device: str = "cuda") -> int:
    """How many tokens were drawn."""
    top_p, min_p = Sampling(temperature=0.5, top_p=0.9, seed=1), Sampling(min_p=0.05, presence=0.5, repetition=1.5)
    spec = read_config(folder / "config.json")
    asked = [
        Request(str(index), tuple(prompt(spec, 100 + 40 * index, seed=index)), 3, sampling, logprobs=3)
        for index, sampling in enumerate((Sampling(), top_p, min_p))
    ]
    plan = plain_plan(folder, "bf16", context_tokens=512, device=device)
    plan = dataclasses.replace(plan, kernels="triton", kv_tokens=4 * 512)
    engine = plain_engine(plan, triton_operations())
    return sum(len(given) for some in (asked[:1], asked) for given in forced.answers(engine, some).values())


@triton.jit
def _one_too_many(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), 1)


def planted() -> None:
    """A write past the end of an allocation."""
    x = torch.zeros(31, dtype=torch.int32, device="cuda")
    _one_too_many[1,](x, SIZE=32)
    torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1] == PLANTED:
        planted()
    else:
        print(f"{steps(Path(sys.argv[1]))} tokens")

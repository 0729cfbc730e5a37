"""The C++ products of a CPU against the plain ones in fp64, at every level of instructions that this CPU has."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.kernels import PLAIN, choose, cpu_build, cpu_products, linear
from gptoss_launch.parallel.kernels import experts as plain
from gptoss_launch.parallel.kernels.cpu_products import CpuExperts, CpuLinear, Threads, cpu_operations
from gptoss_launch.parallel.kernels.experts import Packed
from gptoss_launch.parallel.kernels.weight_only import narrowed
from small_models import TINY, plain_plan
from torch import Tensor

LIMIT = 7.0
FLAGS = cpu_build.cpu_flags()
LEVELS = [level.name for level in cpu_build.LEVELS if level.needs <= FLAGS]
BEST = LEVELS[0]
INT8_LEVELS = [name for name in LEVELS if name != "portable"]  # those products need AVX2

# tokens, hidden, inner, held, first, experts, chosen
CASES = {
    "one block": (1, 32, 32, 2, 0, 2, 1),
    "rows that end inside a step": (1, 96, 160, 3, 0, 3, 2),
    "several tokens, odd sizes": (7, 96, 160, 3, 0, 3, 2),
    "others' experts": (9, 64, 96, 4, 3, 16, 4),
    "no expert is here": (2, 64, 32, 2, 8, 8, 2),
    "an expert without tokens": (3, 224, 64, 12, 0, 12, 2),
    "a width of 20b": (3, 2880, 736, 2, 1, 4, 2),
}


@pytest.fixture(scope="session")
def threads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Threads]:
    """Of each level, two threads, so that work is shared also where there is one CPU."""
    cache = tmp_path_factory.mktemp("compiled")
    levels = [level for level in cpu_build.LEVELS if level.name in LEVELS]
    return {level.name: Threads(cpu_build.library(cpu_products.SOURCE, level, cache), 2) for level in levels}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    """Arguments of `experts`; every code and, in one row each, the smallest and the largest scales occur."""
    tokens, hidden, inner, held, first, count, chosen = CASES[name]
    generator = torch.Generator().manual_seed(len(name))

    def product(outputs: int, columns: int) -> Packed:
        size = (held, outputs, columns // 32)
        blocks = torch.randint(0, 256, (*size, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(117, 123, size, generator=generator, dtype=torch.uint8)
        scales[:, 0], scales[:, -1] = 0, 126
        return Packed(blocks, scales, torch.randn(size[:2], generator=generator).to(dtype))

    x_TH = torch.randn((tokens, hidden), generator=generator).to(dtype)
    weights_TX = torch.rand((tokens, chosen), generator=generator).softmax(-1)
    experts_TX = torch.rand((tokens, count), generator=generator).topk(chosen).indices
    if name == "no expert is here":
        experts_TX.clamp_(max=first - 1)
    return x_TH, weights_TX, experts_TX, product(2 * inner, hidden), product(hidden, inner), first, LIMIT


def exact(given: tuple) -> Tensor:
    x_TH, weights_TX, experts_TX, gate_up, down, *rest = given
    gate_up, down = (Packed(one.blocks, one.scales, one.bias.double()) for one in (gate_up, down))
    return plain.experts(x_TH.double(), weights_TX, experts_TX, gate_up, down, *rest)


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.isfinite().all()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("level", LEVELS)
def test_as_exact_as_plain(level: str, name: str, threads: dict[str, Threads]) -> None:
    given = inputs(name)
    found, wanted = CpuExperts(threads[level])(*given), exact(given)
    assert found.dtype == torch.float32
    assert error(found, wanted) < 2e-6
    if name == "no expert is here":
        assert not found.any()


@pytest.mark.parametrize("level", LEVELS)
def test_bf16_is_rounded_once(level: str, threads: dict[str, Threads]) -> None:
    given = inputs("several tokens, odd sizes", torch.bfloat16)
    found, wanted = CpuExperts(threads[level])(*given), exact(given)
    assert found.dtype == torch.bfloat16
    assert error(found.double(), wanted) <= 2**-8
    assert (found.double() - wanted).norm() <= (plain.experts(*given).double() - wanted).norm()


@pytest.mark.parametrize(
    ("level", "int8"), [*((name, False) for name in LEVELS), *((name, True) for name in INT8_LEVELS)]
)
def test_a_token_gets_the_same_bits_alone_and_on_one_thread(
    level: str, int8: bool, threads: dict[str, Threads]
) -> None:
    x_TH, weights_TX, experts_TX, *rest = inputs("several tokens, odd sizes")
    together = CpuExperts(threads[level], int8)(x_TH, weights_TX, experts_TX, *rest)
    one = CpuExperts(Threads(threads[level].library, 1), int8)
    rows = [slice(row, row + 1) for row in range(len(x_TH))]
    alone = [one(x_TH[row], weights_TX[row], experts_TX[row], *rest) for row in rows]
    assert torch.equal(torch.cat(alone), together)


def test_large_work_on_more_threads_than_cpus_repeats(threads: dict[str, Threads]) -> None:
    given = inputs("a width of 20b")
    first = CpuExperts(threads[BEST])(*given)
    many = CpuExperts(Threads(threads[BEST].library, 5))
    assert all(torch.equal(many(*given), first) for _ in range(5))


@pytest.mark.parametrize("name", [name for name in CASES if name != "no expert is here"])
@pytest.mark.parametrize("level", INT8_LEVELS)
def test_int8_activations_are_near(level: str, name: str, threads: dict[str, Threads]) -> None:
    given = inputs(name)
    found, wanted = CpuExperts(threads[level], int8=True)(*given), exact(given)
    assert 1e-5 < (found - wanted).norm() / wanted.norm() < 2e-2  # the lower bound: it is really 8 bits


# more tokens than a tile, rows that are no whole groups, columns that end inside a step
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 201, 2880), (2, 7, 32), (3, 130, 96), (67, 65, 160)])
@pytest.mark.parametrize("codes", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("level", LEVELS)
def test_linear_is_exact(
    level: str,
    codes: torch.dtype,
    tokens: int,
    rows: int,
    columns: int,
    threads: dict[str, Threads],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gptoss_launch.parallel.kernels.linear.linear", None)  # it is ours that runs
    generator = torch.Generator().manual_seed(tokens)
    x_TI, bias_O = torch.randn((tokens, columns), generator=generator), torch.randn(rows, generator=generator)
    whole = narrowed(torch.randn((rows, columns), generator=generator).bfloat16(), codes, torch.float32)
    product = CpuLinear(threads[level])
    found, wide_OI = product(x_TI, whole, bias_O), whole.codes_OI.double() * whole.scale_O.double()[:, None]
    assert found.dtype == torch.float32
    assert error(found, x_TI.double() @ wide_OI.T + bias_O) < 2e-6
    assert torch.equal(torch.cat([product(x_TI[row : row + 1], whole) for row in range(tokens)]), product(x_TI, whole))


def test_other_weights_are_left_to_torch(threads: dict[str, Threads]) -> None:
    x_TI, odd_OI = torch.randn((3, 40)), torch.randn((5, 40)).bfloat16()
    product = CpuLinear(threads[BEST])
    for weight_OI in (
        odd_OI.float(),
        *(narrowed(odd_OI, codes, torch.float32) for codes in (torch.int8, odd_OI.dtype)),
    ):
        assert torch.equal(product(x_TI, weight_OI), linear.linear(x_TI, weight_OI))


@pytest.mark.parametrize("level", LEVELS)
def test_the_ends_of_the_scales(level: str, threads: dict[str, Threads]) -> None:
    """255 is NaN; 0 is 2 ** -127, which fp32 has no exponent for."""
    x_TH, weights_TX, experts_TX, gate_up, down, *rest = inputs("rows that end inside a step")
    down.scales[:, 5, 1] = 255
    found = CpuExperts(threads[level])(x_TH, weights_TX, experts_TX, gate_up, down, *rest)
    assert found[:, 5].isnan().all() and int(found.isnan().sum()) == 1
    down.scales[:], down.bias[:] = 0, 0.0
    given = (x_TH, weights_TX, experts_TX, gate_up, down, *rest)
    found, wanted = CpuExperts(threads[level])(*given), exact(given)
    assert found.abs().max() > 0 and error(found.double(), wanted) < 1e-5


def test_levels_need_what_they_use() -> None:
    assert cpu_build.level_for(frozenset()).name == "portable"
    assert cpu_build.level_for(frozenset({"avx2"})).name == "portable"
    assert cpu_build.level_for(frozenset({"avx2", "fma", "avx512f"})).name == "avx2"
    everything = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"})
    assert cpu_build.level_for(everything).name == "avx512"


@pytest.mark.slow
def test_every_level_compiles(tmp_path: Path) -> None:
    """Also those that this CPU cannot run; loading them runs nothing of ours."""
    for level in cpu_build.LEVELS:
        cpu_build.library(cpu_products.SOURCE, level, tmp_path)
    assert len(list(tmp_path.iterdir())) == len(cpu_build.LEVELS)


CPU_PLAN = dataclasses.replace(plain_plan(TINY), kernels="cpu")


def test_without_a_compiler_plain_stands_in_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    ops, slow = choose.operations(CPU_PLAN)
    assert ops is PLAIN and "plain torch experts" in slow[0] and "no C++ compiler (c++, g++, clang++)" in slow[0]
    with pytest.raises(UserError, match="no C.. compiler"):
        choose.operations(dataclasses.replace(CPU_PLAN, kernels="cpu-int8"))


def test_a_compiler_that_refuses_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:3: error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    _, slow = choose.operations(CPU_PLAN)
    assert "x.cpp:3: error: no such header" in slow[0]
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_kept_whole_and_found_again(tmp_path: Path) -> None:
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    level, cache = cpu_build.LEVELS[-1], tmp_path / "cache"
    assert cpu_build.library(source, level, cache).one() == 1
    assert cpu_build.library(source, level, cache, compilers=()).one() == 1
    (kept,) = cache.iterdir()  # and nothing is left over of how it was made
    source.write_text('extern "C" int one() { return 2; }\n')
    assert cpu_build.library(source, level, cache).one() == 2
    source.write_text('extern "C" int one() { return 1; }\n')
    other = tmp_path / "other"
    other.mkdir()
    (other / kept.name).write_bytes(b"of another system")
    assert cpu_build.library(source, level, other).one() == 1
    assert (other / kept.name).stat().st_size > 1000


def test_another_process_finds_what_was_kept(tmp_path: Path) -> None:
    """Sets have another order in each."""
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    level = "Level('test', frozenset(('avx512f', 'avx512bw', 'avx512vl', 'avx512dq', 'avx2', 'fma')), ())"
    code = f"""
from pathlib import Path
from gptoss_launch.parallel.kernels.cpu_build import Level, library
library(Path({str(source)!r}), {level}, Path({str(tmp_path)!r}))
"""
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
    assert len(list(tmp_path.glob("*.so"))) == 1


def test_a_library_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "disagreement", lambda run: float("nan"))
    with pytest.raises(UserError, match="the CPU experts .* are off by nan"):
        cpu_operations()

"""Every kernel of ours has a group, and so do those of others that a step runs."""

import ast
from pathlib import Path

import pytest
from gptoss_launch.launch.bench.kernel_groups import OTHER, by_group, group_of
from gptoss_launch.launch.bench.profiled import OTHERS_NAMED, grouped

KERNELS = Path(__file__).parents[2] / "parallel" / "kernels"


def launched() -> set[str]:
    """Names of Triton kernels that something else than a kernel of the same file names: those that are launched."""
    names: set[str] = set()
    for path in KERNELS.glob("triton_*.py"):
        tree = ast.parse(path.read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        kernels = {one.name for one in functions if any("jit" in ast.unparse(mark) for mark in one.decorator_list)}
        host = [one for one in tree.body if not (isinstance(one, ast.FunctionDef) and one.name in kernels)]
        used = {node.id for one in host for node in ast.walk(one) if isinstance(node, ast.Name)}
        names |= kernels & used
    return names


def test_the_search_finds_kernels() -> None:
    assert {"_gate_up", "_down", "_grouped", "_attend_tiles", "_race", "_route", "_add_norm"} <= launched()


@pytest.mark.parametrize("name", sorted(launched()))
def test_each_kernel_of_ours_has_a_group(name: str) -> None:
    assert group_of(name) not in (OTHER, "elementwise", "gather and scatter", "copies and fills")


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("_gate_up", "experts"),
        ("_sum", "experts"),
        ("_copy", "experts from the host"),
        ("_decode", "attention"),
        ("_one", "products"),
        ("_race", "sampling"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-reduce"),
        ("_flagged_all_reduce", "all-reduce"),
        ("void one_shot_all_reduce_kernel<__nv_bfloat16>", "all-reduce"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "products"),
        ("Memcpy DtoH (Device -> Pinned)", "copies and fills"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>", "copies and fills"),
        ("void at::native::index_elementwise_kernel<128, 4>", "gather and scatter"),
        ("void at::native::elementwise_kernel<128, 4, add>", "elementwise"),
        ("aten::mm", "products"),
        ("something_new", OTHER),
    ],
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def test_sums_stay_whole() -> None:
    spent = {"_gate_up": 4.0, "_down": 2.0, "_race": 1.0, **{f"new_{i}": 0.5 + i for i in range(8)}}
    assert by_group(spent) == {OTHER: 32.0, "experts": 6.0, "sampling": 1.0}
    shown = grouped(spent)
    assert sum(shown.values()) == pytest.approx(sum(spent.values()))
    assert list(shown)[:3] == ["experts", "sampling", "other: new_7"] and shown[OTHER] == 0.5 + 1.5 + 2.5
    assert len(shown) == 2 + OTHERS_NAMED + 1

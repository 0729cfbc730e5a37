"""Decisions of the planner, and what it says when nothing fits."""

import dataclasses
import re

import pytest
from gptoss_launch.parallel.errors import NoPlanError, UserError
from gptoss_launch.parallel.planning.machine import Machine, parse_size, read_machine
from gptoss_launch.parallel.planning.memory import PROCESS
from gptoss_launch.parallel.planning.plan import Plan
from gptoss_launch.parallel.planning.planner import Asked, context_choices
from gptoss_launch.parallel.planning.planner import plan as choose_plan
from gptoss_launch.parallel.planning.spec import PUBLISHED

GIB = 2**30


def planned(model: str, machine: Machine | str, **asked: object) -> Plan:
    found = read_machine(machine) if isinstance(machine, str) else machine
    return choose_plan(
        PUBLISHED[f"openai/gpt-oss-{model}"],
        found,
        Asked(**asked),  # type: ignore[arg-type]
        model=f"openai/gpt-oss-{model}",
    )


def refused(model: str, machine: Machine | str, **asked: object) -> NoPlanError:
    with pytest.raises(NoPlanError) as caught:
        planned(model, machine, **asked)
    assert caught.value.exit_code == 6
    return caught.value


def device_bytes(plan: Plan) -> int:
    rank = plan.memory[0]
    return rank.weights_bytes + rank.kv_bytes + rank.workspace_bytes


@pytest.mark.parametrize(
    ("machine", "device", "dtype", "residual"),
    [
        ("cpu", "cpu", "fp32", "fp32"),
        ("gtx1080ti", "cpu", "fp32", "fp32"),
        ("rtx3090", "cuda", "bf16", "bf16"),
        ("h100", "cuda", "bf16", "bf16"),
    ],
)
def test_device_and_dtype_by_hardware(machine: str, device: str, dtype: str, residual: str) -> None:
    plan = planned("20b", machine)
    assert (plan.device, plan.dtype, plan.residual_dtype, plan.kv_dtype) == (device, dtype, residual, dtype)
    assert plan.step_tokens == {"cuda": 2048, "cpu": 512}[device]


def test_turing_gets_fp16_with_fp32_residuals() -> None:
    plan = planned("20b", "rtx2080ti", gpu_memory_bytes=22 * GIB)  # as many 2080 Ti have been given
    assert (plan.dtype, plan.residual_dtype) == ("fp16", "fp32")


def test_a_gpu_too_old_is_left_out_and_named() -> None:
    assert any("GTX 1080 Ti is sm_61" in line and "sm_75" in line for line in planned("20b", "gtx1080ti").why)
    assert any("GTX 1080 Ti is sm_61" in line for line in refused("120b", "gtx1080ti").tried)


@pytest.mark.parametrize("gib", [14, 15, 16, 18, 20, 24])
def test_the_longest_context_that_fits(gib: int) -> None:
    """The next longer choice must not fit, or the choice was not the longest."""
    try:
        plan = planned("20b", "h100", gpu_memory_bytes=gib * GIB)
    except NoPlanError:
        assert gib == 14
        return
    assert device_bytes(plan) <= gib * GIB - PROCESS["cuda"].device_bytes
    choices = context_choices(131072)
    place = choices.index(plan.context_tokens)
    if place:
        refused("20b", "h100", gpu_memory_bytes=gib * GIB, context_tokens=choices[place - 1])


def test_context_choices_begin_with_the_models_own() -> None:
    choices = context_choices(131072)
    assert choices[:6] == (131072, 114688, 98304, 81920, 65536, 57344) and choices[-1] == 1024
    assert list(choices) == sorted(set(choices), reverse=True)
    assert context_choices(512) == (512,)


def test_what_is_asked_for_is_planned() -> None:
    plan = planned("20b", "h100", context_tokens=1000, dtype="fp32")
    assert (plan.context_tokens, plan.kv_tokens, plan.step_tokens, plan.dtype) == (1000, 1008, 1000, "fp32")
    assert planned("20b", "h100", gpu_memory_bytes=0).device == "cpu"


def test_context_beyond_the_model() -> None:
    with pytest.raises(UserError, match="--context 131073 is more than the model's 131072 tokens") as caught:
        planned("20b", "h100", context_tokens=131073)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("model", "machine", "asked"),
    [
        ("20b", "rtx2080ti", {}),
        ("20b", "laptop-8gb", {}),
        ("120b", "rtx3090", {"context_tokens": 4096}),
        ("120b", "cpu", {}),
        ("20b", "h100", {"gpu_memory_bytes": 16 * GIB, "context_tokens": 131072}),
    ],
)
def test_no_plan_adds_up(model: str, machine: str, asked: dict[str, object]) -> None:
    """With the missing bytes added there is a plan; with one byte less there is none."""
    error = refused(model, machine, **asked)
    found = re.search(r"short by (\d+) bytes", error.message)
    assert found and f"short by {found[1]} bytes" in error.tried[0]
    context = asked.get("context_tokens", 1024)
    here = read_machine(machine)
    for missing, fits in ((int(found[1]), True), (int(found[1]) - 1, False)):
        if here.gpus:
            free = asked.get("gpu_memory_bytes", here.gpus[0].free_bytes)
            assert isinstance(free, int)
            more = {"gpu_memory_bytes": free + missing}
        else:
            more = {"host_memory_bytes": (here.host_memory_bytes or 0) + missing}
        if fits:
            assert planned(model, machine, **more | {"context_tokens": context}).context_tokens == context
        else:
            refused(model, machine, **more | {"context_tokens": context})


@pytest.mark.parametrize("gib", [15, 16, 17])
def test_the_hint_holds(gib: int) -> None:
    asked = {"gpu_memory_bytes": gib * GIB, "context_tokens": 131072}
    error = refused("20b", "h100", **asked)
    shorter = re.search(r"--context (\d+) fits", error.hint)
    assert shorter and error.hint.startswith("--context")  # the smallest change comes first
    planned("20b", "h100", **asked | {"context_tokens": int(shorter[1])})
    larger = re.search(r"a GPU with ([\d.]+ GiB) free fits", error.hint)
    assert larger
    planned("20b", "h100", **asked | {"gpu_memory_bytes": parse_size(larger[1])})


def test_hint_of_a_narrower_dtype_on_a_cpu() -> None:
    error = refused("20b", "cpu", host_memory_bytes=16 * GIB)
    assert error.hint.startswith("--dtype bf16 fits")
    assert planned("20b", "cpu", host_memory_bytes=16 * GIB, dtype="bf16").device == "cpu"


def test_hint_of_another_gpu() -> None:
    two = read_machine("h100x2")
    busy = dataclasses.replace(two.gpus[0], free_bytes=GIB)
    error = refused("20b", dataclasses.replace(two, gpus=(busy, two.gpus[1])))
    assert "CUDA_VISIBLE_DEVICES=1 fits" in error.hint


def test_host_memory_counts_beside_a_gpu() -> None:
    error = refused("20b", "h100", host_memory_bytes=GIB)
    assert "short by 2147483648 bytes" in error.message
    assert "3.0 GiB of host memory are needed besides" in error.hint


def test_layouts_that_are_not_built_are_named() -> None:
    tried = refused("120b", "rtx3090x3").tried
    assert any(line.startswith("3 ranks: not built yet") and line.endswith("would fit") for line in tried)
    assert "experts in host memory: not built yet" in tried
    assert any("7 GPUs stay idle" in line and "not built yet" in line for line in planned("20b", "h100x8").why)


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"ranks": 2}, "a replica of 2 ranks: not built yet"), ({"dp": 4}, "4 replicas: not built yet")],
)
def test_asking_for_a_layout_that_is_not_built(asked: dict[str, object], named: str) -> None:
    assert refused("20b", "h100x8", **asked).tried == (named,)


def test_asking_for_an_impossible_layout() -> None:
    with pytest.raises(UserError, match="ep 3 does not divide 4 ranks") as caught:
        planned("20b", "h100x8", ranks=4, ep=3)
    assert caught.value.exit_code == 2


def test_gpu_memory_without_gpu() -> None:
    with pytest.raises(UserError, match="--gpu-memory 8.0 GiB, but cpu has no GPU"):
        planned("20b", "cpu", gpu_memory_bytes=8 * GIB)


def test_unknown_host_memory_is_not_guessed() -> None:
    unknown = dataclasses.replace(read_machine("cpu"), host_memory_bytes=None)
    with pytest.raises(UserError, match="is not known") as caught:
        planned("20b", unknown)
    assert "--host-memory" in caught.value.hint
    assert planned("20b", unknown, host_memory_bytes=40 * GIB).device == "cpu"
    with_gpu = dataclasses.replace(read_machine("h100"), host_memory_bytes=None)
    assert planned("20b", with_gpu).device == "cuda"

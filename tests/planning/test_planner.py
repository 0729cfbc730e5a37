"""Decisions of the planner, and what it says when nothing fits."""

import dataclasses
import re

import pytest
from gptoss_launch.parallel.errors import NoPlanError, UserError
from gptoss_launch.parallel.planning.choice import Asked
from gptoss_launch.parallel.planning.layouts import context_choices
from gptoss_launch.parallel.planning.machine import Machine, parse_size, read_machine
from gptoss_launch.parallel.planning.memory import weights_bytes
from gptoss_launch.parallel.planning.plan import Plan
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
    assert any("GTX 1080 Ti is sm_61" in line for line in refused("120b", "gtx1080ti", ranks=2).tried)


@pytest.mark.parametrize("gib", [14, 15, 16, 18, 20, 24])
def test_the_longest_context_that_fits(gib: int) -> None:
    """The next longer choice must not fit, or the choice was not the longest."""
    plan = planned("20b", "h100", gpu_memory_bytes=gib * GIB)
    if plan.offload != "none":
        assert gib == 14
        return
    assert plan.memory[0].device_bytes <= gib * GIB
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
    assert (plan.context_tokens, plan.step_tokens, plan.dtype, plan.kernels) == (1000, 1000, "fp32", "plain")
    assert plan.sequences == 256 and plan.kv_tokens == 256 * 1008  # all that they can ever use
    assert planned("20b", "h100", gpu_memory_bytes=0).device == "cpu"


def test_context_beyond_the_model() -> None:
    with pytest.raises(UserError, match="--context 131073 is more than the model's 131072 tokens") as caught:
        planned("20b", "h100", context_tokens=131073)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("model", "machine", "asked"),
    [
        ("20b", "rtx2080ti", {"host_memory_bytes": None}),
        ("20b", "laptop-8gb", {"host_memory_bytes": None}),
        ("120b", "rtx3090", {"host_memory_bytes": None, "context_tokens": 4096}),
        ("120b", "cpu", {"ranks": 2, "dtype": "bf16"}),
        ("20b", "h100", {"gpu_memory_bytes": 16 * GIB, "context_tokens": 131072}),
    ],
)
def test_no_plan_adds_up(model: str, machine: str, asked: dict[str, object]) -> None:
    """With the missing bytes added there is a plan; with one byte less there is none."""
    here = read_machine(machine)
    if "host_memory_bytes" in asked:
        here, asked = without_host(machine), {name: value for name, value in asked.items() if value is not None}
    error = refused(model, here, **asked)
    found = re.search(r"short by (\d+) bytes", error.message)
    assert found and f"short by {found[1]} bytes" in error.tried[0]
    context = asked.get("context_tokens", 1024)
    for missing, fits in ((int(found[1]), True), (int(found[1]) - 1, False)):
        if here.gpus:
            free = asked.get("gpu_memory_bytes", here.gpus[0].free_bytes)
            assert isinstance(free, int)
            more = {"gpu_memory_bytes": free + missing}
        else:
            more = {"host_memory_bytes": (here.host_memory_bytes or 0) + missing}
        if fits:
            assert planned(model, here, **asked | more | {"context_tokens": context}).context_tokens == context
        else:
            refused(model, here, **asked | more | {"context_tokens": context})


@pytest.mark.parametrize("gib", [14, 15, 16])
def test_the_hint_holds(gib: int) -> None:
    asked = {"gpu_memory_bytes": gib * GIB, "context_tokens": 131072}
    error = refused("20b", "h100", **asked)
    shorter = re.search(r"--context (\d+) fits", error.hint)
    assert shorter and error.hint.startswith("--context")  # the smallest change comes first
    planned("20b", "h100", **asked | {"context_tokens": int(shorter[1])})
    larger = re.search(r"a GPU with ([\d.]+ GiB) free fits", error.hint)
    assert larger
    planned("20b", "h100", **asked | {"gpu_memory_bytes": parse_size(larger[1])})


def test_the_exact_dtype_on_a_cpu_keeps_bf16() -> None:
    """Its own kernels read bf16 in products of fp32; torch's do not."""
    plan = planned("20b", "cpu", host_memory_bytes=16 * GIB)
    assert (plan.dtype, plan.kept, plan.offload) == ("fp32", "bf16", "none") and "stay bf16" in why(plan, "attention")
    assert plan.memory[0].weights_bytes == weights_bytes(plan.spec, plan.mesh, 0, "fp32", "bf16") < 14e9
    assert planned("20b", "cpu", host_memory_bytes=24 * GIB, kernels="plain").kept is None
    error = refused("20b", "cpu", host_memory_bytes=16 * GIB, dtype="fp32", kernels="plain", ranks=2)
    assert error.hint.startswith("--dtype bf16 fits")
    assert planned("20b", "cpu", host_memory_bytes=16 * GIB, dtype="bf16", ranks=2).device == "cpu"


def test_hint_of_another_gpu() -> None:
    two = read_machine("h100x2")
    busy = dataclasses.replace(two.gpus[0], free_bytes=GIB)
    error = refused("20b", dataclasses.replace(two, gpus=(busy, two.gpus[1])))
    assert "CUDA_VISIBLE_DEVICES=1 fits" in error.hint


def test_host_memory_counts_beside_a_gpu() -> None:
    error = refused("20b", "h100", host_memory_bytes=GIB)
    assert "short by 2147483648 bytes" in error.message
    assert error.hint == "3.0 GiB of free host memory fit"  # the GPU is large enough


@pytest.mark.parametrize(
    ("machine", "asked"),
    [
        ("cpu", {"host_memory_bytes": GIB}),
        ("cpu", {"host_memory_bytes": 4 * GIB, "dtype": "fp32"}),
        ("cpu", {"host_memory_bytes": 8 * GIB, "context_tokens": 131072}),
        ("rtx2080ti", {"host_memory_bytes": 2 * GIB}),
        ("laptop-8gb", {"host_memory_bytes": GIB}),
    ],
)
def test_the_least_host_memory_is_named_first(machine: str, asked: dict[str, object]) -> None:
    """Experts may stay in the file, which takes much less than all of them in memory."""
    error = refused("20b", machine, **asked)
    found = re.search(r"([\d.]+ GiB) of free host memory fit, with experts in the checkpoint's file", error.hint)
    assert found
    enough = parse_size(found[1])
    context = {"context_tokens": asked.get("context_tokens", 1024)}
    plan = planned("20b", machine, **asked | context | {"host_memory_bytes": enough})
    assert plan.offload != "none" and plan.offload.taken.kept == "file"
    refused("20b", machine, **asked | context | {"host_memory_bytes": enough - GIB // 5})
    if shorter := re.search(r"--context (\d+) fits", error.hint):
        planned("20b", machine, **asked | {"context_tokens": int(shorter[1])})


def test_no_plan_with_experts_in_the_file_adds_up() -> None:
    error = refused("20b", "cpu", host_memory_bytes=4 * GIB)
    found = re.search(r"short by (\d+) bytes", error.message)
    assert found and f"short by {found[1]} bytes" in error.tried[0] and "experts in the file" in error.tried[0]
    planned("20b", "cpu", host_memory_bytes=4 * GIB + int(found[1]))
    refused("20b", "cpu", host_memory_bytes=4 * GIB + int(found[1]) - 1)


def test_a_gpu_too_small_leaves_the_cpu() -> None:
    error = refused("20b", "laptop-8gb", gpu_memory_bytes=3 * GIB, host_memory_bytes=15 * GIB)
    assert "--gpu-memory 0 runs it on the CPU" in error.hint
    planned("20b", "laptop-8gb", gpu_memory_bytes=0, host_memory_bytes=15 * GIB)
    assert (
        "--gpu-memory 0" not in refused("20b", "laptop-8gb", gpu_memory_bytes=3 * GIB, host_memory_bytes=4 * GIB).hint
    )


def test_a_cpu_says_what_a_bf16_cache_has_room_for() -> None:
    plan = planned("20b", "cpu", host_memory_bytes=16 * GIB)
    found = re.search(r"--kv-dtype bf16 has room for (\d+)", why(plan, "context"))
    assert found
    there = planned("20b", "cpu", host_memory_bytes=16 * GIB, kv_dtype="bf16")
    assert there.context_tokens == int(found[1]) > plan.context_tokens


def test_a_cpu_says_how_fast_it_may_be_where_memory_decides() -> None:
    """0.8 of the machine's 40 GB/s over the bytes of a token."""
    line = why(planned("20b", "cpu"), "one stream")
    found = re.search(r"estimated ([\d.]+) tokens/s \(([\d.]+) GB read by the CPU a token\)", line)
    assert found and float(found[1]) == pytest.approx(0.8 * 40 / float(found[2]), abs=0.06)
    said = (planned("20b", "cpu", ranks=2), planned("20b", "cpu", kernels="plain"))
    assert not any(line.startswith("one stream") for plan in said for line in plan.why)


def test_a_layout_that_is_not_the_fastest_says_why() -> None:
    plan = planned("20b", "h200x8")
    assert (plan.dp, plan.ranks) == (2, 4)
    assert why(plan, "ranks").endswith("what is within 8 % counts as equal, and this makes the most replicas")
    assert "counts as equal" not in why(planned("20b", "h100x8"), "ranks")


def without_host(machine: str) -> Machine:
    """Of whose host memory nothing is known, so that no expert can be left there."""
    return dataclasses.replace(read_machine(machine), host_memory_bytes=None)


def layout(plan: Plan) -> tuple[int, int, int]:
    return plan.dp, plan.ranks, plan.ep


def why(plan: Plan, head: str) -> str:
    """The one line that begins so."""
    (line,) = (line for line in plan.why if line.startswith(head))
    return line


@pytest.mark.parametrize(
    ("model", "machine", "asked", "wanted"),
    [
        ("20b", "h100", {}, (1, 1, 1)),
        ("20b", "h200x2", {}, (1, 2, 1)),
        ("20b", "h200x2", {"workload": "throughput"}, (2, 1, 1)),
        ("20b", "h100x8", {"workload": "throughput"}, (8, 1, 1)),
        ("120b", "h100x8", {}, (1, 8, 1)),
        ("120b", "rtx3090x3", {}, (1, 3, 1)),  # 20.4 GiB a rank: no fewer would do
        ("120b", "h100x8-2nodes", {}, (2, 8, 1)),
        ("120b", "h100x8", {"ranks": 3}, (2, 3, 1)),  # two GPUs stay idle
        ("120b", "h100x8", {"ranks": 8, "workload": "throughput"}, (1, 8, 8)),
        ("120b", "h100x8", {"ranks": 6, "ep": 3, "dp": 1}, (1, 6, 3)),
        ("20b", "h100x8", {"ep": 2, "dp": 4}, (4, 2, 2)),
        ("20b", "h100x8-2nodes", {"dp": 3}, (3, 4, 1)),
        ("20b", "cpu", {"ranks": 2, "dtype": "bf16"}, (1, 2, 1)),
        ("20b", "cpu", {"ep": 2, "dtype": "bf16"}, (1, 2, 2)),
    ],
)
def test_layout(model: str, machine: str, asked: dict[str, object], wanted: tuple[int, int, int]) -> None:
    plan = planned(model, machine, **asked)
    assert layout(plan) == wanted
    assert [row.rank for row in plan.memory] == list(range(plan.world_size))
    for head in ("ranks ", "dp ", "ep "):
        assert re.search(r"\d", why(plan, head).partition(": ")[2]) or plan.device == "cpu"


def test_reasons_are_estimates_with_numbers() -> None:
    plan = planned("20b", "h200x2")
    line = why(plan, "ranks 2: ")
    found = re.search(r"estimated decode step of 1: ([\d.]+) ms .*against ([\d.]+) ms with 1", line)
    assert found and float(found[1]) < float(found[2])
    assert "48 all-reduces of 1.7 us" in line
    assert "expected to read 2.00 experts a layer at 1 token a step, against 2.70 with ep 2" in why(plan, "ep 1, etp 2")
    line = why(planned("20b", "h100x8", workload="throughput"), "ranks 1: ")
    assert re.search(r"a node makes \d+ tokens/s so, against \d+ with 2, ", line)


def test_two_nodes_get_a_replica_each() -> None:
    plan = planned("120b", "h100x8-2nodes")
    assert (plan.nodes, plan.world_size) == (2, 16)
    assert "8 GPUs on each of 2 nodes" in why(plan, "dp 2: ")
    assert planned("120b", "h100x8-2nodes", dp=1).nodes == 1


def test_a_replica_lies_on_two_nodes_where_it_must() -> None:
    plan = planned("120b", "a100-40-2nodes")
    assert (layout(plan), plan.nodes, plan.span, plan.offload) == ((1, 2, 1), 2, 2, "none")
    assert [plan.ranks_of(node) for node in range(2)] == [range(1), range(1, 2)]
    assert [plan.replicas_of(node) for node in range(2)] == [range(1)] * 2
    assert [plan.gpus_of(node) for node in range(2)] == [1, 1]
    line = why(plan, "nodes 2: ")
    assert "no layout inside one fits" in line and "72 all-reduces a step goes over the network" in line
    assert re.search(r"41 us by RDMA and more by TCP: 2\.99 ms of [\d.]+ ms", line)
    assert planned("120b", "a100-40-2nodes", ranks=1).offload != "none"
    assert planned("20b", "a100-40-2nodes").span == 1


def test_a_replica_lies_on_as_few_nodes_as_have_its_gpus() -> None:
    """Four nodes of two GPUs each; more ranks on the first nodes, and the freest GPUs count for nothing."""
    one = read_machine("a100-40x4")
    four = dataclasses.replace(one, gpus=one.gpus[:2], nodes=4)
    for ranks, nodes, parts in ((2, 4, [2]), (3, 2, [2, 1]), (5, 3, [2, 2, 1]), (8, 4, [2, 2, 2, 2])):
        plan = planned("120b", four, ranks=ranks)
        assert (plan.dp, plan.nodes) == ((4, 4) if ranks == 2 else (1, nodes))
        assert [len(plan.ranks_of(node)) for node in range(nodes)][: len(parts)] == parts
    assert "5 ranks were asked for, and one has 2 GPUs" in why(planned("120b", four, ranks=5), "nodes 3: ")
    busy = dataclasses.replace(four, gpus=(one.gpus[0], dataclasses.replace(one.gpus[1], free_bytes=GIB)))
    assert refused("120b", busy, ranks=3, host_memory_bytes=None).tried[0].startswith("3 ranks on NVIDIA A100")


def test_one_replica_alone_may_lie_on_several_nodes() -> None:
    two = read_machine("a100-40-2nodes")
    with pytest.raises(
        UserError, match="--dp 2 with --ranks 2: a node of a100-40-2nodes has 1 .*, and one replica alone"
    ):
        planned("120b", two, ranks=2, dp=2)
    with pytest.raises(UserError, match="--ranks 3: a100-40-2nodes has 1 NVIDIA A100-SXM4-40GB on each of 2 nodes"):
        planned("120b", two, ranks=3)


def test_ranks_on_cpus_of_two_nodes() -> None:
    two = dataclasses.replace(read_machine("cpu"), nodes=2)
    plan = planned("20b", two, ranks=3, dp=1)
    assert (plan.nodes, plan.span, plan.dp) == (2, 2, 1)
    assert [plan.ranks_of(node) for node in range(2)] == [range(2), range(2, 3)]
    assert "48 all-reduces a step goes over the network" in why(plan, "nodes 2: ")
    assert planned("20b", two, ranks=2).span == 1 and planned("20b", two, dp=1).nodes == 1


def test_two_nodes_without_gpus() -> None:
    two = dataclasses.replace(read_machine("cpu"), nodes=2)
    plan = planned("20b", two, host_memory_bytes=256 * GIB)
    assert (plan.dp, plan.nodes, plan.world_size) == (2, 2, 2)
    assert "one replica has the whole CPU of each of 2 nodes" in why(plan, "dp 2: ")


def test_an_unknown_gpu_gets_the_fewest_ranks() -> None:
    machine = read_machine("h100x8")
    gpus = tuple(dataclasses.replace(gpu, name="NVIDIA X1") for gpu in machine.gpus)
    unknown = dataclasses.replace(machine, gpus=gpus)
    plan = planned("20b", unknown)
    assert layout(plan) == (8, 1, 1)
    assert "the fewest that fit, as the memory bandwidth of NVIDIA X1 is not in the table" in why(plan, "ranks 1: ")
    small = dataclasses.replace(unknown, gpus=tuple(dataclasses.replace(gpu, free_bytes=40 * GIB) for gpu in gpus))
    assert layout(planned("120b", small)) == (4, 2, 1)


def test_a_longer_context_comes_before_a_faster_layout() -> None:
    """With 16 GiB one rank holds only a short context of 20b; throughput alone would choose single ranks."""
    plan = planned("20b", "h100x2", gpu_memory_bytes=16 * GIB, workload="throughput")
    assert (layout(plan), plan.context_tokens) == ((1, 2, 2), 131072)
    short = planned("20b", "h100x2", gpu_memory_bytes=16 * GIB, workload="throughput", context_tokens=4096)
    assert layout(short) == (2, 1, 1)


def test_gpus_of_several_kinds_are_not_mixed() -> None:
    machine = read_machine("h100x8")
    mixed = dataclasses.replace(machine, gpus=(*machine.gpus[:3], *read_machine("a100-40x4").gpus))
    plan = planned("20b", mixed)
    assert plan.ranks == 3 and "4 of other kinds are left out" in why(plan, "device cuda")


def test_a_busy_gpu_at_the_end_costs_a_replica() -> None:
    machine = read_machine("h100x8")
    busy = dataclasses.replace(machine.gpus[0], free_bytes=GIB)
    plan = planned("20b", dataclasses.replace(machine, gpus=(*machine.gpus[:7], busy)), workload="throughput")
    assert layout(plan) == (7, 1, 1)
    assert "1 GPU stays idle, as a further replica does not fit" in why(plan, "dp 7: ")


def test_host_memory_bounds_the_replicas() -> None:
    assert planned("20b", "h100x8", workload="throughput", host_memory_bytes=15 * GIB).dp == 5


def test_ranks_on_a_cpu_share_its_memory() -> None:
    for ranks in (1, 2, 3):
        asked = {"ranks": ranks, "ep": 1, "dtype": "bf16", "context_tokens": 4096, "sequences": 1}
        plan = planned("20b", "cpu", **asked)
        need = sum(row.device_bytes + row.host_bytes for row in plan.memory)
        planned("20b", "cpu", **asked, host_memory_bytes=need)
        assert "short by 1 bytes" in refused("20b", "cpu", **asked, host_memory_bytes=need - 1).message


@pytest.mark.parametrize(
    ("machine", "asked", "message", "hint"),
    [
        ("h100x8", {"ranks": 4, "ep": 3}, "ep 3 does not divide 4 ranks", "ep is one of 1, 2, 4"),
        ("h100x8", {"ranks": 9}, "--ranks 9: attention is cut in whole KV groups, and the model has 8", "--ranks 8 is"),
        ("h100x8", {"ep": 16}, "--ep 16: attention is cut in whole KV groups, and the model has 8", "--ep 8 is"),
        ("cpu", {"ranks": 9}, "--ranks 9: attention is cut", "--ranks 8 is"),
        ("h200x2", {"ranks": 4}, "--ranks 4: h200x2 has 2 NVIDIA H200", "--ranks 2 is"),
        ("h100x8-2nodes", {"ranks": 8, "dp": 3}, "takes 24 GPUs, and .* on each of 2 nodes", "--dp 2 is the most"),
        ("h100x8", {"ranks": 3, "dp": 3}, "--dp 3 with 3 ranks each takes 9 GPUs", "--dp 2 is the most with --ranks 3"),
        ("h100x8", {"dp": 9}, "--dp 9 with 1 rank each takes 9 GPUs", "--dp 8 is the most"),
    ],
)
def test_an_impossible_override_gets_the_reason_and_the_nearest(
    machine: str, asked: dict[str, object], message: str, hint: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        planned("20b", machine, **asked)
    assert caught.value.exit_code == 2 and caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("machine", "asked", "fits"),
    [
        ("a100-40x4", {"ranks": 1}, {"ranks": 2}),
        ("a100-40x4", {"dp": 4}, {"dp": 2}),
        ("h100x8", {"dp": 8, "host_memory_bytes": 15 * GIB}, {"dp": 5}),
    ],
)
def test_an_override_that_does_not_fit_gets_the_nearest_that_does(
    machine: str, asked: dict[str, object], fits: dict[str, object]
) -> None:
    error = refused("120b", machine, **asked)
    assert re.search(r"short by \d+ bytes", error.message)
    changed = {name: value for name, value in fits.items() if value is not None}
    for name, value in changed.items():
        assert f"--{name} {value} fits" in error.hint
    planned("120b", machine, **asked | fits)


def test_far_too_many_replicas_on_a_cpu() -> None:
    error = refused("20b", "cpu", dp=2**31 - 1, dtype="bf16", context_tokens=1024)
    assert "--dp 2 fits" in error.hint
    assert planned("20b", "cpu", dp=2, dtype="bf16", context_tokens=1024).world_size == 2
    refused("20b", "cpu", dp=3, dtype="bf16", context_tokens=1024)


def test_hint_of_the_freest_gpus() -> None:
    machine = read_machine("a100-40x4")
    busy = dataclasses.replace(machine.gpus[0], free_bytes=GIB)
    error = refused("120b", dataclasses.replace(machine, gpus=(busy, *machine.gpus[1:])))
    assert "CUDA_VISIBLE_DEVICES=1,2 fits" in error.hint


def test_why_experts_do_not_go_to_host_memory_is_said() -> None:
    tried = refused("120b", without_host("rtx3090x2")).tried
    assert [line.split(",")[0].split(" on ")[0] for line in tried[:2]] == ["1 rank", "2 ranks"]
    assert tried[2:] == (
        "experts in host memory: how much host memory is free is not known; --host-memory SIZE says so",
    )
    assert "only for one rank" in refused("120b", "rtx3090x2", ranks=2).tried[-1]
    assert "a shorter context" in refused("20b", "h100", gpu_memory_bytes=16 * GIB, context_tokens=131072).tried[-1]
    assert re.search(
        r"all but the experts takes 4.\d GiB of 3.0 GiB", refused("20b", "h100", gpu_memory_bytes=3 * GIB).tried[-1]
    )


def test_hint_of_more_gpus_of_the_kind() -> None:
    assert "3 such GPUs in a node fit" in refused("120b", without_host("rtx3090")).hint
    assert layout(planned("120b", "rtx3090x3"))[1] == 3


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

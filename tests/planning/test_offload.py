"""Plans whose experts do not all fit on the device: what fits, which way is taken, and that its sums add up."""

import dataclasses
import json
import re

import pytest
from gptoss_launch.parallel.errors import NoPlanError, UserError
from gptoss_launch.parallel.planning.choice import Asked
from gptoss_launch.parallel.planning.machine import Machine, Speeds, read_machine
from gptoss_launch.parallel.planning.placement import Routing
from gptoss_launch.parallel.planning.plan import Offload, Plan
from gptoss_launch.parallel.planning.planner import plan as choose_plan
from gptoss_launch.parallel.planning.spec import PUBLISHED

GIB = 2**30
EXPERT_BYTES = 3 * 2880 * (2880 * 17 // 32 + 2)  # 17 bytes for 32 weights, and a bias of 2 bytes a row


def planned(model: str, machine: Machine | str, **asked: object) -> Plan:
    found = read_machine(machine) if isinstance(machine, str) else machine
    name = f"openai/gpt-oss-{model}"
    return choose_plan(PUBLISHED[name], found, Asked(**asked), model=name)  # type: ignore[arg-type]


def offload(plan: Plan) -> Offload:
    assert isinstance(plan.offload, Offload)
    return plan.offload


@pytest.mark.parametrize("gib", [5.5, 6, 8, 11, 13])
@pytest.mark.parametrize("misses", ["copied", "computed"])
def test_as_many_experts_as_fit_and_no_more(gib: float, misses: str) -> None:
    free = round(gib * GIB)
    plan = planned("20b", "h100", gpu_memory_bytes=free, misses=misses)
    way, (row,) = offload(plan).taken, plan.memory
    assert row.device_bytes <= free < row.device_bytes + 24 * EXPERT_BYTES
    waiting = 32 if misses == "copied" else 32 - way.slots
    assert way.host_bytes == waiting * 24 * EXPERT_BYTES and row.host_bytes == way.host_bytes + 3 * GIB
    assert row.weights_bytes == 13761550080 - (32 - way.slots) * 24 * EXPERT_BYTES
    assert (way.misses, plan.ranks, plan.dp, plan.device) == (misses, 1, 1, "cuda")


@pytest.mark.parametrize("model", ["20b", "120b"])
@pytest.mark.parametrize("misses", [None, "copied", "computed"])
def test_what_is_said_to_be_needed_is_enough_and_not_too_much(misses: str | None, model: str) -> None:
    host = {"host_memory_bytes": 100 * GIB, "misses": misses}
    with pytest.raises(NoPlanError) as refused:
        planned(model, "rtx3090", gpu_memory_bytes=3 * GIB, **host)
    (said,) = re.findall(r"experts.* takes? ([0-9.]+) GiB of 3.0 GiB", refused.value.tried[-1])
    with pytest.raises(NoPlanError):
        planned(model, "rtx3090", gpu_memory_bytes=round((float(said) - 0.1) * GIB), **host)
    offload(planned(model, "rtx3090", gpu_memory_bytes=round((float(said) + 0.1) * GIB), **host))


def test_each_node_has_a_replica_of_its_own() -> None:
    """Of the one rank that is offloaded, if it is asked for: else one replica would lie on both."""
    two = dataclasses.replace(read_machine("rtx2080ti"), nodes=2)
    plan, alone = planned("20b", two, ranks=1), planned("20b", "rtx2080ti")
    assert (plan.dp, plan.nodes, plan.ranks) == (2, 2, 1) and offload(plan) == offload(alone)
    assert plan.memory == (alone.memory[0], dataclasses.replace(alone.memory[0], rank=1))
    assert [plan.replicas_of(node) for node in range(2)] == [range(1), range(1, 2)]
    assert planned("20b", two, dp=1, ranks=1).nodes == 1


@pytest.mark.parametrize(("rest", "device"), [("int8", "rtx4090"), ("fp8", "h100"), ("int8", "rtx2080ti")])
def test_8_bits_leave_room_for_experts(rest: str, device: str) -> None:
    """Half of the bytes of these matrices go, less a scale a row; the other bytes are as before."""
    plain = planned("20b", device, gpu_memory_bytes=7 * GIB, misses="copied")
    plan = planned("20b", device, gpu_memory_bytes=7 * GIB, misses="copied", rest=rest)
    way, (row,) = offload(plan).taken, plan.memory
    assert row.device_bytes <= 7 * GIB < row.device_bytes + 24 * EXPERT_BYTES
    matrices = 24 * (5120 + 4096) * 2880 + 2 * 201088 * 2880
    scales = 4 * (24 * (5120 + 2880) + 2 * 201088)
    before, after = (
        one.memory[0].weights_bytes - offload(one).taken.slots * 24 * EXPERT_BYTES for one in (plain, plan)
    )
    assert before - after == matrices - scales
    assert way.slots > offload(plain).taken.slots and way.link_bytes < offload(plain).taken.link_bytes
    read = matrices - 201088 * (2880 + 4) - 24 * (5120 + 2880) * 4 - 201088 * 4  # not the embedding's
    saved = offload(plain).taken.device_read_bytes - way.device_read_bytes
    if device == "rtx2080ti":  # dequantized in fp32, then in fp16, for each product
        assert saved < 0
    else:
        assert saved == pytest.approx(read, rel=1e-3) and way.tok_s > offload(plain).taken.tok_s
    assert any(line.startswith(f"rest {rest}: asked for") for line in plan.why)
    told = [line for line in plain.why if line.startswith("--rest int8")]
    assert len(told) == (device != "rtx2080ti") and not any("--rest int8" in line for line in plan.why)


def test_8_bits_on_a_cpu() -> None:
    """int8 with bf16, which it is read with; fp8 not at all, but the GPU's plan is not lost for it."""
    plan = planned("20b", "cpu", rest="int8")
    assert (plan.dtype, plan.kept) == ("fp32", "int8") and plan.memory[0].weights_bytes < 13_000_000_000
    with pytest.raises(UserError, match="--rest fp8 is for GPUs"):
        planned("20b", "cpu", rest="fp8")
    assert planned("20b", "rtx2080ti", rest="fp8").device == "cuda"


def test_host_memory_too_small_leaves_experts_in_the_file() -> None:
    need = offload(planned("20b", "rtx2080ti")).taken.host_bytes + 3 * GIB
    fits = offload(planned("20b", "rtx2080ti", host_memory_bytes=need)).taken
    assert fits.kept == "memory" and not fits.disk_bytes
    short = planned("20b", "rtx2080ti", host_memory_bytes=need - 1)
    assert offload(short).taken.kept == "file" and short.memory[0].host_bytes == 3 * GIB
    tight = offload(planned("20b", "rtx2080ti", host_memory_bytes=4 * GIB)).taken
    assert 0 < tight.disk_bytes < fits.cpu_read_bytes and tight.tok_s < fits.tok_s


def test_the_estimate_is_the_sum_of_its_parts() -> None:
    machine = read_machine("rtx2080ti")
    assert (machine.speeds.host, machine.speeds.link) == (35e9, 12e9)
    chosen = offload(planned("20b", machine))
    ways = {way.misses: way for way in (chosen.taken, *chosen.others) if way.device == "cuda"}
    slots = ways["copied"].slots
    missed = 24 * 4 * EXPERT_BYTES * (32 - slots) / 32
    assert ways["copied"].link_bytes == pytest.approx(missed) == ways["computed"].cpu_read_bytes
    assert ways["copied"].device_read_bytes - ways["computed"].device_read_bytes == pytest.approx(missed)
    parts = (("copied", missed / 12e9, 3e-3), ("computed", missed / (35e9 * 0.8), 3.8e-3))  # a layer of plain torch
    for misses, moved_s, layer_s in parts:
        read_s = ways[misses].device_read_bytes / (616e9 * 0.93)
        assert 1 / ways[misses].tok_s == pytest.approx(read_s + moved_s + 24 * layer_s, rel=1e-3)
    assert chosen.taken.tok_s == max(way.tok_s for way in (chosen.taken, *chosen.others))


def test_a_gpu_that_brings_experts_itself_waits_for_no_host() -> None:
    """Triton's kernels, experts in memory, none ahead of its layer: graphs have room, and a layer costs 25 us."""
    copied = offload(planned("20b", "rtx4090", gpu_memory_bytes=11 * GIB, misses="copied")).taken
    read_s = (copied.device_read_bytes + 24 * 4 * EXPERT_BYTES * (1 / 0.68 - 1)) / (1008e9 * 0.93)
    assert 1 / copied.tok_s == pytest.approx(read_s + copied.link_bytes / 24e9 + 24 * 24.75e-6, rel=1e-3)
    ahead = planned("20b", "rtx4090", gpu_memory_bytes=11 * GIB, misses="copied", look_ahead=1)
    assert 1 / offload(ahead).taken.tok_s - 1 / copied.tok_s == pytest.approx(24 * 290e-6, rel=1e-2)
    assert ahead.memory[0].graphs_bytes == 192 << 20
    few = [planned("20b", "rtx4090", gpu_memory_bytes=6 * GIB, misses="copied", look_ahead=n) for n in (0, 1)]
    assert offload(few[0]) == offload(few[1]) and 0 < offload(few[1]).taken.slots <= 4  # none for one that comes ahead


def test_bandwidths_decide() -> None:
    machine = read_machine("rtx3090")
    slow_cpu = dataclasses.replace(machine, speeds=Speeds(host=10e9, link=50e9, disk=1e9), host_memory_bytes=92 * GIB)
    assert offload(planned("120b", slow_cpu)).taken.misses == "copied"
    assert offload(planned("120b", slow_cpu, misses="computed")).taken.misses == "computed"
    slow_link = dataclasses.replace(slow_cpu, speeds=Speeds(host=50e9, link=5e9, disk=1e9))
    assert offload(planned("120b", slow_link)).taken.misses == "computed"
    unknown = planned("120b", dataclasses.replace(slow_cpu, speeds=Speeds()))
    assert any("host memory 20.0 GB/s (assumed, not known)" in line for line in unknown.why)


def test_recorded_routing_says_which_experts_stay() -> None:
    counts = tuple(tuple(1000 if expert >= 20 else 1 for expert in range(32)) for _ in range(24))
    with_it = planned("20b", "rtx2080ti", routing=Routing("20b", counts))
    slots, hot = offload(with_it).taken.slots, offload(with_it).hot
    assert all(set(layer[:12]) == set(range(20, 32)) and len(layer) == slots for layer in hot)
    assert offload(with_it).taken.tok_s > offload(planned("20b", "rtx2080ti")).taken.tok_s
    assert any("by the routing recorded with 20b" in line for line in with_it.why)
    assert offload(planned("20b", "rtx2080ti")).hot == ()


def test_the_longest_context_leaves_a_tokens_experts_on_the_gpu() -> None:
    plan = planned("20b", "laptop-8gb", longest_context=True)
    assert offload(plan).taken.slots >= 4 and plan.context_tokens > planned("20b", "laptop-8gb").context_tokens
    assert planned("20b", "h100", longest_context=True).digest == planned("20b", "h100").digest


def test_a_cpu_maps_what_does_not_fit() -> None:
    plan = planned("120b", "cpu")
    way, (row,) = offload(plan).taken, plan.memory
    assert (plan.device, plan.dtype, way.kept, way.slots, plan.kernels) == ("cpu", "fp32", "file", 0, "cpu")
    assert row.device_bytes + row.host_bytes < 8 * GIB and way.disk_bytes > 0
    assert planned("120b", "cpu", dtype="bf16").dtype == "bf16"


def test_hardware_that_fits_is_not_offloaded() -> None:
    for machine in ("h100", "rtx4090", "laptop-16gb"):
        assert planned("20b", machine).offload == "none"
    with pytest.raises(NoPlanError):  # a shorter context needs no offload, and that is what is said
        planned("20b", "h100", gpu_memory_bytes=16 * GIB, context_tokens=131072)
    with pytest.raises(NoPlanError):
        planned("120b", "rtx3090x3", ranks=1)


def test_what_no_plan_without_offload_uses_is_said() -> None:
    unused = [line for line in planned("20b", "h100", misses="copied", look_ahead=2).why if "of no use" in line]
    assert [line.split(":")[0] for line in unused] == ["--misses copied", "--look-ahead"]
    assert not any("of no use" in line for line in planned("20b", "rtx2080ti", misses="computed").why)


def test_gpus_that_stay_idle_are_said() -> None:
    assert any("1 GPU stays idle" in line for line in planned("120b", "rtx3090x2").why)
    assert not any("idle" in line for line in planned("120b", "rtx3090").why)


def test_round_trip_keeps_the_digest() -> None:
    counts = tuple((1,) * 32 for _ in range(24))
    plan = planned("20b", "rtx2080ti", routing=Routing("20b", counts))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan

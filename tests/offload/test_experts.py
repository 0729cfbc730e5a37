"""Experts that are not all on the device, on the CPU as device with few slots: the same bits as if all were there.

What is left to the CPU's own experts is held to what "exact" means (README), as they sum in another order.
"""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import pytest
import torch
from forced import Forced, answers, prefill, refusals
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.engine.start import Options, start
from gptoss_launch.parallel.engine.trace import Trace
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.kernels import PLAIN, Operations, triton_mxfp4
from gptoss_launch.parallel.kernels.choose import triton_operations
from gptoss_launch.parallel.kernels.cpu_products import cpu_operations
from gptoss_launch.parallel.kernels.experts import Packed
from gptoss_launch.parallel.model.checkpoint import load
from gptoss_launch.parallel.model.comm import Alone
from gptoss_launch.parallel.offload.counts import Counts
from gptoss_launch.parallel.offload.experts import Copied, loaded, offloaded
from gptoss_launch.parallel.offload.fetched import Fetched
from gptoss_launch.parallel.offload.held import PARTS, Held
from gptoss_launch.parallel.offload.pinned import NotPinnedError, pinned
from gptoss_launch.parallel.planning.headers import read_inventory
from gptoss_launch.parallel.planning.plan import Misses, Offload, Plan, Way
from small_models import GPU, SPECS, TINY, checkpoint, plain_engine, plain_plan, prompt

Kept = Literal["memory", "file"]
SPEC = SPECS["three_blocks"]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("three_blocks", tmp_path_factory.mktemp("checkpoints"))


def way(slots: int, misses: Misses, kept: Kept = "memory") -> Way:
    return Way("cuda", slots, kept, misses, 0, 0.0, 0.0, 0.0, 0.0, 1.0)


def offloaded_engine(
    plan: Plan, offload: Offload, ops: Operations = PLAIN, graph_sizes: tuple[int, ...] = (), fetches: bool = False
) -> tuple[Engine, Counts]:
    """fetches: by a kernel, which leaves the counts as they are."""
    assert plan.checkpoint is not None
    ops, counts, slow = offloaded(offload, ops, torch.device(plan.device))
    inventory = read_inventory(Path(plan.checkpoint))
    weights = load(plan, 0, inventory, torch.device(plan.device), layout=ops.layout, experts=offload.taken.kept)
    assert slow == []
    ops, now = loaded(ops, weights.layers, counts, fetches)
    return Engine(plan, 0, weights, ops, Alone(), (graph_sizes, ()), now), counts


def greedy(engine: Engine, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, list[int]]:
    requests = [
        Request(str(seed), tuple(prompt(SPEC, 20 + seed, seed)), 24, Sampling(temperature=0.0)) for seed in seeds
    ]
    return {name: [token.id for token in tokens] for name, tokens in answers(engine, requests).items()}


def logits(engine: Engine, count: int = 8) -> torch.Tensor:
    """Of a prefill, and of tokens one by one after another prefill."""
    tokens = prompt(SPEC, count, 7)
    whole = prefill(engine, tokens, 512)
    forced = Forced(engine)
    return torch.cat([whole, *(forced.step(tokens[index : index + 1]) for index in range(count))])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("slots", "kept"), [(1, "memory"), (3, "file"), (6, "memory")])
def test_copied_experts_give_the_same_bits(
    slots: int, kept: Kept, device: Literal["cpu", "cuda"], folder: Path
) -> None:
    """Also with fewer slots than one token needs, and with steps of many tokens, which need all experts."""
    plan = plain_plan(folder, device=device)
    everything = plain_engine(plan)
    capped, counts = offloaded_engine(plan, Offload(way(slots, "copied", kept), ()))
    assert torch.equal(logits(capped), logits(everything))
    assert greedy(capped) == greedy(everything)
    assert counts.misses > 0 and (counts.hits > 0 or slots == 1)
    stalled = counts.stalled_s > 0 if device == "cuda" else counts.stalled_s == 0
    assert stalled and counts.waited_s > 0
    row_bytes = SPEC.hidden * 17 // 32 + 4  # hidden and intermediate are alike; a bias is fp32
    assert counts.moved_bytes == counts.misses * 3 * SPEC.hidden * row_bytes


def test_all_slots_never_miss(folder: Path) -> None:
    engine, counts = offloaded_engine(plain_plan(folder), Offload(way(SPEC.experts, "copied"), ()))
    logits(engine)
    assert counts.misses == 0 and counts.moved_bytes == 0 and counts.hits > 0


@pytest.mark.parametrize("device", DEVICES)
def test_experts_that_come_ahead_change_no_bit(device: Literal["cpu", "cuda"], folder: Path) -> None:
    """Steps of many tokens, which guess nothing, in between."""
    plan = plain_plan(folder, device=device)
    wanted = greedy(plain_engine(plan))
    engine, counts = offloaded_engine(plan, Offload(way(6, "copied"), (), ahead=2))
    assert greedy(engine) == wanted
    assert 0 < counts.ahead_hits <= counts.ahead


def test_a_look_ahead_is_the_next_routers_choice(folder: Path) -> None:
    """Of this layer's input; what the guess has already stays, and what is brought takes the place of the oldest."""
    engine, counts = offloaded_engine(
        plain_plan(folder), Offload(way(6, "copied"), (), ((7, 6, 5, 4, 3, 2),) * SPEC.layers, 2)
    )
    assert isinstance(engine.ops.experts, Copied)
    layers = engine.ops.experts.layers
    for place in (0, 1):  # those of random weights are ones
        layers[place] = dataclasses.replace(
            engine.weights.layers[place], mlp_norm_H=torch.rand(SPEC.hidden) * (torch.arange(SPEC.hidden) != 7)
        )
    first, second = layers[:2]
    assert isinstance(second.gate_up, Held) and SPEC.experts == 8
    before = list(second.gate_up.slots.places)  # the oldest first
    r_TH = torch.randn((1, SPEC.hidden), generator=torch.Generator().manual_seed(3))
    call = engine.ops.experts
    call(r_TH * first.mlp_norm_H, torch.ones((1, 1)), torch.tensor([[7]]), first.gate_up, first.down, 0, 7.0)
    r_TH[:, 7] = 0  # nothing is known of it
    logits_TE = PLAIN.linear(r_TH * second.mlp_norm_H, second.router_EH, second.router_bias_E)
    guessed = logits_TE[0].topk(4).indices.tolist()
    missing = [expert for expert in guessed if expert not in before][:2]
    assert counts.ahead == len(missing) > 0 and counts.ahead_hits == 0
    kept = [expert for expert in before if expert not in guessed][len(missing) :]
    assert set(second.gate_up.slots.places) == {*kept, *missing, *(one for one in guessed if one in before)}
    moved = counts.moved_bytes
    asked = torch.tensor([missing])
    call(r_TH, torch.ones(asked.shape), asked, second.gate_up, second.down, 0, 7.0)
    assert counts.ahead_hits == len(missing)
    assert counts.moved_bytes - moved in (
        0,
        *(count * moved // len(missing) for count in (1, 2)),
    )  # what came ahead next
    packed, place = second.gate_up.packed, second.gate_up.slots.places[missing[0]]
    whole = plain_engine(plain_plan(folder)).weights.layers[1].gate_up
    assert torch.equal(packed.blocks[place], whole.blocks[missing[0]])
    many_TH = torch.randn((5, SPEC.hidden))
    ahead = counts.ahead
    call(many_TH, torch.ones((5, 1)), torch.full((5, 1), 7), first.gate_up, first.down, 0, 7.0)
    assert counts.ahead == ahead


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("misses", ["copied", "computed"])
@pytest.mark.parametrize("kept", ["memory", "file"])
def test_where_experts_are_and_in_which_layout(
    kept: Kept, misses: Misses, dtype: Literal["bf16", "fp16"], device: Literal["cpu", "cuda"], folder: Path
) -> None:
    """On the device as its kernels read them; on the host so as well where they are copied from memory, and else as the
    checkpoint has them."""
    ops = dataclasses.replace(PLAIN, layout=triton_mxfp4.LAYOUT)
    plan, hot = plain_plan(folder, dtype, device=device), (6, 1, 4)
    whole = plain_engine(plan).weights.layers
    engine, _ = offloaded_engine(plan, Offload(way(3, misses, kept), (), (hot,) * SPEC.layers), ops)
    others = [expert for expert in range(SPEC.experts) if expert not in hot]
    on_host = others if (misses, kept) == ("computed", "memory") else list(range(SPEC.experts))
    for layer, held_layer in zip(whole, engine.weights.layers, strict=True):
        for all_of, held in ((layer.gate_up, held_layer.gate_up), (layer.down, held_layer.down)):
            packed = triton_mxfp4.pack(all_of.blocks, all_of.scales, all_of.bias)
            host = packed if (misses, kept) == ("copied", "memory") else all_of
            assert isinstance(held, Held)
            for part in PARTS:
                assert torch.equal(getattr(held.packed, part), getattr(packed, part)[list(hot)])
                found, wanted = getattr(held.host, part), getattr(host, part)[on_host].cpu()
                assert found.device.type == "cpu" and torch.equal(found.to(wanted.dtype), wanted)
            assert held.host.bias.dtype == (
                torch.float32 if (misses, dtype) == ("computed", "fp16") else layer.gate_up.bias.dtype
            )


def test_what_was_unused_for_longest_makes_room(folder: Path) -> None:
    engine, counts = offloaded_engine(plain_plan(folder), Offload(way(2, "copied"), (), ((5, 3),) * SPEC.layers))
    layer = engine.weights.layers[0]
    x_TH, weights_TX = torch.randn((1, SPEC.hidden)), torch.ones((1, 1))
    seen = []
    for expert in (5, 3, 0, 3, 1, 0):
        before = counts.misses
        engine.ops.experts(x_TH, weights_TX, torch.tensor([[expert]]), layer.gate_up, layer.down, 0, 7.0)
        seen.append(counts.misses - before)
    assert seen == [0, 0, 1, 0, 1, 1]  # 0 takes the place of 5, 1 that of 0


def test_a_step_that_needs_all_experts_asks_for_those_that_came_ahead(folder: Path) -> None:
    """Once: what came ahead for one step is no hit of a later one."""
    engine, counts = offloaded_engine(plain_plan(folder), Offload(way(6, "copied"), (), ahead=2), cpu_operations())
    first, second = engine.weights.layers[:2]
    one, many = torch.tensor([[0]]), torch.arange(SPEC.experts)[:, None]
    x_EH = torch.randn((SPEC.experts, SPEC.hidden), generator=torch.Generator().manual_seed(3))
    weights_EX = torch.ones((SPEC.experts, 1))
    engine.ops.experts(x_EH[:1], weights_EX[:1], one, first.gate_up, first.down, 0, 7.0)
    for _ in range(2):
        engine.ops.experts(x_EH, weights_EX, many, second.gate_up, second.down, 0, 7.0)
        assert counts.ahead_hits == counts.ahead > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fills", [0, 1])
def test_a_slot_whose_copy_failed_holds_no_expert(fills: int, device: Literal["cpu", "cuda"], folder: Path) -> None:
    """The step ends where memory for a copy is lacking, before the first product or between both; the next one asks
    for the same expert again."""
    granted = list[int]()

    def pack(*parts: torch.Tensor) -> Packed:
        if granted and granted.pop() == 0:
            raise torch.OutOfMemoryError
        return PLAIN.layout.pack(*parts)

    ops = dataclasses.replace(PLAIN, layout=dataclasses.replace(PLAIN.layout, pack=pack))
    plan = plain_plan(folder, device=device)
    engine, counts = offloaded_engine(plan, Offload(way(2, "copied", "file"), ()), ops)
    layer, whole = engine.weights.layers[0], plain_engine(plan).weights.layers[0]
    x_TH = torch.randn((1, SPEC.hidden), device=device)
    routed = x_TH, torch.ones((1, 1), device=device), torch.tensor([[5]], device=device)
    granted += [0, *[1] * fills]  # from the end
    with pytest.raises(torch.OutOfMemoryError):
        engine.ops.experts(*routed, layer.gate_up, layer.down, 0, 7.0)
    for _ in range(2):
        found = engine.ops.experts(*routed, layer.gate_up, layer.down, 0, 7.0)
        assert torch.equal(found, PLAIN.experts(*routed, whole.gate_up, whole.down, 0, 7.0))
    assert (counts.misses, counts.hits) == (2, 1) and isinstance(layer.gate_up, Held)
    assert set(layer.gate_up.slots.places.values()) == {0, 1}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("slots", "kept"), [(0, "file"), (3, "memory"), (3, "file"), (8, "memory")])
def test_experts_that_the_cpu_computes_are_exact(
    slots: int, kept: Kept, device: Literal["cpu", "cuda"], folder: Path
) -> None:
    plan = plain_plan(folder, device=device)
    wanted = logits(plain_engine(plan))
    hot = tuple(tuple(range(SPEC.experts - 1, SPEC.experts - 1 - slots, -1)) for _ in range(SPEC.layers))
    engine, counts = offloaded_engine(plan, Offload(way(slots, "computed", kept), (), hot if slots else ()))
    found = logits(engine)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    share = counts.hits / (counts.hits + counts.misses)
    assert (counts.stalled_s > 0) == (slots < SPEC.experts)
    assert share == pytest.approx(slots / SPEC.experts, abs=0.2) and (share > 0) == (slots > 0)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_that_read_all_at_one_go_give_the_same_bits(
    slots: int, dtype: Literal["fp32", "bf16"], folder: Path
) -> None:
    """With fewer slots than a token needs, so that all experts are where they are in a whole model."""
    plan, ops = plain_plan(folder, dtype), cpu_operations()
    engine, counts = offloaded_engine(plan, Offload(way(slots, "copied"), ()), ops)
    assert torch.equal(logits(engine), logits(plain_engine(plan, ops)))
    assert counts.misses > 0 and counts.hits > 0


def test_any_kernels_can_read_the_slots(folder: Path) -> None:
    """Those of the C++ experts, which are told places in the cache for expert numbers and add up in their order."""
    plan, ops = plain_plan(folder), cpu_operations()
    wanted = logits(plain_engine(plan, ops))
    engine, counts = offloaded_engine(plan, Offload(way(6, "copied"), ()), ops)
    assert (logits(engine) - wanted).abs().max() <= 1e-5 * wanted.abs().max() and counts.misses > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("slots", "kept"), [(3, "memory"), (6, "memory"), (6, "file")])
def test_tritons_kernels_give_the_same_bits_from_any_slot(slots: int, kept: Kept, folder: Path) -> None:
    """Prompts, which need all experts of a layer, and single tokens, which find or bring theirs in slots."""
    plan = dataclasses.replace(plain_plan(folder, "bf16", device="cuda"), kernels="triton")
    ops = triton_operations()
    engine, counts = offloaded_engine(plan, Offload(way(slots, "copied", kept), ()), ops)
    assert torch.equal(logits(engine), logits(plain_engine(plan, ops)))
    assert counts.misses > 0 and counts.hits > 0


@pytest.mark.parametrize(
    ("device", "slots"),
    [
        pytest.param("cpu", 6, marks=NO_GPU),  # 10 s by the interpreter
        pytest.param("cpu", 1, marks=(NO_GPU, pytest.mark.slow)),
        *(pytest.param("cuda", slots, marks=GPU) for slots in (1, 3, 6, 8)),
    ],
)
def test_experts_that_the_device_brings_itself_give_the_same_bits(
    device: Literal["cpu", "cuda"], slots: int, folder: Path
) -> None:
    """Prompts, which gather all that they need, and decodes of one, two and three, on a GPU as CUDA graphs."""
    on_gpu = device == "cuda"
    dtype, ops = ("bf16", triton_operations()) if on_gpu else ("fp32", cpu_operations())
    plan = dataclasses.replace(plain_plan(folder, dtype, device=device), kernels="triton" if on_gpu else "cpu")
    everything = plain_engine(plan, ops)
    sizes = (1, 2, 3) if on_gpu else ()
    engine, _ = offloaded_engine(plan, Offload(way(slots, "copied"), ()), ops, sizes, fetches=True)
    assert isinstance(engine.ops.experts, Fetched)
    if on_gpu:  # C++ experts sum up in the order of their places
        assert torch.equal(logits(engine), logits(everything))
    else:
        assert (logits(engine) - logits(everything)).abs().max() <= 1e-5
    assert greedy(engine) == greedy(everything)
    counts = engine.experts()
    assert counts.hits > 0 and (counts.misses > 0) == (slots < SPEC.experts)
    if not on_gpu:  # Triton's layout rounds up
        assert counts.moved_bytes == counts.misses * 3 * SPEC.hidden * (SPEC.hidden * 17 // 32 + 4)
    assert (counts.stalled_s > 0) == (on_gpu and counts.misses > 0) and counts.waited_s == 0


def test_the_host_copies_what_the_device_cannot_read(folder: Path) -> None:
    """From the file, or ahead of a layer."""
    plan, ops = plain_plan(folder), cpu_operations()
    for offload in (Offload(way(3, "copied", "file"), ()), Offload(way(6, "copied"), (), ahead=1)):
        assert isinstance(offloaded_engine(plan, offload, ops, fetches=True)[0].ops.experts, Copied)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_narrow_dtypes(dtype: Literal["fp16", "bf16"], folder: Path) -> None:
    """Experts copied: the same bits. Computed by the CPU, in fp32: near."""
    plan = plain_plan(folder, dtype)
    wanted = logits(plain_engine(plan), 4)
    assert torch.equal(logits(offloaded_engine(plan, Offload(way(2, "copied"), ()))[0], 4), wanted)
    found = logits(offloaded_engine(plan, Offload(way(2, "computed"), ()))[0], 4)
    assert (found[0] - wanted[0]).float().norm() < 0.1 * wanted[0].float().norm()


@pytest.mark.parametrize("offload", [Offload(way(3, "copied"), ()), Offload(way(2, "computed"), ())])
def test_a_rank_starts_with_it(offload: Offload, tmp_path: Path) -> None:
    plan = dataclasses.replace(plain_plan(TINY), offload=offload)
    engine, _, ready = start(plan, 0, Options(), Trace(tmp_path / "trace"), lambda done, total: None)
    assert any("not all experts are on the GPU" in way for way in ready.slow_paths)
    request = Request("a", tuple(prompt(plan.spec, 9)), 12, Sampling(temperature=0.0))
    wanted = answers(plain_engine(plain_plan(TINY)), [request])
    assert answers(engine, [request]) == wanted


def test_a_cpu_reads_experts_from_the_mapped_file(tmp_path: Path) -> None:
    mapped = dataclasses.replace(way(0, "computed", "file"), device="cpu")
    plan = dataclasses.replace(plain_plan(TINY), offload=Offload(mapped, ()), kernels="cpu")
    engine, _, ready = start(plan, 0, Options(), Trace(tmp_path / "trace"), lambda done, total: None)
    assert ready.slow_paths == ()
    request = Request("a", tuple(prompt(plan.spec, 9)), 12, Sampling(temperature=0.0))
    assert answers(engine, [request]) == answers(plain_engine(plain_plan(TINY)), [request])
    blocks = engine.weights.layers[0].gate_up.blocks
    maps = Path("/proc/self/maps").read_text().splitlines()
    (line,) = (
        line
        for line in maps
        if int(line.split("-")[0], 16) <= blocks.data_ptr() < int(line.split()[0].split("-")[1], 16)
    )
    assert line.endswith("model.safetensors")


def test_a_mapped_file_that_is_cut_is_named_before_it_is_read(tmp_path: Path) -> None:
    """Reading on would end the process by SIGBUS."""
    folder = checkpoint("three_blocks", tmp_path)
    mapped = dataclasses.replace(way(0, "computed", "file"), device="cpu")
    plan = dataclasses.replace(plain_plan(folder), offload=Offload(mapped, ()), kernels="cpu")
    engine, _, _ = start(plan, 0, Options(), Trace(tmp_path / "trace"), lambda done, total: None)
    request = Request("a", tuple(prompt(SPEC, 9)), 2, Sampling(temperature=0.0))
    assert len(answers(engine, [request])["a"]) == 2
    file = folder / "model.safetensors"
    whole = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(whole + 4096)
        assert len(answers(engine, [request])["a"]) == 2
        opened.truncate(whole // 2)
        said = f"model.safetensors has shrunk from {whole} to {whole // 2} bytes"
        with pytest.raises(UserError, match=said):
            answers(engine, [request])
        opened.truncate(whole)  # zeros where experts were
    refused = refusals(engine, request)
    assert len(refused) == 2 and all(said in one for one in refused)


@pytest.mark.parametrize("grows_again", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("misses", ["computed", "copied"])
def test_a_mapped_file_that_is_cut_while_it_is_read_ends_the_requests_alone(
    misses: Misses, device: Literal["cpu", "cuda"], grows_again: bool, tmp_path: Path
) -> None:
    """Also where it has its size again before the step is over: what was read were zeros."""
    folder = checkpoint("three_blocks", tmp_path)
    file = folder / "model.safetensors"
    whole = file.stat().st_size
    plan = dataclasses.replace(plain_plan(folder, device=device), offload=Offload(way(3, misses, "file"), ()))
    engine, _, ready = start(plan, 0, Options(), Trace(tmp_path / "trace"), lambda done, total: None)
    assert ready.notes == ()
    request = Request("a", tuple(prompt(SPEC, 9)), 2, Sampling(temperature=0.0))
    assert len(answers(engine, [request])["a"]) == 2
    attend, add_norm = engine.ops.attend, engine.ops.add_norm

    def cut(*given):
        os.truncate(file, 4096)
        return attend(*given)

    def grown(*given):  # once a step, after the last layer
        os.truncate(file, whole if grows_again else 4096)
        return add_norm(*given)

    engine.ops = dataclasses.replace(engine.ops, attend=cut, add_norm=grown)
    refused = refusals(engine, request)
    said = "was cut short for a while" if grows_again else f"has shrunk from {whole} to 4096 bytes"
    assert len(refused) == 2 and all(f"model.safetensors {said}" in one for one in refused)


@pytest.mark.parametrize(("dtype", "kernels"), [("fp32", "plain"), ("bf16", "triton")])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_memory_that_cannot_be_pinned_is_copied_from_all_the_same(
    device: Literal["cuda"],
    dtype: Literal["fp32", "bf16"],
    kernels: Literal["plain", "triton"],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused after some: the same tokens, by the host, and it is said."""
    granted = iter(range(5))

    def sometimes(tensor: torch.Tensor) -> torch.Tensor:
        if next(granted, None) is None:
            raise NotPinnedError("refused")
        return pinned(tensor)

    monkeypatch.setattr("gptoss_launch.parallel.offload.pinned.pinned", sometimes)
    whole = dataclasses.replace(plain_plan(folder, dtype, device=device), kernels=kernels)
    plan = dataclasses.replace(whole, offload=Offload(way(3, "copied"), ()))
    engine, _, ready = start(plan, 0, Options(), Trace(tmp_path / "trace"), lambda done, total: None)
    assert ready.slow_paths[0].startswith(
        "experts in host memory that is not pinned, so that each copy is staged: refused"
    )
    assert isinstance(engine.ops.experts, Copied) and not engine.graphs.of_decodes(1).tokens
    request = Request("a", tuple(prompt(plan.spec, 9)), 12, Sampling(temperature=0.0))
    ops = triton_operations() if kernels == "triton" else PLAIN
    assert answers(engine, [request]) == answers(plain_engine(whole, ops), [request])

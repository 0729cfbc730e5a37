"""A rank's load takes its own slices and one tensor of host memory more, and asks the files for nothing else; what it
gets is what the shard table says, in the layout of whoever reads it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gptoss_launch.parallel.kernels import triton_mxfp4
from gptoss_launch.parallel.kernels.experts import LAYOUT, Layout, Packed
from gptoss_launch.parallel.kernels.weight_only import CODES, Narrow, Weight, narrowed
from gptoss_launch.parallel.model import files
from gptoss_launch.parallel.model.checkpoint import load
from gptoss_launch.parallel.model.weights import Weights
from gptoss_launch.parallel.planning.headers import Entry, read_inventory
from gptoss_launch.parallel.planning.memory import weights_bytes
from gptoss_launch.parallel.planning.plan import Kept, Plan
from gptoss_launch.parallel.planning.shards import is_zero_here, local_bytes, local_slices, table
from safetensors.torch import load_file
from small_models import GPU, checkpoint, plain_plan
from thread_ranks import with_ranks
from torch import Tensor

SLACK_BYTES = 12 << 20  # what the allocator and Python's own objects take on the way

# Anonymous memory alone: mapped files may stay in the page cache for as long as nobody else wants the room.
LOAD = """
import sys, threading, time
from pathlib import Path
import torch
from gptoss_launch.parallel.model import files
from gptoss_launch.parallel.model.checkpoint import load
from gptoss_launch.parallel.planning.headers import Entry, read_inventory
from gptoss_launch.parallel.planning.plan import Plan

def anonymous_bytes():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

def watch():
    global most
    while True:
        most = max(most, anonymous_bytes())
        time.sleep(0.0005)

plan, rank = Plan.load(Path(sys.argv[1])), int(sys.argv[2])
inventory = read_inventory(Path(plan.checkpoint))
torch.ones(1 << 20).to(torch.bfloat16).sum()
before = most = anonymous_bytes()
threading.Thread(target=watch, daemon=True).start()
read = []
weights = load(plan, rank, inventory, torch.device("cpu"), lambda done, total: read.append(done))
time.sleep(0.05)
print(most - before, read[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("ranks", "ep"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])
def test_peak_host_memory(ranks: int, ep: int, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = checkpoint("true_width", tmp_path_factory.getbasetemp())
    plan = with_ranks(plain_plan(folder, "bf16"), ranks, ep)
    plan.save(tmp_path / "plan.json")
    rank = ranks - 1
    command = [sys.executable, "-c", LOAD, str(tmp_path / "plan.json"), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    most, read = map(int, done.stdout.split())
    own = weights_bytes(plan.spec, plan.mesh, rank, "bf16")
    rows = [row for row in table(plan.spec) if not is_zero_here(row, plan.mesh, rank)]
    largest = max(local_bytes(row, plan.mesh, rank) for row in rows)
    print(f"rank {rank} of {ranks}, ep {ep}: peak {most:,} bytes; its slices {own:,} and one tensor {largest:,}")
    assert read == sum(local_bytes(row, plan.mesh, rank) for row in rows)
    assert most <= own + largest + SLACK_BYTES


def oracle(plan: Plan, rank: int) -> dict[str, Tensor]:
    """Every tensor of `rank` in the dtype of the files: whole tensors, cut as the table says."""
    assert plan.checkpoint is not None
    whole, made = load_file(Path(plan.checkpoint) / "model.safetensors"), {}
    for row in table(plan.spec):
        tensor = whole[row.published]
        if plan.expert_order and row.by_expert:
            tensor = tensor[list(plan.expert_order[int(row.name.split(".")[1])])]
        tensor = tensor[local_slices(row, plan.mesh, rank)].contiguous()
        made[row.name] = torch.zeros_like(tensor) if is_zero_here(row, plan.mesh, rank) else tensor
    return made


def assert_are(weights: Weights, wanted: dict[str, Tensor], layout: Layout, kept: Kept, dtype: torch.dtype) -> None:
    def same(found: Tensor, tensor: Tensor) -> None:
        assert found.dtype == tensor.dtype and found.is_contiguous() and torch.equal(found.cpu(), tensor)

    def matrix(found: Weight, *names: str) -> None:
        tensor = torch.cat([wanted[name] for name in names]).to(dtype)
        if kept is None:
            assert isinstance(found, Tensor)
            return same(found, tensor)
        assert isinstance(found, Narrow) and found.dtype == dtype
        codes = narrowed(tensor, CODES[kept], dtype)
        same(found.codes_OI.view(torch.uint8), codes.codes_OI.view(torch.uint8))
        same(found.scale_O, codes.scale_O)

    def product(found: Packed, name: str) -> None:
        blocks, scales, bias = (wanted[f"{name}.{part}"] for part in ("blocks", "scales", "bias"))
        packed: Any = layout.pack(blocks, scales, bias.to(dtype))
        assert type(found) is type(packed)
        for field in dataclasses.fields(packed):
            same(getattr(found, field.name), getattr(packed, field.name))

    matrix(weights.embed_VH, "embed")
    matrix(weights.head_VH, "head")
    same(weights.norm_H, wanted["norm"].float())
    for number, layer in enumerate(weights.layers):
        prefix = f"layers.{number}."
        matrix(layer.qkv_QH, *(f"{prefix}{letter}.weight" for letter in "qkv"))
        matrix(layer.out_HQ, f"{prefix}o.weight")
        same(layer.qkv_bias_Q, torch.cat([wanted[f"{prefix}{letter}.bias"] for letter in "qkv"]).to(dtype))
        same(layer.out_bias_H, wanted[f"{prefix}o.bias"].to(dtype))
        same(layer.router_EH, wanted[f"{prefix}router.weight"].to(dtype))
        same(layer.router_bias_E, wanted[f"{prefix}router.bias"].to(dtype))
        for name, found in (("attn_norm", layer.attn_norm_H), ("mlp_norm", layer.mlp_norm_H), ("sinks", layer.sinks_N)):
            same(found, wanted[f"{prefix}{name}"].float())
        product(layer.gate_up, f"{prefix}gate_up")
        product(layer.down, f"{prefix}down")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("layout", [LAYOUT, triton_mxfp4.LAYOUT], ids=["plain", "triton"])
@pytest.mark.parametrize(
    ("ranks", "ep", "ordered", "kept"),
    [(1, 1, False, None), (2, 1, False, "int8"), (3, 1, True, "bf16"), (3, 3, True, None), (4, 2, False, "fp8")],
)
def test_every_rank_holds_what_the_table_says(
    ranks: int,
    ep: int,
    ordered: bool,
    kept: Kept,
    layout: Layout,
    device: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Experts 3/3/2, blocks 1/1/1 of 3, or 2/1."""
    plan = with_ranks(plain_plan(checkpoint("three_blocks", tmp_path_factory.getbasetemp()), "bf16"), ranks, ep)
    order = (3, 1, 4, 0, 5, 7, 2, 6)
    orders = tuple(order[layer:] + order[:layer] for layer in range(plan.spec.layers))
    plan = dataclasses.replace(plan, expert_order=orders if ordered else ())
    assert plan.checkpoint is not None
    inventory = read_inventory(Path(plan.checkpoint))
    for rank in range(ranks):
        weights = load(plan, rank, inventory, torch.device(device), layout=layout, kept=kept)
        assert weights.embed_VH.device.type == weights.layers[0].down.blocks.device.type == device
        assert_are(weights, oracle(plan, rank), layout, kept, torch.bfloat16)


def test_all_tensors_are_made_before_any_is_filled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """On a GPU what is made meanwhile and goes away again would leave gaps between them."""
    plan = plain_plan(checkpoint("three_blocks", tmp_path_factory.getbasetemp()))
    calls: list[str] = []

    def room(*arguments: Any) -> Packed:
        calls.append("room")
        return LAYOUT.room(*arguments)

    def put(*arguments: Any) -> None:
        calls.append("put")
        LAYOUT.put(*arguments)

    assert plan.checkpoint is not None
    inventory = read_inventory(Path(plan.checkpoint))
    load(plan, 0, inventory, torch.device("cpu"), layout=Layout(LAYOUT.pack, room, put))
    products = 2 * plan.spec.layers
    assert calls == ["room"] * products + ["put"] * products * plan.spec.experts


NARROW = {"gate_up.bias", "down.blocks", "down.scales", "o.weight"}


@pytest.mark.parametrize(("ranks", "ep", "narrow"), [(1, 1, set()), (2, 2, {"o.weight"}), (3, 1, NARROW)])
def test_bytes_that_are_read(
    ranks: int,
    ep: int,
    narrow: set[str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every byte of the slices once, and no other; but for narrow columns, which are copied from the mapped file."""
    plan = with_ranks(plain_plan(checkpoint("three_blocks", tmp_path_factory.getbasetemp()), "bf16"), ranks, ep)
    assert plan.checkpoint is not None
    inventory, read, views = read_inventory(Path(plan.checkpoint)), list[int](), set[Entry]()
    true_preadv, true_mapped = os.preadv, files.mapped

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        read.append(sum(buffer.nbytes for buffer in buffers))
        return true_preadv(file, buffers, offset)

    def mapped(entry: Entry) -> Tensor:
        views.add(entry)
        return true_mapped(entry)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(files, "mapped", mapped)
    load(plan, ranks - 1, inventory, torch.device("cpu"))
    rows = [row for row in table(plan.spec) if not is_zero_here(row, plan.mesh, ranks - 1)]
    assert {row.name.split(".", 2)[2] for row in rows if inventory[row.published] in views} == narrow
    whole = [row for row in rows if inventory[row.published] not in views]
    assert sum(read) == sum(local_bytes(row, plan.mesh, ranks - 1) for row in whole)

"""A checkpoint whose experts are bf16, as Hugging Face saves it, is loaded in MXFP4: as our export would have it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.kernels.quantize import quantize
from gptoss_launch.parallel.model.checkpoint import load
from gptoss_launch.parallel.planning.headers import check_inventory, read_inventory
from gptoss_launch.parallel.planning.shards import Mesh, local_slices, table
from safetensors.torch import load_file, save_file
from small_models import SPECS, TINY, checkpoint, plain_plan
from thread_ranks import with_ranks

SPEC = SPECS["three_blocks"]


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder, and the values [experts, out, in] of each product by its published name. Values of any size: nothing
    that MXFP4 could hold exactly."""
    folder = tmp_path_factory.mktemp("wide")
    packed = checkpoint("three_blocks", tmp_path_factory.mktemp("packed"))
    tensors, values = load_file(packed / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith("_blocks")]:
        experts, rows, blocks, _ = tensors.pop(name).shape
        tensors.pop(name.replace("_blocks", "_scales"))
        name = name.removesuffix("_blocks")
        values[name] = (torch.randn((experts, rows, blocks * 32), generator=generator) * 0.1).bfloat16()
        tensors[name] = values[name].transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    return folder, values


@pytest.mark.parametrize(("ranks", "ep", "rank"), [(1, 1, 0), (3, 1, 1), (2, 2, 1)])
def test_equal_to_the_export(ranks: int, ep: int, rank: int, wide: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, values = wide
    inventory = read_inventory(folder)
    check_inventory(SPEC, inventory, folder, quantizes=True)
    plan = with_ranks(plain_plan(folder), ranks, ep)
    seen: list[tuple[int, int]] = []
    weights = load(plan, rank, inventory, torch.device("cpu"), lambda done, total: seen.append((done, total)))
    rows = {row.name: row for row in table(SPEC)}
    for layer, held in enumerate(weights.layers):
        for product, found in (("gate_up", held.gate_up), ("down", held.down)):
            row = rows[f"layers.{layer}.{product}.blocks"]
            blocks, scales = quantize(values[row.published.removesuffix("_blocks")])
            here = local_slices(row, Mesh(ranks, ep), rank)
            assert torch.equal(found.blocks, blocks[here]) and torch.equal(found.scales, scales[here[:3]])
            assert found.blocks.is_contiguous() and found.scales.is_contiguous()
    assert seen[-1][0] == seen[-1][1]


def test_what_cannot_be(wide: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = wide
    inventory = read_inventory(folder)
    with pytest.raises(UserError, match="no tensor .*gate_up_proj_blocks"):  # training reads packed experts alone
        check_inventory(SPEC, inventory, folder)
    with pytest.raises(UserError, match="bf16: experts can be read from the file"):
        load(plain_plan(folder), 0, inventory, torch.device("cpu"), experts="file")
    name = "model.layers.0.mlp.experts.down_proj"
    inventory[name] = dataclasses.replace(inventory[name], shape=(1, 2, 3))
    with pytest.raises(UserError, match=r"down_proj is BF16 \[1, 2, 3\], wanted BF16 \[8, 96, 96\]"):
        check_inventory(SPEC, inventory, folder, quantizes=True)

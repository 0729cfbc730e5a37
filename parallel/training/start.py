"""What a run begins with: the frozen weights of a checkpoint on one device, or all of its weights as parameters.

Knows nothing of settings, data or the loop.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.experts import LAYOUT, Packed, Shape
from ..kernels.mxfp4 import dequantize
from ..model.checkpoint import load
from ..model.files import mapped
from ..model.weights import Weights
from ..offload.pinned import pinned
from ..planning.headers import check_inventory, read_inventory
from ..planning.plan import DType
from ..planning.shards import Mesh, table
from ..planning.spec import Spec
from .model import parts

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class OneDevice:
    """All of the model on one device, as `checkpoint.load` wants to be told."""

    spec: Spec
    dtype: DType
    mesh: Mesh = Mesh()
    expert_order: tuple[tuple[int, ...], ...] = ()


def load_frozen(
    spec: Spec, folder: Path, dtype: DType, device: torch.device, progress: Progress, host_layers: int = 0
) -> Weights:
    """Weights in the compute dtype, experts packed as they are in the files. The embedding is in host memory, since a
    pack needs few of its rows; experts of the first `host_layers` wait there for whoever computes with them. Raises
    UserError for a broken folder."""
    inventory = read_inventory(folder)
    check_inventory(spec, inventory, folder)
    products = itertools.count()

    def room(shape: Shape, dtype: torch.dtype, device: torch.device) -> Packed:
        """Two of each layer, one layer after the other."""
        if next(products) >= 2 * host_layers:
            return LAYOUT.room(shape, dtype, device)
        keep = pinned if device.type == "cuda" else lambda one: one
        there = LAYOUT.room(shape, dtype, torch.device("cpu"))
        return Packed(keep(there.blocks), keep(there.scales), there.bias.to(device))

    layout, cpu = replace(LAYOUT, room=room), torch.device("cpu")
    return load(OneDevice(spec, dtype), 0, inventory, device, progress, layout, embedding_device=cpu)


def parameter_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every trained tensor of a full run: the shard table's, with one NAME.weight [E, O, I] for the
    packed pair NAME.blocks and NAME.scales."""
    shapes = {}
    for row in table(spec):
        if row.name.endswith(".blocks"):
            shapes[row.name.removesuffix("blocks") + "weight"] = (*row.shape[:-2], row.shape[-2] * row.shape[-1] * 2)
        elif not row.name.endswith(".scales"):
            shapes[row.name] = row.shape
    return shapes


def read_parameters(
    spec: Spec, folder: Path, device: torch.device, progress: Progress
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(part, its weights in fp32 by the names of `parameter_shapes`, experts dequantized), one part after the other."""
    inventory = read_inventory(folder)
    check_inventory(spec, inventory, folder)
    rows = {row.name: row for row in table(spec)}
    shapes = parameter_shapes(spec)
    groups = parts(shapes)

    def stored(name: str) -> Tensor:
        return mapped(inventory[rows[name].published]).to(device)

    def read(name: str) -> Tensor:
        if name in rows:
            return stored(name).float()
        product = name.removesuffix("weight")
        weight = dequantize(stored(f"{product}blocks"), stored(f"{product}scales"), torch.float32)
        return weight.view(shapes[name])

    for number, (part, names) in enumerate(groups.items()):
        yield part, {name: read(name) for name in names}
        progress(number + 1, len(groups))

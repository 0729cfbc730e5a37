"""A run's result as what others read: a PEFT adapter, or a whole checkpoint in bf16 or in the published MXFP4 layout.

Whole checkpoints are written a layer at a time through the names of the shard table. transformers' own save_pretrained
is not used: after dequantizing it silently writes checkpoints that come back with random experts.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..kernels.mxfp4 import dequantize
from ..kernels.quantize import quantize
from ..model.files import mapped
from ..model.random_checkpoint import SINGLE_FILE_LIMIT_BYTES
from ..planning.headers import INDEX, SINGLE_FILE, check_inventory, read_inventory
from ..planning.shards import table
from . import adapters
from .checkpoints import ranks_of, read_values
from .job import Job
from .products import LowRank

Format = Literal["adapter", "bf16", "mxfp4"]
CONFIG = "config.json"
_NO_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", CONFIG, "*.bin")


def export_adapter(job: Job, saved: Path, out: Path) -> None:
    """The two files that PEFT reads. Raises UserError for a run that trained all weights, and for a checkpoint that is
    not whole."""
    if job.mode != "lora":
        raise UserError("this run trained all weights: there is no adapter", "--format bf16 or mxfp4")
    read_values(job, saved)
    for name in (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE):
        shutil.copyfile(saved / name, out / name)


def export_checkpoint(
    job: Job, saved: Path, out: Path, layout: Literal["bf16", "mxfp4"], progress: Callable[[int, int], None]
) -> None:
    """A folder like the one that was trained from. bf16: experts as transformers names them, [E, in, out], with no
    quantization in config.json. mxfp4: the published layout; experts that were trained are rounded to it.

    progress: (layers done, layers in all).
    """
    source = Path(job.checkpoint)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    groups = _groups(job)
    for number, (file, names) in enumerate(groups.items()):
        tensors: dict[str, Tensor] = {}
        for name, tensor in _merged(job, saved, names, layout):
            tensors[name] = tensor.contiguous()
        save_file(tensors, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)  # safetensors leaves it readable by the owner alone
        weight_map |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        progress(number + 1, len(groups))
    if list(groups) != [SINGLE_FILE]:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    config = json.loads((source / CONFIG).read_text("utf-8"))
    if layout == "bf16":
        config.pop("quantization_config", None)
    (out / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for path in source.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in _NO_WEIGHTS):
            shutil.copyfile(path, out / path.name)


def _groups(job: Job) -> dict[str, list[str]]:
    """File -> the tensors in it, by our names: all in one, or a file a layer and one for the rest."""
    rows, groups = table(job.spec), dict[str, list[str]]()
    if sum(row.nbytes for row in rows) <= SINGLE_FILE_LIMIT_BYTES:
        return {SINGLE_FILE: [row.name for row in rows]}
    for row in rows:
        prefix, _, rest = row.name.partition(".")
        file = (
            f"model-layer-{int(rest.split('.')[0]):05d}.safetensors" if prefix == "layers" else "model-rest.safetensors"
        )
        groups.setdefault(file, []).append(row.name)
    return groups


def _merged(job: Job, saved: Path, names: list[str], layout: Literal["bf16", "mxfp4"]) -> Iterator[tuple[str, Tensor]]:
    """(published name, tensor) of each of `names`, as `layout` has it."""
    rows = {row.name: row for row in table(job.spec)}
    values = read_values(job, saved)
    added = adapters.pairs(values, ranks_of(job)) if job.mode == "lora" else {}
    folder = Path(job.checkpoint)
    inventory = read_inventory(folder)
    check_inventory(job.spec, inventory, folder)

    def stored(name: str) -> Tensor:
        return mapped(inventory[rows[name].published])

    for name in names:
        published = rows[name].published
        product = name.rpartition(".")[0]
        if name.endswith(".scales"):
            continue  # with its blocks
        if not name.endswith(".blocks"):
            tensor = values[name] if job.mode == "full" else _plus(stored(name), added, product, name)
            yield published, tensor.to(torch.bfloat16)
            continue
        touched = job.mode == "full" or product in added
        if layout == "mxfp4" and not touched:
            yield published, stored(name)
            yield rows[f"{product}.scales"].published, stored(f"{product}.scales")
            continue
        weight = _expert_weight(stored, values, added, product)
        if layout == "bf16":
            yield published.removesuffix("_blocks"), weight.transpose(1, 2).to(torch.bfloat16)
        else:
            blocks, scales = quantize(weight)
            yield published, blocks
            yield rows[f"{product}.scales"].published, scales


def _plus(weight: Tensor, added: Mapping[str, LowRank], product: str, name: str) -> Tensor:
    if not name.endswith(".weight") or product not in added:
        return weight
    pair = added[product]
    return weight.float() + pair.scale * pair.b @ pair.a


def _expert_weight(
    stored: Callable[[str], Tensor], values: Mapping[str, Tensor], added: Mapping[str, LowRank], product: str
) -> Tensor:
    """[E, O, I] fp32, what was trained merged in. Of a full run: as it was trained, in the nearest MXFP4 values."""
    if f"{product}.weight" in values:
        return dequantize(*quantize(values[f"{product}.weight"]), torch.float32)
    weight = dequantize(stored(f"{product}.blocks"), stored(f"{product}.scales"), torch.float32)
    if product not in added:
        return weight
    pair = added[product]
    return torch.baddbmm(weight, pair.b, pair.a, alpha=pair.scale)

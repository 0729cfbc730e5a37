"""What is in a checkpoint of a run: all that is trained and its moments, in fp32, by name.

    state.json                                        the step
    adapter_config.json  adapter_model.safetensors    of a LoRA run: PEFT's files
    parameters-PART.safetensors                       of a full run, a file for each part of the model
    optimizer-PART.safetensors                        AdamW's moments

Nothing in it depends on how many ranks wrote it or on how ZeRO had cut it, so that any number of ranks can go on with
it; a universal checkpoint in DeepSpeed's sense, without a conversion. Does not know when one is written.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from . import adapters
from .job import Job
from .model import part_of, parts
from .saves import save, saves
from .start import parameter_shapes
from .updates import MOMENTS, Kept, Updates
from .world import World

STATE_FILE = "state.json"
VALUE_BYTES = 4 * (1 + len(MOMENTS))  # of each trained value


def ranks_of(job: Job) -> dict[adapters.Target, adapters.Rank]:
    ranks: dict[adapters.Target, adapters.Rank] = {}
    if job.attention_rank:
        ranks["attention"] = adapters.Rank(job.attention_rank, job.attention_alpha)
    if job.expert_rank:
        ranks["experts"] = adapters.Rank(job.expert_rank, job.expert_alpha)
    return ranks


def write_save(
    job: Job, run: Path, step: int, leaves: Mapping[str, Tensor], values: int, updates: Updates, world: World
) -> Path:
    """The folder of `step`. Every rank calls it; each writes some of the parts. values: how many are trained."""

    def write(folder: Path) -> list[str]:
        adapter: dict[str, Tensor] = {}
        written: list[str] = []

        def keep(name: str, tensors: dict[str, Tensor]) -> None:
            save_file(tensors, folder / name)
            written.append(name)

        for number, (part, names) in enumerate(parts(leaves).items()):
            mine = number % world.size == world.rank
            moments, parameters = {}, {}
            for name in names:
                one = updates.read(name)
                if job.mode == "lora" and world.first:
                    adapter[name] = one.value.cpu()
                if mine:
                    moments |= {f"{moment}.{name}": getattr(one, moment).cpu() for moment in MOMENTS}
                    parameters[name] = one.value.cpu()
            if mine:
                keep(f"optimizer-{part}.safetensors", moments)
                if job.mode == "full":
                    keep(f"parameters-{part}.safetensors", parameters)
        if world.first:
            if job.mode == "lora":
                adapters.write_adapter(folder, adapter, ranks_of(job), job.model)
                written += [adapters.CONFIG_FILE, adapters.WEIGHTS_FILE]
            (folder / STATE_FILE).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
            written.append(STATE_FILE)
        return written

    return save(run, step, write, VALUE_BYTES * values, job.keep_last, world)


def read_values(job: Job, folder: Path) -> dict[str, Tensor]:
    """All that was trained, by name, on the CPU. Raises UserError for a checkpoint that is not whole."""
    return {name: tensor for _, tensors in _values(job, folder) for name, tensor in tensors.items()}


def _values(job: Job, folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if job.mode == "lora":
        with _whole(folder):
            adapter, _ = adapters.read_adapter(folder, job.spec)
        yield from adapters.by_part(adapter)
        return
    shapes = parameter_shapes(job.spec)
    for part, names in parts(shapes).items():  # in the order in which a run begins
        file = f"parameters-{part}.safetensors"
        with _whole(folder):
            tensors = load_file(folder / file)
            of_part = {name: tensors[name] for name in names}
        for name, tensor in of_part.items():
            if tuple(tensor.shape) != shapes[name]:
                raise UserError(
                    f"{folder / file}: {name} is {list(tensor.shape)}, wanted {list(shapes[name])}",
                    "is it of another model?",
                )
        yield part, of_part


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Names the checkpoint where a file of it is gone, cut or not what it should be, and the one before it."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        before = [str(path) for _, path in saves(folder.parent) if path.name < folder.name]
        hint = f"{before[-1]} is the one before" if before else "there is none before it"
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} is not whole: {reason}", f"remove it and start again: {hint}") from None


@dataclass(frozen=True)
class Saved:
    """A checkpoint to go on from. values: (device) -> (part, its tensors), as a run begins with them. kept: by name; to
    be asked part by part."""

    steps: int
    values: Callable[[torch.device], Iterator[tuple[str, dict[str, Tensor]]]]
    kept: Callable[[str], Kept]


def read_save(job: Job, folder: Path) -> Saved:
    """Raises UserError, at once or from what it returns, for a checkpoint that is not whole."""
    with _whole(folder):
        steps = int(json.loads((folder / STATE_FILE).read_text("utf-8"))["step"])
    adapter = read_values(job, folder) if job.mode == "lora" else {}
    opened: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def values(device: torch.device) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for part, tensors in _values(job, folder):
            yield part, {name: tensor.to(device) for name, tensor in tensors.items()}

    def kept(name: str) -> Kept:
        part = part_of(name)
        if part not in opened:
            opened.clear()  # one part at a time in memory
            with _whole(folder):
                of_part = adapter or load_file(folder / f"parameters-{part}.safetensors")
                opened[part] = (of_part, load_file(folder / f"optimizer-{part}.safetensors"))
        found, moments = opened[part]
        with _whole(folder):
            of_name = [moments[f"{moment}.{name}"] for moment in MOMENTS]
            for moment in of_name:
                if moment.shape != found[name].shape:
                    raise ValueError(f"moments of {name} are {list(moment.shape)}, wanted {list(found[name].shape)}")
            return Kept(found[name], *of_name)

    return Saved(steps, values, kept)

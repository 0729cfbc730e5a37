"""What a run trains: the model with its trained tensors, and how they are updated, as they are before the first step or
in a checkpoint.

Knows nothing of data or of the loop.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..model.dtypes import TORCH_DTYPE
from ..model.weights import Weights
from . import adapters, gate, zero
from .batch import Pack
from .checkpoints import ranks_of, read_save
from .job import Job
from .model import Model, full_model, lora_model
from .optimizers import make_optimizer
from .start import load_frozen, read_parameters
from .updates import Replicated, Updates
from .world import World


@dataclass(frozen=True)
class Trainee:
    """leaves: what is trained, by name, or this rank's share of it. values: how many values of each part are trained.
    model: reads the leaves; they are updated in place. serving: the pass that serves, on one document; None where no
    weights are loaded that could. steps: that were taken already."""

    leaves: Mapping[str, Tensor]
    values: Mapping[str, int]
    model: Model
    updates: Updates
    serving: Callable[[Pack], float] | None
    steps: int


def load_trainee(job: Job, world: World, saved: Path | None, progress: Callable[[int, int], None]) -> Trainee:
    """saved: the folder of a checkpoint to go on from; None: the run's beginning."""
    spec, folder, device = job.spec, Path(job.checkpoint), world.device
    found = None if saved is None else read_save(job, saved)
    ranks, frozen = ranks_of(job), None
    if job.mode == "lora":
        frozen = load_frozen(spec, folder, job.dtype, device, progress, job.host_layers)
        begun = adapters.by_part(adapters.new_adapter(spec, ranks, job.seed, device))
    else:
        begun = read_parameters(spec, folder, device, progress)
    counts: dict[str, int] = {}
    begun = _counted(job, begun if found is None else found.values(device), counts)

    if job.deepspeed is None:
        dtype = TORCH_DTYPE[job.adapter_dtype if job.mode == "lora" else "fp32"]
        leaves = {
            name: tensor.detach().to(dtype).requires_grad_() for _, part in begun for name, tensor in part.items()
        }
        updates: Updates = Replicated(leaves, job.recipe, make_optimizer(job, list(leaves.values())), world)
        whole = None
    else:
        whole = zero.make_whole(job, begun)
        leaves = whole.tensors()
        updates = zero.Sharded(job, whole, leaves, world)
    if found is not None:
        updates.write(found.kept, found.steps)

    serving = None
    if frozen is None:
        model = full_model(spec, leaves)
    else:
        model = lora_model(spec, frozen, adapters.pairs(leaves, ranks))
        serving = partial(_serving_loss, job, frozen)
    if whole is not None:
        model = replace(model, within=whole.within)
    return Trainee(leaves, counts, model, updates, serving, found.steps if found is not None else 0)


def _serving_loss(job: Job, weights: Weights, document: Pack) -> float:
    return gate.serving_loss(job.spec, weights, document, TORCH_DTYPE[job.dtype])


def _counted(
    job: Job, begun: Iterable[tuple[str, dict[str, Tensor]]], counts: dict[str, int]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Passes parts on and adds up how many values they have: afterwards a rank may hold its share alone."""
    for part, tensors in begun:
        if job.mode == "lora":
            more = adapters.parameter_counts(tensors)
        else:
            more = {"all weights": sum(tensor.numel() for tensor in tensors.values())}
        for target, count in more.items():
            counts[target] = counts.get(target, 0) + count
        yield part, tensors

"""The loop on one device: steps of AdamW over packs of samples, checks, checkpoints, and going on where it stopped.

The samples, their order and the state of a checkpoint determine every later step: a resumed run loses what the same
run without a stop would have lost. Knows nothing of conversations, settings files, terminals or signals.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckError
from ..model.dtypes import TORCH_DTYPE
from . import adapters, gate
from .attention import Attention, choose
from .batch import Pack, make_pack
from .forward import Precision, forward
from .job import Job
from .loss import cross_entropy
from .model import Model, full_model, lora_model
from .order import Mixture, pack, steps
from .samples import Sample
from .saves import save, saves
from .start import load_frozen, load_parameters

OPTIMIZER_FILE, STATE_FILE, PARAMETERS_FILE = "optimizer.safetensors", "state.json", "parameters.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Step:
    """What is known after one step. loss: mean over the step's loss weights, before the update. expert_load: tokens of
    the busiest expert over the mean, the worst layer's and the mean over layers. memory_bytes: the most that this
    process has held, of the GPU where there is one, else of the host."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    step_s: float
    tokens_per_s: float
    expert_load_worst: float
    expert_load_mean: float
    memory_bytes: int
    eval_loss: float | None = None


@dataclass(frozen=True)
class Trainee:
    """leaves: what is trained, by name. model: reads them; they are updated in place. serving: the pass that serves, on
    one document; None where no weights are loaded that could."""

    leaves: dict[str, Tensor]
    model: Model
    serving: Callable[[Pack], float] | None


def ranks_of(job: Job) -> dict[adapters.Target, adapters.Rank]:
    ranks: dict[adapters.Target, adapters.Rank] = {}
    if job.attention_rank:
        ranks["attention"] = adapters.Rank(job.attention_rank, job.attention_alpha)
    if job.expert_rank:
        ranks["experts"] = adapters.Rank(job.expert_rank, job.expert_alpha)
    return ranks


def load_trainee(job: Job, progress: Callable[[int, int], None]) -> Trainee:
    """The model of a run as it is before its first step."""
    spec, folder, device = job.spec, Path(job.checkpoint), torch.device(job.device)
    if job.mode == "full":
        leaves = load_parameters(spec, folder, device, progress)
        return Trainee(leaves, full_model(spec, leaves), None)
    weights = load_frozen(spec, folder, job.dtype, device, progress)
    ranks = ranks_of(job)
    leaves = adapters.new_adapter(spec, ranks, job.seed, device)
    dtype = TORCH_DTYPE[job.dtype]
    return Trainee(
        leaves,
        lora_model(spec, weights, adapters.pairs(leaves, ranks)),
        lambda document: gate.serving_loss(spec, weights, document, dtype),
    )


def trained_parts(job: Job, trainee: Trainee) -> dict[str, int]:
    """How many values are trained, by part."""
    if job.mode == "lora":
        return adapters.parameter_counts(trainee.leaves)
    return {"all weights": sum(leaf.numel() for leaf in trainee.leaves.values())}


def train(
    job: Job,
    run: Path,
    trainee: Trainee,
    samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
    stop: Callable[[], bool],
    report: Callable[[Step], None],
    say: Callable[[str], None],
) -> bool:
    """Train from the newest checkpoint of `run`, or from the beginning. False if `stop` ended it, with a checkpoint.

    stop: asked after each step. report: called after each step. say: for single lines. Raises CheckError for a first
    loss that cannot be and for a loss or gradient that is no number; then the last checkpoint stands as it was.
    """
    device, dtype = torch.device(job.device), TORCH_DTYPE[job.dtype]
    precision = Precision(dtype, dtype)
    optimizer = torch.optim.AdamW(
        list(trainee.leaves.values()),
        lr=job.recipe.learning_rate,
        betas=(job.recipe.beta1, job.recipe.beta2),
        weight_decay=job.recipe.weight_decay,
    )
    done = 0
    if found := saves(run):
        done = found[-1][0]
        read_save(job, found[-1][1], trainee, optimizer)
        say(f"going on after step {done} of {job.steps}")
    choice = choose(job.spec, device, dtype, job.sequence_tokens)
    say(choice.why)
    mixture = Mixture(tuple(map(len, samples)), tuple(one.source for one in samples), job.weights)
    stream = steps(mixture, job.seed, job.sequence_tokens, job.packs_per_step, done)
    eval_packs = pack(range(len(eval_samples)), [len(one) for one in eval_samples], job.sequence_tokens)

    def mean_eval_loss() -> float:
        return mean_loss(job, trainee.model, eval_samples, eval_packs, choice.attention, precision)

    for number in range(done + 1, job.steps + 1):
        began_s = time.perf_counter()
        epoch, groups = next(stream)
        packs = [make_pack([samples[index] for index in group], device) for group in groups]
        if number == 1 and job.check_first_loss:
            _check_first_loss(job, trainee, packs[0], choice.attention, precision)
        rate = job.recipe.rate(number, job.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss, load_LE = _accumulate(job, trainee.model, packs, choice.attention, precision)
        norm = _clip(list(trainee.leaves.values()), job.recipe.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = saves(run)
            hint = f"{kept[-1][1]} is the last good checkpoint" if kept else "there is no checkpoint yet"
            raise CheckError(f"step {number}: loss {loss}, gradient norm {norm}", f"{hint}; lower learning_rate")
        optimizer.step()
        stopping, last = stop(), number == job.steps
        evaluate = bool(eval_packs) and (last or (job.eval_every > 0 and number % job.eval_every == 0))
        tokens = sum(len(one.tokens_T) for one in packs)
        step_s = time.perf_counter() - began_s
        over_mean = load_LE.amax(1) / load_LE.double().mean(1)
        report(
            Step(
                step=number,
                epoch=epoch,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                tokens=tokens,
                trained_tokens=sum(int((one.weights_T > 0).sum()) for one in packs),
                step_s=step_s,
                tokens_per_s=tokens / step_s,
                expert_load_worst=over_mean.max().item(),
                expert_load_mean=over_mean.mean().item(),
                memory_bytes=held_bytes(device),
                eval_loss=mean_eval_loss() if evaluate else None,
            )
        )
        if last or stopping or (job.save_every > 0 and number % job.save_every == 0):
            write_save(job, run, number, trainee, optimizer)
        if stopping and not last:
            return False
    return True


def _accumulate(
    job: Job, model: Model, packs: Sequence[Pack], attention: Attention, precision: Precision
) -> tuple[float, Tensor]:
    """(loss, tokens of each expert [layers, experts]) of one step, its gradients added up in the leaves.

    Every trained token of the step counts by its own weight, in whichever pack it is.
    """
    weight = sum(one.weight for one in packs)
    losses, loads = [], []
    for one in packs:
        x_TH, load_LE = forward(job.spec, model, one, attention, precision)
        loss = cross_entropy(x_TH, model.head_VH, one.targets_T, one.weights_T) / weight
        loss.backward()
        losses.append(loss.detach())
        loads.append(load_LE)
    return torch.stack(losses).double().sum().item(), torch.stack(loads).sum(0)


def _clip(leaves: Sequence[Tensor], largest: float) -> float:
    """The norm of all gradients before they are scaled down to `largest`; 0 leaves them as they are."""
    return torch.nn.utils.clip_grad_norm_(leaves, largest or math.inf).item()


@torch.no_grad()
def mean_loss(
    job: Job,
    model: Model,
    samples: Sequence[Sample],
    packs: Sequence[Sequence[int]],
    attention: Attention,
    precision: Precision,
) -> float:
    """Mean over loss weights of all samples in `packs`."""
    total = weight = 0.0
    for group in packs:
        one = make_pack([samples[index] for index in group], torch.device(job.device))
        x_TH, _ = forward(job.spec, model, one, attention, precision, recompute=False)
        total += cross_entropy(x_TH, model.head_VH, one.targets_T, one.weights_T).item()
        weight += one.weight
    return total / weight


@torch.no_grad()
def _check_first_loss(job: Job, trainee: Trainee, one: Pack, attention: Attention, precision: Precision) -> None:
    document = gate.first_document(one)
    x_TH, _ = forward(job.spec, trainee.model, document, attention, precision, recompute=False)
    loss = cross_entropy(x_TH, trainee.model.head_VH, document.targets_T, document.weights_T).item() / document.weight
    gate.check_first_loss(loss, trainee.serving(document) if trainee.serving else None, job.spec.vocab)


def held_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # KiB on Linux


# --- checkpoints


def write_save(job: Job, run: Path, step: int, trainee: Trainee, optimizer: torch.optim.Optimizer) -> Path:
    """What is trained (as a PEFT adapter, or all parameters in fp32), AdamW's state, and the step."""
    leaves = trainee.leaves
    state = {f"{moment}.{name}": optimizer.state[leaf][moment] for name, leaf in leaves.items() for moment in _MOMENTS}

    def write(folder: Path) -> None:
        if job.mode == "lora":
            adapters.write_adapter(folder, leaves, ranks_of(job), job.model)
        else:
            save_file({name: leaf.detach() for name, leaf in leaves.items()}, folder / PARAMETERS_FILE)
        save_file(state, folder / OPTIMIZER_FILE)
        (folder / STATE_FILE).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")

    values = sum(leaf.numel() for leaf in leaves.values())
    return save(run, step, write, (1 + len(_MOMENTS)) * 4 * values, job.keep_last)


def read_values(job: Job, folder: Path) -> dict[str, Tensor]:
    """What was trained, by the names of Trainee.leaves, on the CPU."""
    if job.mode == "lora":
        return adapters.read_adapter(folder, job.spec)[0]
    return load_file(folder / PARAMETERS_FILE)


def read_save(job: Job, folder: Path, trainee: Trainee, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint back into the leaves and the optimizer, bit for bit."""
    adapters.load_into(trainee.leaves, read_values(job, folder))
    step = json.loads((folder / STATE_FILE).read_text("utf-8"))["step"]
    stored = load_file(folder / OPTIMIZER_FILE)
    for name, leaf in trainee.leaves.items():
        moments = {moment: stored[f"{moment}.{name}"].to(leaf.device) for moment in _MOMENTS}
        optimizer.state[leaf] = {"step": torch.tensor(float(step)), **moments}

"""The loop: steps of AdamW over packs of samples, checks, checkpoints, and going on where it stopped.

The samples, their order and the state of a checkpoint determine every later step: a resumed run loses what the same
run without a stop would have lost. A step's packs are dealt out to the ranks, and all else follows from their sums.
Knows nothing of conversations, settings files, terminals or signals.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckError
from ..model.dtypes import TORCH_DTYPE
from ..planning.flops import peak_flops, training_flops
from . import captured, gate, operations
from .attention import Attention, choose
from .batch import Pack, blank_pack, make_pack
from .checkpoints import write_save
from .forward import Inputs, Precision, forward, inputs_of, loads, summed_loss
from .job import Job
from .operations import Operations
from .order import Mixture, pack, steps
from .samples import Sample, sample
from .saves import saves
from .trainee import Trainee
from .world import World


@dataclass(frozen=True)
class Step:
    """What is known after one step. loss: mean over the step's loss weights, before the update. expert_load: tokens of
    the busiest expert over the mean, the worst layer's and the mean over layers. memory_bytes: the most that this
    process has held, of the GPU where there is one, else of the host. mfu: `planning.flops`; None where the device's
    peak is not known."""

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
    mfu: float | None = None


def train(
    job: Job,
    run: Path,
    world: World,
    trainee: Trainee,
    samples: Sequence[Sample],
    eval_samples: Sequence[Sample],
    stop: Callable[[], bool],
    report: Callable[[Step], None],
    say: Callable[[str], None],
) -> bool:
    """Train from where `trainee` is. False if `stop` ended it, on whichever rank, with a checkpoint.

    stop: asked after each step. report: called after each step. say: for single lines. Both by rank 0 alone. Raises
    CheckError for a first loss that cannot be and for a loss, on held-out data too, or gradient that is no number; then
    the last checkpoint stands as it was.
    """
    dtype = TORCH_DTYPE[job.dtype]
    choice = choose(job.spec, world.device, dtype, job.sequence_tokens)
    ranks = (job.expert_rank,) if job.mode == "lora" and job.expert_rank else ()
    layers = operations.choose(world.device, dtype, ranks)

    def through(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return forward(job.spec, trainee.model, inputs, choice.attention, Precision(dtype, dtype), True, layers.ops)

    pass_ = Pass(job, world, trainee, choice.attention, layers.ops, through)
    if world.first:
        if trainee.steps:
            say(f"going on after step {trainee.steps} of {job.steps}")
        say(choice.why)
        say(layers.why)
    mixture = Mixture(tuple(map(len, samples)), tuple(one.source for one in samples), job.weights)
    stream = steps(mixture, job.seed, job.sequence_tokens, job.packs_per_step, trainee.steps)
    eval_packs = pack(range(len(eval_samples)), [len(one) for one in eval_samples], job.sequence_tokens)

    peak = peak_flops(torch.cuda.get_device_name(world.device), job.dtype) if world.device.type == "cuda" else None
    for number in range(trainee.steps + 1, job.steps + 1):
        began_s = time.perf_counter()
        epoch, groups = next(stream)
        if number == 1 and job.check_first_loss:
            pass_.check_first_loss([samples[index] for index in groups[0]])
        if number == trainee.steps + 1:
            passes = pass_.captured()
            pass_ = replace(pass_, through=passes.run)
            if world.first:
                say(passes.why)
        rate = job.recipe.rate(number, job.steps)
        loss, load_LE, stopping = pass_.add_up(samples, groups, stop)
        norm = trainee.updates.step(rate)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            world.refuse(_no_number(run, f"step {number}: loss {loss}, gradient norm {norm}"))
        last = number == job.steps
        indexes = [index for group in groups for index in group]
        lengths = [len(samples[index]) for index in indexes]
        tokens = sum(lengths)
        step_s = time.perf_counter() - began_s
        evaluate = bool(eval_packs) and (last or (job.eval_every > 0 and number % job.eval_every == 0))
        eval_loss = pass_.mean_loss(eval_samples, eval_packs) if evaluate else None
        if eval_loss is not None and not math.isfinite(eval_loss):
            world.refuse(_no_number(run, f"step {number}: loss {eval_loss} on held-out data"))
        over_mean = load_LE.amax(1) / load_LE.mean(1)
        step = Step(
            step=number,
            epoch=epoch,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=tokens,
            trained_tokens=sum(len(samples[index]) - samples[index].weights.count(0.0) for index in indexes),
            step_s=step_s,
            tokens_per_s=tokens / step_s,
            expert_load_worst=over_mean.max().item(),
            expert_load_mean=over_mean.mean().item(),
            memory_bytes=int(world.largest(held_bytes(world.device))),
            mfu=training_flops(job.spec, lengths, job.mode) / (peak * world.size * step_s) if peak else None,
            eval_loss=eval_loss,
        )
        if world.first:
            report(step)
        if last or stopping or (job.save_every > 0 and number % job.save_every == 0):
            write_save(job, run, number, trainee.leaves, sum(trainee.values.values()), trainee.updates, world)
        if stopping and not last:
            return False
    return True


def _no_number(run: Path, message: str) -> CheckError:
    kept = saves(run)
    hint = f"{kept[-1][1]} is the last checkpoint before" if kept else "there is no checkpoint yet"
    return CheckError(message, f"{hint}; lower learning_rate, in a new folder")


@dataclass(frozen=True)
class Pass:
    """Passes over packs, dealt out to ranks in turn. Every rank runs as many: DeepSpeed brings weights for all of them
    at once. One that has none left runs a blank, which counts nothing."""

    job: Job
    world: World
    trainee: Trainee
    attention: Attention
    ops: Operations
    through: captured.Run

    def captured(self) -> captured.Choice:
        """How packs of the job may be run, once this is known to be right."""
        job = self.job
        blank = make_pack([sample([0] * job.sequence_tokens, [0] * job.sequence_tokens)], self.world.device)
        # DeepSpeed's weights are not where they were
        allowed = self.world.device.type == "cuda" and job.deepspeed is None
        inputs = inputs_of(job.spec, self.trainee.model, blank, self.attention)
        return captured.choose(self.through, inputs, self.attention.tensors, self.trainee.leaves.values(), allowed)

    def add_up(
        self, samples: Sequence[Sample], groups: Sequence[Sequence[int]], stop: Callable[[], bool]
    ) -> tuple[float, Tensor, bool]:
        """(loss, tokens of each expert [layers, experts] fp64, whether any rank is to stop) of one step over all ranks;
        its gradients are added up.

        Every trained token of the step counts by its own weight, in whichever pack and on whichever rank it is.
        """
        weight = math.fsum(math.fsum(samples[index].weights) for group in groups for index in group)
        losses, of_packs = [], []
        packs = self._mine(samples, groups)
        for place, one in enumerate(packs):

            def share(one: Pack = one) -> tuple[Tensor, Tensor]:
                loss, load_LE = self._loss(one)
                return loss / weight, load_LE

            loss, load_LE = self.trainee.updates.add(share, last=place == len(packs) - 1)
            losses.append(loss)
            # a blank's tokens are nobody's
            of_packs.append(load_LE if one.weight else torch.zeros_like(load_LE))
        load_LE = torch.stack(of_packs).sum(0).double()
        told = torch.cat([torch.stack(losses).double().sum()[None], load_LE.flatten()]).cpu()
        told = torch.cat([told, torch.tensor([float(stop())], dtype=torch.float64)])
        self.world.add([told])
        return told[0].item(), told[1:-1].view(load_LE.shape), bool(told[-1])

    @torch.no_grad()
    def mean_loss(self, samples: Sequence[Sample], groups: Sequence[Sequence[int]]) -> float:
        """Mean over loss weights of all samples in `groups`."""
        told = torch.zeros(2, dtype=torch.float64)
        for one in self._mine(samples, groups):
            loss, _ = self.trainee.updates.look(lambda one=one: self._loss(one))
            told += torch.tensor([loss.item(), one.weight], dtype=torch.float64)
        self.world.add([told])
        return (told[0] / told[1]).item()

    @torch.no_grad()
    def check_first_loss(self, samples: Sequence[Sample]) -> None:
        """Every rank looks at the same document."""
        document = gate.first_document(samples, self.world.device)
        summed, _ = self.trainee.updates.look(lambda: self._loss(document))
        serving = self.trainee.serving(document) if self.trainee.serving else None
        try:
            gate.check_first_loss(summed.item() / document.weight, serving, self.job.spec.vocab)
        except CheckError as error:
            self.world.refuse(error)

    def _loss(self, one: Pack) -> tuple[Tensor, Tensor]:
        """(sum of a pack's weighted losses, tokens of each expert)."""
        x_TH, experts_LTX = self.through(inputs_of(self.job.spec, self.trainee.model, one, self.attention))
        return summed_loss(self.trainee.model, one, x_TH, self.ops), loads(self.job.spec, experts_LTX)

    def _mine(self, samples: Sequence[Sample], groups: Sequence[Sequence[int]]) -> list[Pack]:
        rounds = zip_longest(*(groups[rank :: self.world.size] for rank in range(self.world.size)))
        mine = [of_ranks[self.world.rank] for of_ranks in rounds]
        device = self.world.device
        return [
            make_pack([samples[index] for index in group], device) if group else blank_pack(device) for group in mine
        ]


def held_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # KiB on Linux

"""Updates through DeepSpeed (https://www.deepspeed.ai): what is trained is cut over ranks, or lies in host memory.

DeepSpeed brings the weights of a module before its call and takes them away after it. The model here is functions, so
each part of it is a module that holds the part's tensors and calls whatever function it is handed. Knows nothing of
files: what is read and written by name is whole.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..planning.zero import Zero, read_zero
from .job import Job
from .optimizers import adamw
from .updates import MOMENTS, Kept, set_steps
from .world import World


class Part(torch.nn.Module):
    """Tensors that are needed together, and a call during which they are there."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            # a module's names have no dots
            self.register_parameter(name.replace(".", "/"), torch.nn.Parameter(tensor.detach()))

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class Whole(torch.nn.Module):
    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleDict({name.replace(".", "/"): part for name, part in parts.items()})

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()

    def tensors(self) -> dict[str, Tensor]:
        """By the names that the parts were made with; whole, or this rank's share."""
        found = {}
        for part in self.parts.values():
            found |= {name.replace("/", "."): tensor for name, tensor in part.named_parameters()}
        return found

    def within(self, part: str, function: Callable[..., Any], *arguments: Tensor) -> Any:
        """As `Model.within` wants it. Parts of which nothing is trained are no modules."""
        key = part.replace(".", "/")
        if key not in self.parts:
            return function(*arguments)
        if not torch.is_grad_enabled():
            return self.parts[key](function, *arguments)
        # where no input wants a gradient, DeepSpeed takes weights away before their gradients are computed
        if not arguments:
            nothing = torch.zeros((), device=next(self.parameters()).device, requires_grad=True)
            return self.parts[key](lambda nothing: (y := function()) + nothing.to(y.dtype), nothing)
        arguments = tuple(one if one.requires_grad else one.detach().requires_grad_() for one in arguments)
        return self.parts[key](function, *arguments)


def deepspeed_config(job: Job) -> tuple[dict[str, Any], Zero]:
    """The configuration as DeepSpeed gets it: the job's, and what the job says otherwise."""
    assert job.deepspeed is not None
    zero = read_zero(job.deepspeed, job.dtype)
    config = _without_auto(job.deepspeed)
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # packs are added up by set_gradient_accumulation_boundary
        "gradient_clipping": job.recipe.clip,
        "bf16": {**config.get("bf16", {}), "enabled": job.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": job.device == "cuda",
        "steps_per_print": 1 << 62,
    }
    config.setdefault("zero_optimization", {"stage": 0})
    if job.device == "cpu":
        config["zero_optimization"]["overlap_comm"] = False  # there are no streams to overlap on
        for key in ("offload_optimizer", "offload_param"):
            if key in config["zero_optimization"]:
                config["zero_optimization"][key].update(pin_memory=False)
    return config, zero


def _without_auto(value: Any) -> Any:
    """A copy in which DeepSpeed's own defaults stand for "auto", a word of other programs."""
    if isinstance(value, Mapping):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return [_without_auto(item) for item in value] if isinstance(value, list) else value


def make_whole(job: Job, values: Iterable[tuple[str, dict[str, Tensor]]]) -> Whole:
    """The module of all that is trained. values: (part, its tensors in fp32), one at a time: with stage 3 each rank
    keeps its share of a part before the next one comes, and the shares are of what rank 0 has read."""
    import deepspeed

    config, zero = deepspeed_config(job)
    dtype = torch.bfloat16 if job.dtype == "bf16" else torch.float32
    parts = {}
    for name, tensors in values:
        cast = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        # nothing is computed in here: it changes what dtype new tensors get
        cut = deepspeed.zero.Init(config_dict_or_path=config) if zero.stage == 3 else nullcontext()
        with cut:
            parts[name] = Part(cast)
    whole = Whole(parts)
    if zero.stage == 3:
        deepspeed.utils.set_z3_leaf_modules(whole, [Part])
    return whole


class Sharded:
    """`Updates` by a DeepSpeed engine."""

    def __init__(self, job: Job, whole: Whole, leaves: Mapping[str, Tensor], world: World) -> None:
        import deepspeed

        config, zero = deepspeed_config(job)
        self._leaves, self._world = leaves, world
        parameters = list(leaves.values())
        optimizer = adamw(parameters, job.recipe)
        if zero.on_host and (job.device == "cuda" or zero.on_host < 1):
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            recipe = job.recipe
            make: Any = DeepSpeedCPUAdam  # its annotations know no decay that is a fraction
            optimizer = make(
                parameters,
                lr=recipe.learning_rate,
                betas=(recipe.beta1, recipe.beta2),
                weight_decay=recipe.weight_decay,
                adamw_mode=True,
            )
        engine, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=config, dist_init_required=False)
        self._engine: Any = engine
        # what a ratio leaves on the GPU has an optimizer of its own, whose rate and moments DeepSpeed forgets elsewhere
        self._groups = list(self._engine.optimizer.param_groups)
        beside = getattr(self._engine.optimizer, "backup_optimizer", None)
        if beside is not None:
            beside.state = self._base().state
            self._groups += beside.param_groups

    def add(self, function: Callable[[], tuple[Tensor, Any]], last: bool) -> tuple[Tensor, Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        loss, other = self._engine(function)
        self._engine.backward(loss * self._world.size)  # it takes the mean over ranks
        return loss.detach(), other

    def look(self, function: Callable[[], Any]) -> Any:
        self._engine.eval()
        try:
            return self._engine(function)
        finally:
            self._engine.train()

    def step(self, rate: float) -> float:
        for group in self._groups:
            group["lr"] = rate
        plain = self._plain()
        norm = _norm(self._leaves.values()) if plain else 0.0  # it tells the norm with ZeRO alone
        self._engine.step()
        if not self._engine.was_step_applied():
            return math.nan
        return norm if plain else float(self._engine.get_global_grad_norm())

    def read(self, name: str) -> Kept:
        leaf = self._leaves[name]
        if self._plain():
            state = self._engine.optimizer.state[leaf]
            return Kept(leaf.detach(), *(state[moment] for moment in MOMENTS))
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: list[Any] = [safe_get_full_fp32_param(leaf)]
        found += [safe_get_full_optimizer_state(leaf, moment) for moment in MOMENTS]
        return Kept(*found)

    def write(self, kept: Callable[[str], Kept], steps: int) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._step_in_place()
        for name, leaf in self._leaves.items():
            one = kept(name)
            if self._plain():
                with torch.no_grad():
                    leaf.copy_(one.value)
                    for moment in MOMENTS:
                        self._engine.optimizer.state[leaf][moment].copy_(getattr(one, moment))
            else:
                safe_set_full_fp32_param(leaf, one.value.to(self._world.device))
                for moment in MOMENTS:
                    safe_set_full_optimizer_state(leaf, getattr(one, moment).to(self._world.device), moment)
        for state in self._base().state.values():
            set_steps(state, steps)

    def _step_in_place(self) -> None:
        """DeepSpeed makes the moments at its first step: take one that changes nothing."""

        def nothing() -> tuple[Tensor, None]:
            one = torch.ones((), device=self._world.device)
            whole: Whole = self._engine.module
            for name, part in whole.parts.items():
                one = whole.within(name, lambda one, part=part: one + 0.0 * _sum(part), one)
            return 0.0 * one, None

        self.add(nothing, last=True)
        self.step(0.0)

    def _plain(self) -> bool:
        return isinstance(self._engine.optimizer, torch.optim.Optimizer) and self._base() is self._engine.optimizer

    def _base(self) -> Any:
        """The optimizer that was handed to DeepSpeed."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)


def _sum(part: torch.nn.Module) -> Tensor:
    return torch.stack([parameter.sum().float() for parameter in part.parameters()]).sum()


def _norm(leaves: Iterable[Tensor]) -> float:
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()

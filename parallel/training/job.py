"""What one training run is, as frozen values: written once into the run's folder, read by whoever trains or resumes.

No torch. Knows neither settings files nor how anything is computed.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..planning.plan import DType
from ..planning.spec import Spec, spec_from_json, spec_to_json

Schedule = Literal["cosine", "linear", "constant"]
Mode = Literal["lora", "full"]
OptimizerKind = Literal["adamw", "adamw8bit"]
AdapterDtype = Literal["fp32", "bf16"]

JOB_FILE, METRICS_FILE = "job.json", "metrics.jsonl"
TRAIN_FILE, EVAL_FILE = "train.safetensors", "eval.safetensors"
STOP_FILE = "stop"
# between a run and its resumption
_MAY_CHANGE = ("save_every", "keep_last", "eval_every", "check_first_loss", "ranks", "deepspeed", "host_layers")


@dataclass(frozen=True)
class Recipe:
    """How the optimizer (AdamW, https://arxiv.org/abs/1711.05101) goes. clip: largest gradient norm; 0: any."""

    learning_rate: float
    schedule: Schedule
    warmup_fraction: float  # of all steps
    floor_fraction: float  # of the learning rate, at the end
    beta1: float
    beta2: float
    weight_decay: float
    clip: float

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 1 to `steps`."""
        warmup = math.ceil(self.warmup_fraction * steps)
        if step <= warmup:
            return self.learning_rate * step / warmup
        done = (step - warmup) / max(1, steps - warmup)
        left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.learning_rate * (self.floor_fraction + (1 - self.floor_fraction) * left)


@dataclass(frozen=True)
class Job:
    """model, checkpoint: its name and its folder. attention_rank, expert_rank: 0 where not adapted. dtype: of products
    and hidden states. data: where the samples are from and how they were made, in words, or settings as a JSON object.
    weights: how often an epoch takes a sample of each source. ranks: that train it; what is computed does not depend on
    them, but for the order of sums. deepspeed: a configuration (planning.zero), or None for AdamW on every rank.
    optimizer: how its moments are kept. adapter_dtype: of adapters and their gradients on one rank. host_layers: whose
    experts wait in host memory."""

    model: str
    checkpoint: str
    spec: Spec
    mode: Mode
    attention_rank: int
    attention_alpha: float
    expert_rank: int
    expert_alpha: float
    dtype: DType
    device: Literal["cuda", "cpu"]
    sequence_tokens: int
    packs_per_step: int
    steps: int
    recipe: Recipe
    seed: int
    data: str
    weights: tuple[float, ...]
    save_every: int  # steps; 0: at the end
    keep_last: int
    eval_every: int  # steps; 0: at the end
    check_first_loss: bool
    ranks: int = 1
    deepspeed: dict[str, Any] | None = None
    optimizer: OptimizerKind = "adamw"
    adapter_dtype: AdapterDtype = "fp32"
    host_layers: int = 0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"spec": spec_to_json(self.spec), "weights": list(self.weights)}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Job":
        kept = fields | {
            "spec": spec_from_json(fields["spec"]),
            "recipe": Recipe(**fields["recipe"]),
            "weights": tuple(fields["weights"]),
        }
        return Job(**kept)


def write_job(run: Path, job: Job) -> None:
    """There whole or as it was: a run does not go on without it."""
    half = run / f".half-{JOB_FILE}"
    half.write_text(json.dumps(job.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    half.replace(run / JOB_FILE)


def read_job(run: Path) -> Job:
    """Raises UserError if `run` is no folder of a run."""
    try:
        return Job.from_json(json.loads((run / JOB_FILE).read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{run}: no readable {JOB_FILE}", "RUN is the folder that finetune wrote (run=FOLDER)"
        ) from None


def check_resumable(old: Job, new: Job, run: Path) -> None:
    """Raises UserError where going on with `new` would not be going on with `old`."""
    was, now = _flat(old), _flat(new)
    for name in was:
        if name not in _MAY_CHANGE and was[name] != now.get(name):
            raise UserError(
                f"{run} was begun with {name}={was[name]}, not {now.get(name)}",
                "name a new folder with run=FOLDER, or set it as it was",
            )


def _flat(job: Job) -> dict[str, Any]:
    fields = job.to_json()
    recipe = fields.pop("recipe")
    try:
        settings = json.loads(job.data)
    except ValueError:
        settings = None
    return fields | recipe | (settings if isinstance(settings, dict) else {})

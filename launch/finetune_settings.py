"""The settings of finetune: defaults < preset or YAML file < `key=value` words, each key typed and known.

The dataclass is the one place where a setting, its default and its help live. Does not know what they are used for.
"""

import dataclasses
import datetime
import importlib.resources
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..parallel.errors import UserError, did_you_mean
from ..parallel.planning.plan import DType
from ..parallel.planning.yaml_text import load_yaml
from ..parallel.planning.zero import read_zero
from ..parallel.training.job import AdapterDtype, Mode, OptimizerKind, Schedule
from .finetune_metrics import TRACKERS
from .records import Source, read_source
from .settings import DTYPES, one_of, read_keys, read_path, read_text, read_yaml

PRESETS, DEEPSPEED = "finetune", "deepspeed"  # folders in gptoss_launch.configs

MOST = 2**63 - 1  # of what is counted, and of a seed
LEAST_ALPHA = 1e-6  # at 0 nothing would be learnt
BELOW_1 = 1 - 1e-9

Target = Literal["attention", "experts"]
CHANNELS = ("analysis", "commentary", "final")


def _count(low: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise UserError(f"{value!r} is no whole number from {low}")
        if value > MOST:
            raise UserError(f"{value!r} is no whole number up to {MOST}")
        return value

    return read


def _number(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        try:
            number = float(value)  # YAML 1.1 takes 1e-4 for a text
        except (TypeError, ValueError):
            number = float("nan")
        if isinstance(value, bool) or not low <= number <= high:
            raise UserError(f"{value!r} is no number from {low:g} to {high:.9g}")
        return number

    return read


def _yes(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{value!r} is neither true nor false")
    return value


def _sources(value: Any) -> tuple[Source, ...]:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise UserError("an empty list names no data")
    return tuple(read_source(item) for item in items)


def _targets(value: Any) -> tuple[Target, ...]:
    items = value if isinstance(value, list) else [value]
    for item in items:
        one_of(get_args(Target))(item)
    if not items:
        raise UserError("an empty list trains nothing")
    return tuple(dict.fromkeys(items))


def _trackers(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    for item in items:
        one_of(TRACKERS)(item)
    return tuple(dict.fromkeys(items))


def _loss(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise UserError(f"{value!r} is no mapping", "loss={analysis: 1, commentary: 1, final: 1}")
    for key in value:
        if key not in CHANNELS:
            raise UserError(f"unknown channel {key!r}", did_you_mean(str(key), CHANNELS))
    weights: dict[str, float] = dict.fromkeys(CHANNELS, 1.0)
    weights |= {str(key): _number(0, 1e6)(weight) for key, weight in value.items()}
    if not any(weights.values()):
        raise UserError("no channel counts", "at least one weight over 0")
    return weights


def _date(value: Any) -> datetime.date | None:
    if value == "none":
        return None
    try:
        # what YAML reads with an hour is a date, too, to Python
        return value if type(value) is datetime.date else datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise UserError(f"{value!r} is no date such as 2025-08-05, and not none") from None


def _key(default: Any, read: Callable[[Any], Any], help: str) -> Any:
    return field(default=default, metadata={"read": read, "help": help})


@dataclass(frozen=True)
class FinetuneSettings:
    """Every setting of finetune, by the name of its key. model, data and run have no default that could be guessed."""

    model: str | None = _key(None, read_text, "A checkpoint folder, a hub id, or tiny.")
    run: Path | None = _key(None, read_path, "Folder of the run: its checkpoints, metrics and samples.")
    data: tuple[Source, ...] = _key((), _sources, "FILE.jsonl or a dataset, or a list of {source, split, weight}.")
    eval_data: tuple[Source, ...] = _key((), _sources, "The same, to measure the loss on.")
    eval_fraction: float = _key(0.0, _number(0, 0.5), "Share of the data's records to measure on, where no eval_data.")
    skip_bad_records: bool = _key(False, _yes, "Count bad records instead of stopping at the first.")
    loss: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(CHANNELS, 1.0),
        metadata={"read": _loss, "help": "Loss weight of each channel: {analysis: 1, commentary: 1, final: 1}."},
    )
    reasoning_effort: Literal["low", "medium", "high"] = _key(
        "medium", one_of(("low", "medium", "high")), "Effort that records without one are rendered with."
    )
    date: datetime.date | None = _key(
        datetime.date(2025, 8, 5), _date, "Day that records without one are rendered with; none: no line."
    )
    mode: Mode = _key("lora", one_of(get_args(Mode)), "lora: adapters to frozen weights; full: all weights.")
    targets: tuple[Target, ...] = _key(("attention", "experts"), _targets, "What lora adapts.")
    attention_rank: int = _key(16, _count(1), "Rank of the adapters of q, k, v and o.")
    attention_alpha: float = _key(32.0, _number(LEAST_ALPHA, 1e6), "They are scaled by alpha / rank.")
    expert_rank: int = _key(4, _count(1), "Rank of the adapters of every expert.")
    expert_alpha: float = _key(8.0, _number(LEAST_ALPHA, 1e6), "They are scaled by alpha / rank.")
    ranks: int | None = _key(None, _count(1), "GPUs that train together, each on its packs; 1, or as torchrun says.")
    deepspeed: str | None = _key(
        None, read_text, "A file of configs/deepspeed or of your own; zero3 for mode=full on several ranks, else none."
    )
    optimizer: OptimizerKind = _key(
        "adamw",
        one_of(get_args(OptimizerKind)),
        "adamw8bit: moments in 8 bits, by torchao; a run that goes on does so nearly, not exactly.",
    )
    adapter_dtype: AdapterDtype = _key(
        "fp32", one_of(get_args(AdapterDtype)), "bf16: adapters in half the memory, with optimizer=adamw8bit."
    )
    host_layers: int = _key(0, _count(0), "Layers whose frozen experts wait in host memory, and are copied each time.")
    dtype: DType | None = _key(None, one_of(DTYPES), "Of products and hidden states; bf16 on a GPU, else fp32.")
    device: Literal["cuda", "cpu"] | None = _key(None, one_of(("cuda", "cpu")), "A GPU if there is one, else the CPU.")
    machine: str | None = _key(None, read_text, "With --dry-run: a machine of configs/machines, or a YAML file.")
    sequence_tokens: int = _key(2048, _count(16), "Tokens of a pack; no sample may be longer.")
    packs_per_step: int = _key(8, _count(1), "Packs that a step adds up, one after the other.")
    epochs: int = _key(1, _count(1), "How often the data is gone through, where steps is not set.")
    steps: int | None = _key(None, _count(1), "Steps of the optimizer.")
    learning_rate: float = _key(1e-4, _number(1e-12, 10), "At its highest.")
    schedule: Schedule = _key("cosine", one_of(get_args(Schedule)), "How it falls after the warmup.")
    warmup_fraction: float = _key(0.03, _number(0, 1), "Share of the steps in which it rises.")
    floor_fraction: float = _key(0.1, _number(0, 1), "What is left of it at the end.")
    beta1: float = _key(0.9, _number(0, BELOW_1), "Of AdamW.")
    beta2: float = _key(0.95, _number(0, BELOW_1), "Of AdamW.")
    weight_decay: float = _key(0.0, _number(0, 1), "Of AdamW.")
    clip: float = _key(1.0, _number(0, 1e9), "Largest gradient norm; 0: any.")
    seed: int = _key(0, _count(0), "Of the order of samples and of the adapters' beginning.")
    save_every: int = _key(0, _count(0), "Steps between checkpoints; 0: one at the end.")
    keep_last: int = _key(2, _count(1), "Checkpoints that are kept.")
    trackers: tuple[str, ...] = _key((), _trackers, "Besides metrics.jsonl: tensorboard, wandb, or a list of both.")
    eval_every: int = _key(0, _count(0), "Steps between measurements; 0: one at the end.")
    resume: Literal["auto", "never"] = _key(
        "auto", one_of(("auto", "never")), "auto: go on from the last checkpoint in run; never: run must be new."
    )
    first_loss: Literal["check", "ignore"] = _key(
        "check", one_of(("check", "ignore")), "check: stop if the first loss is none that a trained model has."
    )

    def with_ranks(self, started: int | None) -> "FinetuneSettings":
        """With nothing left open about who trains. started: how many ranks torchrun has started, if it has."""
        if started is not None and self.ranks not in (None, started):
            raise UserError(
                f"ranks={self.ranks}, and torchrun started {started}", f"leave ranks out, or set ranks={started}"
            )
        ranks = self.ranks or started or 1
        deepspeed = self.deepspeed or ("zero3" if self.mode == "full" and ranks > 1 else None)
        if deepspeed is not None and self.optimizer != "adamw":
            raise UserError(
                f"optimizer={self.optimizer} with deepspeed={deepspeed}",
                "ZeRO cuts moments over ranks: optimizer=adamw",
            )
        if self.adapter_dtype == "bf16" and self.optimizer != "adamw8bit":
            raise UserError(
                f"adapter_dtype=bf16 with optimizer={self.optimizer}",
                "its updates would be rounded away: optimizer=adamw8bit rounds them at random",
            )
        if self.mode == "full" and (self.adapter_dtype == "bf16" or self.host_layers):
            raise UserError(
                f"mode=full with adapter_dtype={self.adapter_dtype}, host_layers={self.host_layers}",
                "mode=lora, or deepspeed=zero3-offload-all for weights in host memory",
            )
        return dataclasses.replace(self, ranks=ranks, deepspeed=deepspeed)

    @property
    def world_size(self) -> int:
        return self.ranks or 1

    @property
    def needs_torchrun(self) -> bool:
        return self.world_size > 1 or self.deepspeed is not None

    def checked_run(self) -> Path:
        if self.run is None:
            raise UserError("no run", "run=FOLDER, where checkpoints and metrics go")
        return self.run


_FIELDS = {one.name: one for one in dataclasses.fields(FinetuneSettings)}


def settings_help() -> str:
    """A line for each setting: key, what it is, and its default where it has one that is short."""
    lines = ["Settings:"]
    for name, one in _FIELDS.items():
        shown = "" if isinstance(one.default, tuple | type(dataclasses.MISSING)) or one.default is None else one.default
        default = f"  [{str(shown).lower() if isinstance(shown, bool) else shown}]" if shown != "" else ""
        lines.append(f"  {name:18}{one.metadata['help']}{default}")
    return "\n".join(lines)


def load_finetune_settings(config: str | None, words: Sequence[str]) -> FinetuneSettings:
    """Settings from a YAML file or preset and `key=value` words, whose values are YAML too. Raises UserError.

    A file of records that `config` names is looked for from here, then beside `config`.
    """
    from_file: dict[str, Any] = {}
    if config is not None:
        where, keys = read_yaml(config, PRESETS)
        from_file = read_keys(keys, _FIELDS, where)
        beside = Path(str(importlib.resources.files("gptoss_launch.configs") / PRESETS))
        if not where.startswith("configs/"):
            beside = Path(config).parent
        for name in ("data", "eval_data"):
            from_file[name] = tuple(_from(source, beside) for source in from_file.get(name, ()))
    return FinetuneSettings(**(from_file | read_keys(_read_words(words), _FIELDS, "finetune")))


def read_deepspeed(name: str, dtype: DType) -> dict[str, Any]:
    """The configuration of a file, or of a name in configs/deepspeed. Raises UserError for one that cannot be read, or
    asks for what cannot be had."""
    folder = Path(str(importlib.resources.files("gptoss_launch.configs") / DEEPSPEED))
    path = Path(name).expanduser()
    if not path.suffix:
        path = folder / f"{name}.json"
        known = [one.stem for one in folder.glob("*.json")]
        if name not in known:
            raise UserError(f"deepspeed={name}: no such configuration", did_you_mean(name, known))
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"deepspeed={name}: not readable: {' '.join(str(error).split())}", "it is DeepSpeed's JSON"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed={name}: a JSON {type(config).__name__}, not an object", "it is DeepSpeed's JSON")
    read_zero(config, dtype)
    return config


def _from(source: Source, folder: Path) -> Source:
    if Path(source.name).expanduser().exists() or not (folder / source.name).exists():
        return source
    return dataclasses.replace(source, name=str(folder / source.name))


def _read_words(words: Sequence[str]) -> dict[Any, Any]:
    import yaml

    values = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is no setting", "write key=value, for instance learning_rate=2e-4")
        try:
            values[key] = load_yaml(text)
        except yaml.YAMLError as error:
            raise UserError(f"{word}: no YAML: {' '.join(str(error).split())}", "quote it for the shell") from None
    return values

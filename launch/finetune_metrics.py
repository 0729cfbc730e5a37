"""Where the numbers of a run go: metrics.jsonl always, accelerate's trackers on request, and a picture of the curves.

Called by rank 0 alone. Does not know how a number comes about.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..parallel.training.job import METRICS_FILE
from .extras import need_module

TRACKERS = ("tensorboard", "wandb")
PLOT_FILE = "metrics.png"
CURVES = ({"loss": "loss", "eval_loss": "held out"}, {"learning_rate": "learning rate"}, {"grad_norm": "gradient norm"})


def need_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed, before anything is trained."""
    for name in names:
        for module in (name, "accelerate"):
            need_module(f"trackers={name}", module)


class Metrics:
    """Takes the numbers of a step."""

    def __init__(self, file: Any, trackers: Sequence[Any]) -> None:
        self._file, self._trackers = file, trackers

    def log(self, fields: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()
        values = {name: value for name, value in fields.items() if name != "step"}
        for tracker in self._trackers:
            tracker.log(values, step=fields["step"])


@contextmanager
def open_metrics(run: Path, names: Sequence[str], settings: Mapping[str, Any], done: int) -> Iterator[Metrics]:
    """settings: of the run, for trackers that show them. done: steps before these, of which a checkpoint was kept."""
    if names:
        from accelerate import PartialState

        PartialState(cpu=settings["device"] == "cpu")  # its trackers want one, and it takes our process group as it is
    trackers = [_tracker(name, run, done) for name in names]
    with (run / METRICS_FILE).open("a", encoding="utf-8") as file:
        for tracker in trackers:
            tracker.start()
            tracker.store_init_configuration(dict(settings))
        try:
            yield Metrics(file, trackers)
        finally:
            for tracker in trackers:
                tracker.finish()


def _tracker(name: str, run: Path, done: int) -> Any:
    from accelerate import tracking

    if name == "tensorboard":
        # in RUN/tensorboard; steps that are taken again replace those of a process that was killed
        return tracking.TensorBoardTracker(name, str(run), purge_step=done + 1)
    # a run that goes on is the same run there
    return tracking.WandBTracker("gptoss-launch", dir=str(run), name=run.name, id=run.name, resume="allow")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS_FILE).read_text("utf-8").splitlines()]


def plot(run: Path) -> Path | None:
    """RUN/metrics.png: loss, learning rate and gradient norm over steps. None where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    steps = read_metrics(run)
    figure = Figure(figsize=(8, 9), layout="constrained")
    rows = figure.subplots(len(CURVES), sharex=True)
    for axes, curves in zip(rows, CURVES, strict=True):
        for key, label in curves.items():
            points = [(step["step"], step[key]) for step in steps if key in step]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else None)
                axes.legend()
        axes.grid(alpha=0.3)
    rows[-1].set_xlabel("step")
    figure.savefig(run / PLOT_FILE, dpi=120)
    return run / PLOT_FILE

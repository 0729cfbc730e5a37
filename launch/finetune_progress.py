"""What a person sees while a model is trained. Prose, so all of it on stderr."""

from typing import TYPE_CHECKING

from rich import progress as rich_progress
from rich.console import Console

from ..parallel.planning.machine import format_size
from ..parallel.training.job import Job

if TYPE_CHECKING:
    from ..parallel.training.loop import Step  # torch


class Progress:
    """Steps done of steps to do with loss, speed and memory; a bar in a terminal, else a line now and then."""

    LINES = 20  # where there is no terminal

    def __init__(self, job: Job) -> None:
        self._job = job
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        columns = (
            rich_progress.TextColumn("training"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[now]}"),
            rich_progress.TimeRemainingColumn(),
        )
        self._bar = rich_progress.Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("training", total=job.steps, now="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def show(self, step: "Step") -> None:
        now = f"loss {step.loss:.4f}  {step.tokens_per_s:,.0f} tokens/s  {format_size(step.memory_bytes)}"
        if step.mfu is not None:
            now += f"  MFU {step.mfu:.1%}"
        self._bar.update(self._task, completed=step.step, now=now)
        every = max(1, self._job.steps // self.LINES)
        if step.eval_loss is not None:
            self.say(f"step {step.step}: loss {step.loss:.4f}, held out {step.eval_loss:.4f}")
        elif not self._console.is_terminal and (step.step % every == 0 or step.step in (1, self._job.steps)):
            self.say(f"step {step.step} of {self._job.steps}: {now}  gradient norm {step.grad_norm:.3g}")

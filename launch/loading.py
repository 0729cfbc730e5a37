"""What a person sees while a model loads, and how the result compares with the plan. Prose, so all of it on stderr."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from ..parallel.engine.wire import Ready
from ..parallel.planning.machine import format_size
from ..parallel.planning.plan import Plan
from .resolve import TINY

SHOWN_S = 0.05  # parts of the start that take less are left out


class Bar:
    """Bytes done of bytes to do; draws only in a terminal, and leaves nothing behind."""

    def __init__(self, doing: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (TextColumn(doing), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(doing, total=None)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def show(self, done_bytes: int, total_bytes: int) -> None:
        self._progress.update(self._task, completed=done_bytes, total=total_bytes or None)


@contextmanager
def progress_bar(doing: str = "loading") -> Iterator[Bar]:
    bar = Bar(doing)
    bar.start()
    try:
        yield bar
    finally:
        bar.stop()


def say_tiny(plan: Plan) -> None:
    if plan.model == TINY:
        what = "it adds and subtracts numbers up to 99, greets, calls get_weather, and knows nothing else"
        click.echo(f"note: tiny shows that everything works: {what}", err=True)


def memory_lines(plan: Plan, answers: Sequence[Ready], node: int = 0) -> list[str]:
    """One line a rank: bytes as measured, beside those of the plan where it has the part, and the times of a step.

    answers: of the ranks on this node, in order.
    """
    lines = []
    first = plan.replicas_of(node).start * plan.ranks + plan.ranks_of(node).start
    for place, answer in enumerate(answers, first):
        planned = plan.memory[place] if place < len(plan.memory) else None
        parts = []
        for name, size in answer.memory.items():
            wanted = getattr(planned, name, None)
            beside = "" if wanted is None else f" (plan {format_size(wanted)})"
            parts.append(f"{name.removesuffix('_bytes')} {format_size(size)}{beside}")
        parts += [
            f"{name.removesuffix('_s').replace('_', ' ')} {seconds * 1e3:.2f} ms"
            for name, seconds in answer.times.items()
        ]
        replica = f"replica {place // plan.ranks} " if plan.dp > 1 else ""
        laps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in answer.phases.items() if seconds >= SHOWN_S)
        parts.append(f"loaded in {answer.load_s:.1f} s" + (f" ({laps})" if laps else ""))
        lines.append(f"{replica}rank {place % plan.ranks}: " + ", ".join(parts))
    return lines


def note_lines(answers: Sequence[Ready]) -> list[str]:
    """One line for each slower way that some rank takes, and for what else ranks found out."""
    slow = (f"slower than it could be: {way}" for one in answers for way in one.slow_paths)
    return list(dict.fromkeys([*slow, *(note for one in answers for note in one.notes)]))

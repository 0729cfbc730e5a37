"""The log files of a job, and new lines of them as they come."""

import re
from collections.abc import Iterator
from pathlib import Path

from ..parallel.errors import UserError
from .run_folder import attempt_folder, node_folders, rank_of


def log_files(folder: Path, job: int, rank: int | None, node: str | None, *, errors: bool) -> list[Path]:
    """The whole job's log if nothing is chosen, else those of ranks in the last attempt.

    node: its place in the job or its host name. errors: standard error alone.
    """
    if rank is None and node is None and not errors:
        of_job = sorted(path for path in folder.glob("*.out") if re.search(rf"-{job}\.out$", path.name))
        return of_job or [path for path in [attempt_folder(folder) / "all.log"] if path.exists()]
    found = []
    for number, host, path in node_folders(attempt_folder(folder)):
        if node is None or node in (str(number), host):
            files = [file for file in path.iterdir() if file.suffix in ((".err",) if errors else (".out", ".err"))]
            found += [file for file in files if rank is None or rank_of(file) == rank]
    return sorted(found, key=lambda file: (rank_of(file) or 0, file.suffix != ".out", file.name))


def check_choice(folder: Path, rank: int | None, node: str | None) -> None:
    """Raises UserError that lists what there is, if no such node or rank has begun."""
    nodes = list(node_folders(attempt_folder(folder)))
    if node is not None and not any(node in (str(number), host) for number, host, _ in nodes):
        known = ", ".join(f"{number} ({host})" for number, host, _ in nodes) or "none has begun"
        raise UserError(f"no node {node!r} in this job", f"known: {known}")
    ranks = sorted(
        {number for _, _, path in nodes for file in path.glob("rank*.out") if (number := rank_of(file)) is not None}
    )
    if rank is not None and rank not in ranks:
        raise UserError(f"no rank {rank} in this job", f"known: {', '.join(map(str, ranks)) or 'none has begun'}")


class Tail:
    """New text of a growing set of files. Each call of `read` gives (file, text) for those that have grown."""

    def __init__(self) -> None:
        self._at: dict[Path, int] = {}

    def read(self, files: list[Path]) -> Iterator[tuple[Path, str]]:
        for path in files:
            try:
                with path.open("rb") as file:
                    file.seek(self._at.get(path, 0))
                    new = file.read()
            except OSError:  # gone, or not there yet
                continue
            if new:
                self._at[path] = self._at.get(path, 0) + len(new)
                yield path, new.decode("utf-8", "replace")

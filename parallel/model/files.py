"""The safetensors files of a checkpoint, each opened once, when something in it is first asked for."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..planning.headers import Entry


@contextmanager
def open_files(inventory: Mapping[str, Entry]) -> Iterator[Callable[[str], Any]]:
    """Gives a function: published name of a tensor -> the open file that holds it. At the end all are closed."""
    files: dict[Path, Any] = {}
    with ExitStack() as stack:

        def file_of(published: str) -> Any:
            path = inventory[published].path
            if path not in files:
                files[path] = stack.enter_context(safe_open(path, framework="pt"))
            return files[path]

        yield file_of

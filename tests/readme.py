"""The parts of README.md that are made: a command's output, what ranks hold, measured speed, and the file tree.

Each lies between two comments, `<!-- NAME -->` or `<!-- NAME: COMMAND -->`, and `<!-- /NAME -->`. After a change write
them anew:
    python tests/readme.py
Knows nothing of what the rest of the README says; test_readme.py checks that.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gptoss_launch.parallel.planning.machine import read_machine
from gptoss_launch.parallel.planning.picture import picture, rank_table
from gptoss_launch.parallel.planning.planner import plan
from gptoss_launch.parallel.planning.spec import PUBLISHED
from results_table import markdown, read_results

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
COLUMNS = 110  # of the terminal that the README shows
CODE = ("launch", "parallel", "configs", "slurm", "tests")


def current(text: str) -> str:
    """The README `text` with every generated part as it should be now."""
    text = re.sub(
        r"(<!-- plan: gptoss-launch (.+?) -->\n).*?(<!-- /plan -->)",
        lambda found: f"{found[1]}```text\n{output_of(shlex.split(found[2]))}```\n{found[3]}",
        text,
        flags=re.DOTALL,
    )
    text = re.sub(
        r"(<!-- ranks: (\S+) on (\S+) -->\n).*?(<!-- /ranks -->)",
        lambda found: f"{found[1]}{ranks_of(found[2], found[3])}{found[4]}",
        text,
        flags=re.DOTALL,
    )
    text = re.sub(
        r"(<!-- results -->\n).*?(<!-- /results -->)",
        lambda found: f"{found[1]}{markdown(read_results())}{found[2]}",
        text,
        flags=re.DOTALL,
    )
    return re.sub(
        r"(<!-- tree: (\w+) -->\n).*?(<!-- /tree -->)",
        lambda found: f"{found[1]}{''.join(tree(ROOT / found[2]))}{found[3]}",
        text,
        flags=re.DOTALL,
    )


def output_of(arguments: list[str]) -> str:
    """What `gptoss-launch ARGUMENTS` prints in a terminal of our width, without colours and spaces at the end."""
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "gptoss_launch.launch", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def ranks_of(model: str, machine: str) -> str:
    """A picture and a table of what each rank of the plan for `machine` holds."""
    chosen = plan(PUBLISHED[model], read_machine(machine), model=model)
    return f"{picture(chosen)}\n{rank_table(chosen)}"


def tree(folder: Path, depth: int = 0) -> Iterator[str]:
    """Lines of a nested list: the folder, its modules, then its folders; each with what it says of itself."""
    opens = folder / "__init__.py"
    yield _line(folder, depth, first_line(opens) if opens.exists() else _files(folder))
    for path in sorted(folder.glob("*.py")):
        if path != opens:
            yield _line(path, depth + 1, first_line(path))
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (any(path.rglob("*.py")) or folder.name == "configs") and path.name != "__pycache__":
            yield from tree(path, depth + 1)


def first_line(path: Path) -> str:
    """What the module's docstring opens with, up to its first empty line."""
    opening = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
    return " ".join(opening.split()).rstrip(".")


def _files(folder: Path) -> str:
    """A folder of data: what is in it."""
    return ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"))


def _line(path: Path, depth: int, about: str) -> str:
    name, target = path.name, path.relative_to(ROOT).as_posix()
    # what Markdown would take for a tag or for emphasis, outside of `code`
    escaped = re.sub(r"(<(?=[A-Za-z/!?])|\*)(?=[^`]*(?:`[^`]*`[^`]*)*$)", r"\\\1", about)
    slash = "/" if path.is_dir() else ""
    return f"{'  ' * depth}- [{name}{slash}]({target}){': ' + escaped if about else ''}\n"


if __name__ == "__main__":
    README.write_text(current(README.read_text(encoding="utf-8")), encoding="utf-8")

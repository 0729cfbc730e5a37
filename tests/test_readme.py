"""The README is true: generated parts are current, links lead somewhere, commands exist, CI finds its test command."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import readme
from gptoss_launch.launch.cli import PROGRAM, group

TEXT = readme.README.read_text(encoding="utf-8")
PAGES = [readme.README, readme.ROOT / ".github" / "CONTRIBUTING.md"]
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# (a file's path with a folder in it, or a name that ends as source and data files do)
FILE_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)+|[\w-]+\.(?:py|yaml|yml|json|md|toml|safetensors)")


def shown_commands() -> list[str]:
    """Every command line of ours in the README: in fences with a prompt or after `&&`, and in `code`."""
    lines = [line for block in FENCED.findall(TEXT) for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in re.split(r"^\$ | && |  # ", line)]
    prose = FENCED.sub("", TEXT)
    parts += re.findall(r"`([^`]+)`", prose) + re.findall(r"<!-- plan: (.+) -->", prose)
    return sorted({part.strip() for part in parts if part.strip().startswith(f"{PROGRAM} ")})


def parse(arguments: list[str]) -> None:
    """As the command line does, up to where it would begin to work. Raises click.UsageError."""
    command: click.Command | None = group
    context = click.Context(group)
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.get_command(context, name)
    assert command is not None, f"no command {name}"
    command.make_context(name, arguments)


def test_generated_parts_are_current() -> None:
    assert readme.current(TEXT) == TEXT, "run: python tests/readme.py"
    assert TEXT.count("<!-- tree: ") == len(readme.CODE) and TEXT.count("<!-- plan: ") == 1


def test_the_first_screen_shows_commands_and_a_plan() -> None:
    first = "\n".join(TEXT.splitlines()[:40])
    assert "```console\n$ " in first and "<!-- plan: " in first and "\nwhy  " in first


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert links
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_code_exist(page: Path) -> None:
    """Paths from the root in `code`, and links whose text is a file's name lead to that file."""
    prose = FENCED.sub("", page.read_text(encoding="utf-8"))
    for name in {word for code in re.findall(r"`([^`]+)`", prose) for word in code.split() if "/" in word}:
        if re.match(r"(launch|parallel|configs|slurm|tests|\.ci)/", name):
            assert (readme.ROOT / name).exists(), name
    for name, target in re.findall(r"\[([^]]+)\]\(([^)]+)\)", prose):
        if FILE_NAME.fullmatch(name) and "://" not in target:
            assert Path(target).as_posix().endswith(name), f"[{name}]({target})"


@pytest.mark.parametrize("line", shown_commands())
def test_commands_exist(line: str) -> None:
    if "COMMAND" not in line:
        parse(shlex.split(line)[1:])


def test_some_commands_are_shown() -> None:
    """The tests above would pass on anything if this failed."""
    shown = {line.split()[1] for line in shown_commands()}
    assert {"plan", "serve", "generate", "checkpoint"} <= shown
    with pytest.raises(click.UsageError):
        parse(["plan", "tiny", "--contxt", "8"])


def test_a_shown_plan_can_be_made() -> None:
    for line in shown_commands():
        if line.startswith(f"{PROGRAM} plan "):
            assert readme.output_of(shlex.split(line)[1:]).startswith("plan ")


def test_ci_finds_the_test_command() -> None:
    """.ci/run takes the fenced lines after <!-- test -->."""
    extract = re.search(r"^sed -n .*(?=>\")", (readme.ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert extract
    done = subprocess.run(["bash", "-c", extract[0]], cwd=readme.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["pip install -e '.[test]'", 'pytest -m "not slow" -n 2']

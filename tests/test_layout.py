"""The house rules that a linter cannot see: which part may import which, and that every module says what it is."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("launch", "parallel", "configs", "slurm")
MODULES = sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))
HEAVY = {"torch", "transformers", "safetensors", "triton"}

# part: the parts of the project that it may import (its own files always). Longest prefix counts.
ARROWS = {
    "parallel.errors": set(),
    "parallel.planning": {"parallel.errors"},
    "parallel.kernels": {"parallel.planning", "parallel.errors"},
    "parallel.offload": {"parallel.kernels", "parallel.planning", "parallel.errors"},
    "parallel.model": {"parallel.offload", "parallel.kernels", "parallel.planning", "parallel.errors"},
    "parallel.engine": {
        "parallel.model",
        "parallel.offload",
        "parallel.kernels",
        "parallel.planning",
        "parallel.errors",
    },
    "parallel.training": {
        *("parallel.model", "parallel.offload", "parallel.kernels", "parallel.planning", "parallel.errors"),
    },
    "launch": {
        *("parallel.engine", "parallel.training", "parallel.model", "parallel.planning", "parallel.errors"),
        *("configs", "slurm"),
    },
    "configs": {"parallel"},
    "slurm": set(),
    "parallel": set(),
}


def dotted(path: Path) -> str:
    """launch/api/app.py -> launch.api.app; a package's __init__.py keeps that name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def part_of(module: str) -> str:
    return max((part for part in ARROWS if f"{module}.".startswith(f"{part}.")), key=len)


def imported(path: Path, nodes: "list[ast.AST]") -> set[str]:
    """Modules that import statements among `nodes` name; ours without the package's name in front."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = dotted(path).split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
    return {name.removeprefix("gptoss_launch.") for name in found}


def at_module_level(tree: ast.Module) -> "list[ast.AST]":
    """All nodes that run on import: everything outside functions."""
    nodes: list[ast.AST] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        nodes.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)
    return nodes


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_module(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "opens with no docstring"
    here = part_of(dotted(path))
    names = imported(path, list(ast.walk(tree)))
    for name in names:
        if name.split(".")[0] in CODE:
            there = part_of(name)
            allowed = there == here or any(f"{there}.".startswith(f"{part}.") for part in ARROWS[here])
            assert allowed, f"{here} must not import {name}"
    if here in ("launch", "parallel.planning", "parallel.errors"):
        scope = list(ast.walk(tree)) if here != "launch" else at_module_level(tree)
        heavy = {name.split(".")[0] for name in imported(path, scope)} & HEAVY
        assert not heavy, f"{here} must not load {', '.join(heavy)}"


def test_the_walk_sees_what_it_should(tmp_path: Path) -> None:
    """The checks above would pass on anything if these failed."""
    tree = ast.parse("from ...parallel.planning import plan\nimport torch.nn\ndef f():\n    import triton\n")
    path = ROOT / "launch" / "api" / "app.py"
    assert imported(path, list(ast.walk(tree))) == {"parallel.planning.plan", "torch.nn", "triton"}
    assert imported(path, at_module_level(tree)) == {"parallel.planning.plan", "torch.nn"}
    assert imported(ROOT / "parallel" / "engine" / "kv.py", [ast.parse("from .. import errors").body[0]]) == {
        "parallel.errors"
    }
    assert part_of("parallel.planning.plan.Plan") == "parallel.planning" and part_of("launch.cli") == "launch"


def test_every_folder_of_code_is_packaged() -> None:
    """A package missing from the list works in an editable install and is absent from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in MODULES}
    assert {f"gptoss_launch.{'.'.join(folder.relative_to(ROOT).parts)}" for folder in folders} == set(listed)
    assert all((folder / "__init__.py").exists() for folder in folders)

"""The profiler of decode steps: which steps it looks at, and that its sums are a step's."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from gptoss_launch.parallel.engine.profile import BEFORE, LEAST_TOKENS, STEPS, Profiler
from gptoss_launch.parallel.engine.record import Head

HEAD = Head(**{one.name: 0 for one in dataclasses.fields(Head)})


def run(profiler: Profiler, decodes: int, count: int, chunks: int = 0) -> None:
    x = torch.ones(4, 4)
    for _ in range(count):
        profiler.step(dataclasses.replace(HEAD, decodes=decodes, chunks=chunks))
        torch.mm(x, x)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile.jsonl"


@pytest.mark.slow
def test_sizes_are_looked_at_once_each(path: Path) -> None:
    profiler = Profiler(path, torch.device("cpu"))
    run(profiler, 2, 40, chunks=1)  # prompts beside them
    run(profiler, 2, LEAST_TOKENS - 1)
    run(profiler, 1, BEFORE + STEPS - 1)  # one too few
    run(profiler, 2, LEAST_TOKENS)
    profiler.idle()
    run(profiler, 4, LEAST_TOKENS)
    profiler.idle()
    assert [(line["decodes"], line["steps"]) for line in lines(path)] == [(2, STEPS), (4, STEPS)]
    assert all(line["us"]["aten::mm"] > 0 for line in lines(path))


@pytest.mark.slow
def test_a_pause_begins_again(path: Path) -> None:
    profiler = Profiler(path, torch.device("cpu"))
    for _ in range(3):
        run(profiler, 2, BEFORE + STEPS // 2)
        profiler.idle()
    assert lines(path) == []


def test_times_are_of_one_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STEPS steps of two products each are STEPS times what one line says."""
    seen: list[int] = []
    inner = torch.profiler.profile.key_averages

    def counted(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        found = inner(self, *args, **kwargs)
        seen.extend(one.count for one in found if one.key == "aten::mm")
        return found

    monkeypatch.setattr(torch.profiler.profile, "key_averages", counted)
    run(Profiler(path, torch.device("cpu")), 3, LEAST_TOKENS)
    assert seen == [STEPS]

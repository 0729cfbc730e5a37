"""What memory and link give is measured, and kept for the planner."""

import sys
from pathlib import Path

import pytest
import torch
from gptoss_launch.parallel.kernels.cpu_build import NoLibraryError
from gptoss_launch.parallel.offload import bandwidths
from gptoss_launch.parallel.planning.speeds import read_speeds


@pytest.mark.parametrize("compiled", [True, False])
def test_they_are_kept(compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between what a floppy disk and what no memory gives."""

    def refused(*_: object) -> None:
        raise NoLibraryError("no compiler")

    monkeypatch.setattr(bandwidths, "HOST_BYTES", 64 << 20)
    if not compiled:
        monkeypatch.setattr(bandwidths, "library", refused)
    monkeypatch.setattr(sys, "argv", ["bandwidths", str(tmp_path / "x.json")])
    bandwidths.main()
    found = read_speeds(tmp_path / "x.json")
    assert found.host is not None and 1e8 < found.host < 1e13
    assert (found.link is not None) == torch.cuda.is_available()
    assert found.link is None or 1e9 < found.link < 1e12

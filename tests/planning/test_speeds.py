"""Bandwidths that were measured once: kept, found again by the machine they hold for, and used in its plans."""

from pathlib import Path

import pytest
from gptoss_launch.parallel.planning.machine import probe
from gptoss_launch.parallel.planning.speeds import Speeds, keep_speeds, read_speeds, speeds_file


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.json"
    assert read_speeds(file) == Speeds()
    keep_speeds(file, Speeds(host=10e9, link=None))
    assert read_speeds(file) == Speeds(host=10e9)
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", ["", "[1]", '{"host": 1e9', '{"host": -1, "link": "fast", "other": 3}'])
def test_a_file_that_says_nothing_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    assert read_speeds(tmp_path / "x.json") == Speeds()


def test_each_kind_of_machine_has_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpus = [tmp_path / name for name in ("one", "other", "none")]
    cpus[0].write_text("processor : 0\nmodel name : An EPYC/1\n")
    cpus[1].write_text("model name : A Xeon @ 2.0\n")
    files = [speeds_file(gpu, cores, cpu) for cpu in cpus for gpu in (None, "NVIDIA H200") for cores in (2, 16)]
    assert len(set(files)) == len(files)
    assert {file.parent for file in files} == {tmp_path / "gptoss-launch" / "calibration"}
    assert files[2].name == "bandwidths-NVIDIA-H200-An-EPYC-1-x2.json"


def test_a_probe_knows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = probe()
    assert found.speeds == Speeds() and not found.measured
    file = speeds_file(found.gpus[0].name if found.gpus else None, found.cpu_cores)
    keep_speeds(file, Speeds(host=10e9, link=20e9 if found.gpus else None))
    assert probe().speeds.host == 10e9 and probe().measured

"""How fast this machine's memory and its link to a GPU were found to be, and where that is kept. Measures nothing
(`offload.bandwidths` does)."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_folder

CALIBRATION = "calibration"  # the folder of what was measured once


@dataclass(frozen=True)
class Speeds:
    """Bytes a second; None: not known. host: what all cores together read from memory. link: between host and one GPU.
    disk: what a mapped file gives that is not in memory."""

    host: float | None = None
    link: float | None = None
    disk: float | None = None


def speeds_file(gpu: str | None, cores: int, cpuinfo: Path = Path("/proc/cpuinfo")) -> Path:
    """What is in it holds for this kind of GPU, kind of CPU and number of cores: a home may be that of many nodes."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    cpu = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "cpu")
    name = "".join(one if one.isalnum() else "-" for one in f"{gpu or 'no gpu'} {cpu.strip()} x{cores}")
    return cache_folder(CALIBRATION) / f"bandwidths-{name}.json"


def read_speeds(path: Path) -> Speeds:
    """What was measured before; nothing is known where nothing was."""
    try:
        values = json.loads(path.read_text("utf-8"))
        kept = {field.name: values.get(field.name) for field in dataclasses.fields(Speeds)}
    except (OSError, ValueError, AttributeError):
        return Speeds()
    return Speeds(
        **{name: float(value) for name, value in kept.items() if isinstance(value, int | float) and value > 0}
    )


def keep_speeds(path: Path, speeds: Speeds) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(dataclasses.asdict(speeds)) + "\n", encoding="utf-8")
    draft.replace(path)

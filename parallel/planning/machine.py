"""What hardware there is: probed here and now, or read from a named YAML file for hardware that is elsewhere.

Knows nothing of models or plans. Probing needs no torch: NVML for GPUs, /proc and cgroups for memory. What cannot be
found out stays None rather than being guessed.
"""

import importlib.resources
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError, did_you_mean
from .speeds import Speeds, read_speeds, speeds_file
from .yaml_text import load_yaml

Link = Literal["nvlink", "pcie", "none"]
LINKS: tuple[Link, ...] = ("nvlink", "pcie", "none")

UNITS_BYTES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


@dataclass(frozen=True)
class Gpu:
    """One GPU. capability is NVIDIA's compute capability: (9, 0) is sm_90."""

    name: str
    memory_bytes: int
    free_bytes: int  # now, before any process of ours
    capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """`nodes` equal nodes; everything else is of one node."""

    name: str
    gpus: tuple[Gpu, ...]
    host_memory_bytes: int | None  # that a process may still take; None: not known
    cpu_cores: int
    nodes: int
    link: Link  # between GPUs of a node; "none" with fewer than two
    speeds: Speeds = Speeds()

    @property
    def measured(self) -> bool:
        """Whether it is known what the host's memory gives, and the link to a GPU if there is one."""
        return self.speeds.host is not None and (not self.gpus or self.speeds.link is not None)


def parse_size(text: str) -> int:
    """Bytes of "11GiB", "80GB" or "123". Raises UserError."""
    stripped = text.strip().lower()
    number = stripped.rstrip("bikmgt")
    unit = stripped[len(number) :]
    try:
        size = float(number) * UNITS_BYTES[unit]
    except (ValueError, KeyError):
        size = -1.0
    if not 0 <= size < 2**63:
        raise UserError(f"{text!r} is no size", "write 11GiB, 80GB or a number of bytes")
    return int(number) * UNITS_BYTES[unit] if number.strip().isdigit() else round(size)


def format_size(size_bytes: int) -> str:
    """ "12.8 GiB"; for reading, not for computing."""
    for unit in ("GiB", "MiB", "KiB"):
        if size_bytes >= UNITS_BYTES[unit.lower()]:
            return f"{size_bytes / UNITS_BYTES[unit.lower()]:.1f} {unit}"
    return f"{size_bytes} B"


# --- here and now


def probe() -> Machine:
    """This machine as it is now. GPUs that CUDA_VISIBLE_DEVICES hides are left out, in its order.

    GPUs are numbered by PCI bus, as NVML and nvidia-smi do; ranks must run with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    gpus, link = _probe_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        name=platform.node() or "this machine",
        gpus=gpus,
        host_memory_bytes=available_host_bytes(),
        cpu_cores=cores,
        nodes=int(nodes) if nodes.isdigit() and int(nodes) else 1,
        link=link,
        speeds=read_speeds(machine_speeds_file(gpus, cores)),
    )


def machine_speeds_file(gpus: tuple[Gpu, ...], cores: int) -> Path:
    """Of this machine, by what it was found to have."""
    return speeds_file(gpus[0].name if gpus else None, cores)


def _probe_gpus(visible: str | None) -> tuple[tuple[Gpu, ...], Link]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, or no GPU
        return (), "none"
    try:
        chosen = visible_handles(pynvml, visible)
        gpus = []
        for handle in chosen:
            memory: Any = pynvml.nvmlDeviceGetMemoryInfo(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(Gpu(_text(pynvml.nvmlDeviceGetName(handle)), memory.total, memory.free, (major, minor)))
        link = "none" if len(chosen) < 2 else "nvlink" if all(_has_nvlink(pynvml, h) for h in chosen) else "pcie"
        return tuple(gpus), link
    except pynvml.NVMLError as error:  # such as a GPU that fell off the bus, or one that shares the host's memory
        raise UserError(f"a GPU does not answer: {error}", "--machine FILE.yaml says what is here instead") from None
    finally:
        pynvml.nvmlShutdown()


def visible_handles(nvml: Any, visible: str | None) -> list[Any]:
    """NVML's handles of the GPUs that CUDA shows, in its order. nvml: the module, begun with."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    return [handles[index] for index in visible_indexes(visible, uuids)]


def _text(value: str | bytes) -> str:
    """NVML's Python binding returned bytes before version 11.5."""
    return value.decode() if isinstance(value, bytes) else value


def _has_nvlink(pynvml: Any, handle: Any) -> bool:
    for number in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if pynvml.nvmlDeviceGetNvLinkState(handle, number):
                return True
        except pynvml.NVMLError:  # this GPU has no link of that number
            return False
    return False


def visible_indexes(visible: str | None, uuids: list[str]) -> list[int]:
    """Which of the GPUs with `uuids` CUDA shows, in its order.

    Rules of the CUDA C++ Programming Guide on CUDA_VISIBLE_DEVICES: indexes or (beginnings of) UUIDs; the first entry
    that names no GPU hides itself and all after it.
    """
    if visible is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for entry in (entry.strip() for entry in visible.split(",")):
        if entry.isdigit():
            matches = [int(entry)] if int(entry) < len(uuids) else []
        else:
            matches = [index for index, uuid in enumerate(uuids) if entry and uuid.lower().startswith(entry.lower())]
        if len(matches) != 1:
            break
        found += matches
    return found


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """Host memory that a new process may take: MemAvailable, or what its cgroup and those above still allow.

    None where neither is known (Windows). macOS does not say what is available: there it is all of physical memory.
    root: where /proc and /sys are, for tests.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        names: Mapping[str, int] = getattr(os, "sysconf_names", {})
        known = "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    meminfo = {line.split(":")[0]: line.split()[1] for line in lines if len(line.split()) > 1}
    limits = [int(meminfo["MemAvailable"]) * 1024] if "MemAvailable" in meminfo else []  # since Linux 3.14
    limits += _cgroup_allowances(root)
    return min(limits, default=None)


def _cgroup_allowances(root: Path) -> list[int]:
    """Bytes that each cgroup of this process still allows, where it has a limit: limit - used + droppable page cache.

    https://docs.kernel.org/admin-guide/cgroup-v2.html and, for the older hierarchy, cgroup-v1/memory.html.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    allowances = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers == "":
            top, limit_name, used_name = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limit_name, used_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(top):
                break
            try:
                limit, used = (group / limit_name).read_text().strip(), int((group / used_name).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue  # the root group and groups outside our namespace have no such files
            if limit.isdigit():
                cache = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
                allowances.append(max(0, int(limit) - used + cache))
    return allowances


# --- elsewhere


def machine_names() -> tuple[str, ...]:
    """Names of the machines that ship with the package, sorted."""
    folder = importlib.resources.files("gptoss_launch.configs") / "machines"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def read_machine(name_or_path: str) -> Machine:
    """The machine of configs/machines/NAME.yaml, or of a YAML file of the same form.

    Raises UserError for an unknown name, an unknown key or a value that makes no sense.
    """
    import yaml

    if name_or_path.endswith((".yaml", ".yml")):
        where, name = name_or_path, Path(name_or_path).stem
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where}: not readable: {error}", "--machine takes a name or a YAML file") from None
    else:
        where, name = f"configs/machines/{name_or_path}.yaml", name_or_path
        if name not in machine_names():
            raise UserError(f"no machine {name!r}", did_you_mean(name, machine_names()))
        folder = importlib.resources.files("gptoss_launch.configs") / "machines"
        text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        fields = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: no YAML: {' '.join(str(error).split())}", "see configs/machines/h100.yaml") from None
    values = _read_fields(fields, _MACHINE_FIELDS, where, ("bandwidth",))
    gpus = tuple(gpu for group in values["gpus"] for gpu in _read_gpus(group, where))
    if (values["link"] == "none") != (len(gpus) < 2):
        raise UserError(f"{where}: link is {values['link']!r} with {len(gpus)} GPUs", "none is for fewer than two GPUs")
    return Machine(
        name,
        gpus,
        values["host_memory"],
        values["cpu_cores"],
        values["nodes"],
        values["link"],
        values.get("bandwidth", Speeds()),
    )


def _size(value: Any) -> int:
    return parse_size(str(value))


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{value!r} is no positive whole number")
    return value


def _capability(value: Any) -> tuple[int, int]:
    major, _, minor = str(value).partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise UserError(f"{value!r} is no compute capability such as 9.0")
    return int(major), int(minor)


def _link(value: Any) -> Link:
    if value not in LINKS:
        raise UserError(f"{value!r} is none of {', '.join(LINKS)}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{value!r} is no list")
    return value


def _speed(value: Any) -> float:
    """Bytes a second, at least one."""
    return float(_count(_size(value)))


def _speeds(value: Any) -> Speeds:
    readers: dict[str, Callable[[Any], Any]] = {"host": _speed, "link": _speed, "disk": _speed}
    return Speeds(**_read_fields(value, readers, "bandwidth", tuple(readers)))


_MACHINE_FIELDS: dict[str, Callable[[Any], Any]] = {
    "gpus": _list,
    "host_memory": _size,
    "cpu_cores": _count,
    "nodes": _count,
    "link": _link,
    "bandwidth": _speeds,
}
_GPU_FIELDS: dict[str, Callable[[Any], Any]] = {
    "count": _count,
    "name": str,
    "memory": _size,
    "free": _size,
    "capability": _capability,
}


def _read_gpus(fields: Any, where: str) -> tuple[Gpu, ...]:
    values = _read_fields(fields, _GPU_FIELDS, where)
    if values["free"] > values["memory"]:
        hint = "free is what an idle one reports, at most its memory"
        raise UserError(f"{where}: {values['free']} bytes free of {values['memory']}", hint)
    gpu = Gpu(values["name"], values["memory"], values["free"], values["capability"])
    return (gpu,) * values["count"]


def _read_fields(
    fields: Any, readers: dict[str, Callable[[Any], Any]], where: str, optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Every field of `readers`, read; raises UserError for one too many, one too few or one that does not read. Those
    that are optional may be missing, here too."""
    if not isinstance(fields, dict):
        raise UserError(f"{where}: {fields!r} is no mapping", f"known: {', '.join(readers)}")
    for key in fields:
        if key not in readers:
            raise UserError(f"{where}: unknown key {key!r}", did_you_mean(str(key), readers))
    values = {}
    for key, read in readers.items():
        if key not in fields and key in optional:
            continue
        if key not in fields:
            needed = ", ".join(key for key in readers if key not in optional)
            raise UserError(f"{where}: no {key}", f"every one of {needed} is needed")
        try:
            values[key] = read(fields[key])
        except UserError as error:
            raise UserError(
                f"{where}: {key}: {error.message}", error.hint or "see configs/machines/h100.yaml"
            ) from None
    return values

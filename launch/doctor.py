"""Is this machine fit to run a model: what is here, what is wanted, and what to do about the difference.

`look` reads the machine into plain facts, `judge` makes checks of them and touches nothing. Loads no torch: what it is
built for stands in its files. Does not measure speed, and does not try kernels.
"""

import os
import re
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from ..parallel.errors import UserError
from ..parallel.planning.choice import dtype_of, sm
from ..parallel.planning.headers import check_inventory, read_inventory
from ..parallel.planning.machine import Gpu, available_host_bytes, format_size, probe
from ..parallel.planning.spec import read_config
from .extras import SERVE
from .gpu_health import Health, judge_gpus, look_at_gpus
from .node_reports import Check
from .version import own_version

GIB = 1 << 30
SHM_WANTED_BYTES = 512 << 20  # docker's default of 64 MiB ends NCCL with a bus error
TEMPORARY_WANTED_BYTES = GIB  # sockets, logs, compiled kernels
FILES_WANTED = 1024  # a connection each, and several a rank
PYTHON_WANTED = (3, 11)
PORT = 8000  # of serve, if nothing else is said
INSTALL = "pip install 'gptoss-launch[serve]'"


@dataclass(frozen=True)
class Facts:
    """What was seen. packages: name -> version or None. torch_cuda: the CUDA that torch was built for, None for a build
    without. driver: (its version, the newest CUDA that it runs), None where no driver answers; driver_error says why.
    nvidia_devices: character devices of GPUs, which are there without a driver that answers, too. given_gpus: how many
    Slurm says that this job has here, None outside of a job. checkpoint: what is
    wrong with MODEL and its hint, or None; tokenizer likewise."""

    python: tuple[int, int]
    packages: dict[str, str | None]
    ranges: dict[str, str]
    torch_cuda: str | None
    driver: tuple[str, tuple[int, int]] | None
    driver_error: str
    nvidia_devices: int
    given_gpus: int | None
    gpus: tuple[Gpu, ...]
    health: tuple[Health, ...]
    host_free_bytes: int | None
    shm_free_bytes: int | None
    temporary: str
    temporary_free_bytes: int
    open_files: int
    locked_memory_limited: bool
    infiniband: bool
    port_free: bool
    model: str | None
    checkpoint: tuple[str, str] | None
    tokenizer: tuple[str, str] | None


def equal_on_all_nodes(facts: Facts) -> dict[str, str]:
    """What nodes that work together must have alike, by name."""
    kinds = Counter(gpu.name for gpu in facts.gpus)
    return {
        "gptoss-launch": own_version(),
        "python": ".".join(map(str, facts.python)),
        **{name: found or "not installed" for name, found in facts.packages.items()},
        "CUDA of torch": facts.torch_cuda or "none",
        "driver": facts.driver[0] if facts.driver else "none",
        "GPUs": ", ".join(f"{count} x {name}" for name, count in kinds.items()) or "none",
    }


def judge(facts: Facts) -> list[Check]:
    """A check for everything that must hold; those that do not concern this machine are left out."""
    checks = [check for judges in _JUDGES for check in judges(facts)]
    return [replace(check, hint="") if check.ok else check for check in checks]


# --- the judgements


def _python(facts: Facts) -> Iterable[Check]:
    found, wanted = ".".join(map(str, facts.python)), ".".join(map(str, PYTHON_WANTED))
    yield Check(
        "python", found, f"{wanted} or later", facts.python >= PYTHON_WANTED, "make the venv with a newer Python"
    )


def _packages(facts: Facts) -> Iterable[Check]:
    for name, found in facts.packages.items():
        wanted = facts.ranges.get(name, "")
        fits = found is not None and _fits(found, wanted)
        yield Check(name, found or "not installed", wanted or "any version", fits, INSTALL)


def _driver(facts: Facts) -> Iterable[Check]:
    if facts.driver is None:
        if facts.nvidia_devices:
            found = f"{facts.nvidia_devices} NVIDIA devices, and no driver that answers: {facts.driver_error}"
            yield Check("driver", found, "a driver that answers", False, "ask the administrator; nvidia-smi says more")
        return
    number, cuda = facts.driver
    found = f"driver {number}, which runs CUDA {cuda[0]}.{cuda[1]} and older"
    if facts.packages.get("torch") is None:
        yield Check("driver", found, "any", True, "")
    elif facts.torch_cuda is None:
        message = f"torch {facts.packages['torch']}, built without CUDA"
        yield Check(
            "torch and CUDA", message, "torch built with CUDA", False, "pip install torch, from PyPI's own index"
        )
    else:
        major = int(facts.torch_cuda.partition(".")[0])
        hint = f"a newer driver, or a torch built for CUDA {cuda[0]}"
        yield Check("driver", found, f"CUDA {major}, as torch is built for {facts.torch_cuda}", cuda[0] >= major, hint)


def _gpus(facts: Facts) -> Iterable[Check]:
    if facts.given_gpus is not None:
        hint = "one fell off the bus, or CUDA_VISIBLE_DEVICES hides it: leave this node out until it is seen to"
        enough = len(facts.gpus) >= facts.given_gpus
        yield Check("GPU count", str(len(facts.gpus)), f"{facts.given_gpus}, as Slurm gave", enough, hint)
    for number, gpu in enumerate(facts.gpus):
        dtype = dtype_of(gpu)
        found = f"{gpu.name}, {sm(gpu)}, {format_size(gpu.free_bytes)} free of {format_size(gpu.memory_bytes)}"
        hint = "it cannot run a torch built for CUDA 13; hide it: CUDA_VISIBLE_DEVICES"
        yield Check(f"GPU {number}", found + (f", {dtype}" if dtype else ""), "sm_75 or later", dtype is not None, hint)
    yield from judge_gpus(facts.health)


def _memory(facts: Facts) -> Iterable[Check]:
    if facts.shm_free_bytes is not None:
        found = f"{format_size(facts.shm_free_bytes)} free"
        hint = "docker run --shm-size=8g, or --ipc=host"
        enough = facts.shm_free_bytes >= SHM_WANTED_BYTES
        yield Check("/dev/shm", found, format_size(SHM_WANTED_BYTES), enough, hint)
    if facts.host_free_bytes is not None:
        found = f"{format_size(facts.host_free_bytes)} free"
        enough = facts.host_free_bytes >= 2 * GIB
        yield Check("host memory", found, "2.0 GiB", enough, "end other programs, or ask Slurm for more: --mem")


def _disk(facts: Facts) -> Iterable[Check]:
    found = f"{format_size(facts.temporary_free_bytes)} free in {facts.temporary}"
    enough = facts.temporary_free_bytes >= TEMPORARY_WANTED_BYTES
    yield Check("temporary folder", found, format_size(TEMPORARY_WANTED_BYTES), enough, "make room, or set TMPDIR")


def _limits(facts: Facts) -> Iterable[Check]:
    enough = facts.open_files >= FILES_WANTED
    yield Check("open files", str(facts.open_files), f"{FILES_WANTED} or more", enough, "ulimit -n 65536")
    if facts.infiniband:
        found = "limited" if facts.locked_memory_limited else "unlimited"
        hint = "ulimit -l unlimited, or PropagateResourceLimitsExcept=MEMLOCK in slurm.conf"
        yield Check("locked memory", found, "unlimited, for InfiniBand", not facts.locked_memory_limited, hint)


def _ports(facts: Facts) -> Iterable[Check]:
    found = "free" if facts.port_free else "taken"
    yield Check(f"port {PORT}", found, "free", facts.port_free, "serve --port N takes another")


def _model(facts: Facts) -> Iterable[Check]:
    if facts.model is not None:
        for name, wrong, wanted in (
            ("checkpoint", facts.checkpoint, "index, names and shapes as published"),
            ("tokenizer", facts.tokenizer, "harmony's special tokens"),
        ):
            message, hint = wrong or (f"{facts.model}, whole", "")
            yield Check(name, message, wanted, wrong is None, hint)


_JUDGES: tuple[Callable[[Facts], Iterable[Check]], ...] = (
    _python,
    _packages,
    _driver,
    _gpus,
    _memory,
    _disk,
    _limits,
    _ports,
    _model,
)


def _fits(found: str, wanted: str) -> bool:
    """Whether a version is in a range such as `>=2.11,<2.14`. Compares numbers; what follows them does not count."""
    numbers = _numbers(found)
    for term in filter(None, wanted.split(",")):
        match = re.fullmatch(r"\s*(>=|<=|==|<|>|!=|~=)\s*([\d.]+).*", term)
        if match is None:
            continue
        limit = _numbers(match[2])
        width = max(len(numbers), len(limit))
        have, want = (tuple([*one, *[0] * (width - len(one))]) for one in (numbers, limit))
        holds = {
            **{">=": have >= want, "<=": have <= want, "==": have == want, "<": have < want, ">": have > want},
            **{"!=": have != want, "~=": have >= want and numbers[: len(limit) - 1] == limit[:-1]},
        }
        if not holds[match[1]]:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


# --- what is here


def look(model: str | None) -> Facts:
    """This machine, now. model: what `serve` would be given, if it is to be looked at, too. Downloads nothing."""
    import resource

    driver, error, health = _look_at_driver()
    gpus: tuple[Gpu, ...] = ()
    if driver is not None:
        try:
            gpus = probe().gpus
        except UserError as lost:  # a GPU that fell off the bus
            driver, error = None, lost.message
    temporary = tempfile.gettempdir()
    checkpoint, tokenizer = _look_at_model(model) if model is not None else (None, None)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return Facts(
        python=sys.version_info[:2],
        packages={name: _version(name) for name in SERVE},
        ranges=_ranges(),
        torch_cuda=_torch_cuda(),
        driver=driver,
        driver_error=error,
        nvidia_devices=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        given_gpus=int(given) if given.isdigit() else None,
        gpus=gpus,
        health=health,
        host_free_bytes=available_host_bytes(),
        shm_free_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        temporary=temporary,
        temporary_free_bytes=shutil.disk_usage(temporary).free,
        open_files=sys.maxsize if files == resource.RLIM_INFINITY else files,
        locked_memory_limited=hasattr(resource, "RLIMIT_MEMLOCK")
        and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY,
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
        port_free=_port_free(PORT),
        model=model,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _ranges() -> dict[str, str]:
    """Versions that the [serve] install wants, from our own metadata; {} where we run from source, not installed."""
    try:
        lines = requires("gptoss-launch") or []
    except PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        wanted, _, marker = line.partition(";")
        match = re.match(r"([\w.-]+)\s*(.*)", wanted.strip())
        if match and 'extra == "serve"' in marker.replace("'", '"'):
            found[match[1]] = match[2].strip(" ()")
    return found


def _torch_cuda() -> str | None:
    """The CUDA of the installed torch, from its version.py: loading torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _look_at_driver() -> tuple[tuple[str, tuple[int, int]] | None, str, tuple[Health, ...]]:
    """((driver's version, newest CUDA that it runs) or None, why there is none, how the GPUs are)."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, str(error), ()
    try:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()  # 13020 for 13.2
        number = pynvml.nvmlSystemGetDriverVersion()
        text = number.decode() if isinstance(number, bytes) else str(number)
        return (text, (cuda // 1000, cuda % 1000 // 10)), "", look_at_gpus(pynvml)
    except pynvml.NVMLError as error:
        return None, str(error), ()
    finally:
        pynvml.nvmlShutdown()


def _look_at_model(model: str) -> tuple[tuple[str, str] | None, tuple[str, str] | None]:
    """(what is wrong with the weights, what with the tokenizer), each with its hint, or None."""
    from .resolve import CONFIG, local_model

    try:
        folder = local_model(model)
    except UserError as error:
        return (error.message, error.hint), ("not here", "")
    weights = tokens = None
    try:
        check_inventory(read_config(folder / CONFIG), read_inventory(folder), folder)
    except UserError as error:
        weights = (error.message, error.hint)
    if find_spec("tokenizers") is None:
        return weights, ("tokenizers is not installed", INSTALL)
    from .tokenizer import load_tokenizer

    try:
        load_tokenizer(folder)
    except UserError as error:
        tokens = (error.message, error.hint)
    return weights, tokens


def _port_free(port: int) -> bool:
    with socket.socket() as probing:
        probing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probing.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True

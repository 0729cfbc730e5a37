"""C++ of ours -> a shared library for this CPU, compiled at first use and kept on disk.

Looks for a compiler and for what the CPU can do; knows nothing of what is compiled. A library is written whole or not
at all, under a name that holds a digest of all that it came from, so that ranks which start together may all compile.
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..planning.cache import cache_folder

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off")
COMPILE_LIMIT_S = 300.0


@dataclass(frozen=True)
class Level:
    """Instructions that code may use. needs: flags of /proc/cpuinfo."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


def _level(name: str, *needs: str) -> Level:
    return Level(name, frozenset(needs), tuple(f"-m{need}" for need in needs))


LEVELS = (  # the best first
    _level("avx512", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"),
    _level("avx2", "avx2", "fma"),
    _level("portable"),
)


class NoLibraryError(Exception):
    """Nothing could be compiled; says why, in one line."""


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What Linux says of the first CPU; empty elsewhere, and on CPUs that are not x86."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())


def level_for(flags: frozenset[str]) -> Level:
    """The best that a CPU with `flags` can run."""
    return next(level for level in LEVELS if level.needs <= flags)


def library(
    source: Path, level: Level, cache: Path | None = None, compilers: tuple[str, ...] = COMPILERS
) -> ctypes.CDLL:
    """`source` compiled for `level` and loaded. cache: a folder; the user's own unless given.

    Raises NoLibraryError without a compiler, or with one that refuses.
    """
    compiler = next((path for path in map(shutil.which, compilers) if path), None)
    digest = hashlib.sha256(repr((source.read_text("utf-8"), FLAGS, level.flags)).encode()).hexdigest()[:16]
    folder = cache or cache_folder("compiled")
    kept = folder / f"{source.stem}-{level.name}-{digest}.so"
    if kept.exists():
        try:
            return ctypes.CDLL(str(kept))
        except OSError:  # of another system that shares this home
            pass
    if compiler is None:
        raise NoLibraryError(f"no C++ compiler ({', '.join(compilers)})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        workplace = tempfile.TemporaryDirectory(dir=folder)
    except OSError:  # a home that cannot be written only means compiling again next time
        workplace = tempfile.TemporaryDirectory()
    with workplace as draft_folder:
        draft = Path(draft_folder) / kept.name
        _compile([compiler, *FLAGS, *level.flags, "-o", str(draft), str(source)])
        try:
            loaded = ctypes.CDLL(str(draft))  # before anybody else can see it
        except OSError as error:
            raise NoLibraryError(f"what {compiler} made does not load: {error}") from None
        try:
            draft.replace(kept)
        except OSError:
            pass
    return loaded


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibraryError(f"{command[0]}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise NoLibraryError(f"{command[0]} failed: {' '.join(said.split())[:200]}")

"""Probing with a fake NVML and fake /proc, named machines, and sizes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning import machine as machine_module
from gptoss_launch.parallel.planning.machine import (
    available_host_bytes,
    format_size,
    machine_names,
    parse_size,
    probe,
    read_machine,
    visible_indexes,
)

GIB = 2**30


class FakeNvmlError(Exception):
    pass


def fake_nvml(count: int, *, driver: bool = True, nvlink: bool = False) -> SimpleNamespace:
    """The functions of pynvml that `probe` calls; GPU i has 80 GiB, of which 70 + i are free."""

    def init() -> None:
        if not driver:
            raise FakeNvmlError("Driver Not Loaded")

    def link_state(handle: int, number: int) -> int:
        if not nvlink:
            raise FakeNvmlError("Invalid Argument")
        return 1

    return SimpleNamespace(
        NVMLError=FakeNvmlError,
        NVML_NVLINK_MAX_LINKS=18,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}{handle}aa-bb",
        nvmlDeviceGetName=lambda handle: b"NVIDIA Fake" if handle == 0 else "NVIDIA Fake",  # old bindings gave bytes
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 * GIB, free=(70 + handle) * GIB),
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
        nvmlDeviceGetNvLinkState=link_state,
    )


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("visible", "free_gib"),
    [
        (None, [70, 71, 72, 73]),
        ("2,0", [72, 70]),
        ("GPU-11aa-bb,3", [71, 73]),
        ("GPU-3", [73]),
        ("", []),
        ("-1", []),
        ("1,9,2", [71]),  # CUDA stops at the first that is not there
    ],
)
def test_probe_sees_what_cuda_sees(visible: str | None, free_gib: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(4))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = probe().gpus
    assert [gpu.free_bytes // GIB for gpu in gpus] == free_gib
    assert all(gpu.name == "NVIDIA Fake" and gpu.capability == (9, 0) for gpu in gpus)


def test_ambiguous_uuid_hides_itself() -> None:
    assert visible_indexes("GPU-", ["GPU-1", "GPU-2"]) == []


@pytest.mark.parametrize(("count", "nvlink", "link"), [(1, True, "none"), (2, True, "nvlink"), (2, False, "pcie")])
def test_link(count: int, nvlink: bool, link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(count, nvlink=nvlink))
    assert probe().link == link


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(4, driver=False))
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    found = probe()
    assert found.gpus == () and found.link == "none" and found.nodes == 2
    assert found.cpu_cores >= 1 and found.host_memory_bytes


def test_a_gpu_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(handle: int) -> None:
        raise FakeNvmlError("GPU is lost")

    nvml = fake_nvml(1)
    nvml.nvmlDeviceGetMemoryInfo = lost
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with pytest.raises(UserError, match="a GPU does not answer: GPU is lost"):
        probe()


def test_windows_and_macos_do_not_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_host_bytes(tmp_path)  # no /proc, but sysconf: macOS
    monkeypatch.delattr(machine_module.os, "sysconf_names")
    monkeypatch.delattr(machine_module.os, "sched_getaffinity", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(0, driver=False))
    assert available_host_bytes(tmp_path) is None
    assert probe().cpu_cores >= 1


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = {"proc/meminfo": f"MemTotal: {32 * 2**20} kB\nMemAvailable: {24 * 2**20} kB\nHugePages_Total: 0\n"}


def test_host_memory_without_limit(tmp_path: Path) -> None:
    group = {"memory.max": "max", "memory.current": "1", "memory.stat": "anon 1"}
    write(
        tmp_path, MEMINFO | {"proc/self/cgroup": "0::/job\n"} | {f"sys/fs/cgroup/job/{k}": v for k, v in group.items()}
    )
    assert available_host_bytes(tmp_path) == 24 * GIB


def test_host_memory_under_cgroup_v2_limit_of_a_parent(tmp_path: Path) -> None:
    write(tmp_path, MEMINFO | {"proc/self/cgroup": "0::/slurm/job_1/step_0\n"})
    group = {
        "memory.max": str(16 * GIB),
        "memory.current": str(6 * GIB),
        "memory.stat": f"anon {4 * GIB}\ninactive_file {1 * GIB}\nactive_file {1 * GIB}\n",
    }
    write(tmp_path, {f"sys/fs/cgroup/slurm/job_1/{name}": text for name, text in group.items()})
    assert available_host_bytes(tmp_path) == 12 * GIB  # 16 - 6 used, 2 of which are page cache


def test_host_memory_under_cgroup_v1_limit(tmp_path: Path) -> None:
    write(tmp_path, MEMINFO | {"proc/self/cgroup": "3:cpu:/x\n2:memory:/box\n"})
    group = {"memory.limit_in_bytes": str(8 * GIB), "memory.usage_in_bytes": str(GIB), "memory.stat": "cache 0\n"}
    write(tmp_path, {f"sys/fs/cgroup/memory/box/{name}": text for name, text in group.items()})
    assert available_host_bytes(tmp_path) == 7 * GIB


@pytest.mark.parametrize("name", machine_names())
def test_every_named_machine_reads(name: str) -> None:
    found = read_machine(name)
    assert found.name == name and found.host_memory_bytes
    assert all(gpu.free_bytes < gpu.memory_bytes for gpu in found.gpus)


def test_a_machine_by_its_numbers() -> None:
    found = read_machine("h100x8-2nodes")
    assert (len(found.gpus), found.nodes, found.link) == (8, 2, "nvlink")
    assert (found.gpus[0].memory_bytes, found.gpus[0].capability) == (81559 * 2**20, (9, 0))


def test_unknown_machine_names_the_near_match_and_all() -> None:
    with pytest.raises(UserError) as caught:
        read_machine("h100-x8")
    assert caught.value.message == "no machine 'h100-x8'"
    assert caught.value.hint.startswith("did you mean h100x8? known: ")
    assert all(name in caught.value.hint for name in machine_names())


GOOD = """
gpus:
  - {count: 2, name: Mine, memory: 24GiB, free: 23GiB, capability: 8.6}
host_memory: 32GB
cpu_cores: 8
nodes: 1
link: pcie
"""


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("cpu_cores", "cpu_core", ["unknown key 'cpu_core'", "did you mean cpu_cores?"]),
        ("memory: 24GiB", "memori: 24GiB", ["unknown key 'memori'", "did you mean memory?"]),
        ("nodes: 1", "", ["no nodes"]),
        ("nodes: 1", "nodes: many", ["nodes: 'many' is no positive whole number", "hint: see configs/machines"]),
        ("32GB", "32 apples", ["host_memory: '32 apples' is no size"]),
        ("free: 23GiB", "free: 25GiB", ["bytes free of"]),
        ("8.6", "sm_86", ["'sm_86' is no compute capability"]),
        ("link: pcie", "link: none", ["link is 'none' with 2 GPUs"]),
        ("link: pcie", "link: pci", ["'pci' is none of nvlink, pcie, none"]),
        ("link: pcie", "link: [", ["no YAML"]),
        ("link: pcie", "link: pcie\nnodes: 2", ["key 'nodes' twice"]),
        (GOOD, "- 1", ["is no mapping"]),
    ],
)
def test_own_machine_file(old: str, new: str, named: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert [gpu.name for gpu in read_machine(str(path)).gpus] == ["Mine", "Mine"]
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError) as caught:
        read_machine(str(path))
    assert all(words in str(caught.value) for words in [str(path), *named])


def test_missing_machine_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not readable"):
        read_machine(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("11GiB", 11 * GIB),
        ("80GB", 80 * 10**9),
        ("123", 123),
        ("1.5 gib", 3 * GIB // 2),
        ("0", 0),
        (" 5 MB ", 5 * 10**6),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e30GiB", "nan", "inf", "eleven", "11 GiB free", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="is no size"):
        parse_size(text)


def test_format_size() -> None:
    assert [format_size(size) for size in (0, 1023, 1536, 2**20, 13_761_264_768)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.0 MiB",
        "12.8 GiB",
    ]

"""`doctor`: each fault, injected into the facts of a healthy machine, is the one thing that is said to be wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gptoss_launch.launch import doctor
from gptoss_launch.launch.cli import run
from gptoss_launch.launch.doctor import GIB, Facts, _fits, judge, look
from gptoss_launch.launch.doctor_measures import judge_kernels, measure
from gptoss_launch.launch.extras import SERVE
from gptoss_launch.launch.gpu_health import Health, judge_gpus, look_at_gpus
from gptoss_launch.launch.gpu_links import Link, judge_links, links_of
from gptoss_launch.launch.resolve import tiny_folder
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.model import kernel_check
from gptoss_launch.parallel.model.kernel_check import Agreement
from gptoss_launch.parallel.planning.machine import Gpu

FINE = Health(0, False, False, (), 40, ())
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, (9, 0))
HEALTHY = Facts(
    python=(3, 12),
    packages=dict.fromkeys(SERVE, "2.11.0"),
    ranges={"torch": "<2.14,>=2.11"},
    torch_cuda="13.0",
    driver=("580.65", (13, 0)),
    driver_error="",
    nvidia_devices=1,
    given_gpus=1,
    gpus=(H100,),
    health=(FINE,),
    host_free_bytes=64 * GIB,
    shm_free_bytes=8 * GIB,
    temporary="/tmp",
    temporary_free_bytes=100 * GIB,
    open_files=65536,
    locked_memory_limited=False,
    infiniband=True,
    port_free=True,
    model="tiny",
    checkpoint=None,
    tokenizer=None,
)


NO_DRIVER: dict[str, Any] = {"driver": None, "gpus": (), "health": (), "given_gpus": None}


def test_a_healthy_machine() -> None:
    checks = judge(HEALTHY)
    assert all(check.ok and not check.hint for check in checks)
    assert {"python", "torch", "driver", "GPU 0", "/dev/shm", "open files", "checkpoint", "tokenizer"} <= {
        check.name for check in checks
    }


@pytest.mark.parametrize(
    ("change", "name", "found", "hint"),
    [
        ({"python": (3, 10)}, "python", "3.10", "newer Python"),
        ({"packages": HEALTHY.packages | {"msgpack": None}}, "msgpack", "not installed", "pip install"),
        ({"packages": HEALTHY.packages | {"torch": "2.10.1+cu130"}}, "torch", "2.10.1+cu130", "pip install"),
        # "11 GB card, old driver, torch without CUDA": which of the three it is
        ({"gpus": (Gpu("GTX 1080 Ti", 11 * GIB, 10 * GIB, (6, 1)),)}, "GPU 0", "sm_61", "CUDA 13"),
        ({"driver": ("535.183", (12, 2))}, "driver", "driver 535.183, which runs CUDA 12.2", "a newer driver"),
        ({"torch_cuda": None}, "torch and CUDA", "built without CUDA", "PyPI"),
        (NO_DRIVER | {"driver_error": "not loaded"}, "driver", "not loaded", "administrator"),
        ({"given_gpus": 8}, "GPU count", "1", "fell off the bus"),
        ({"health": (replace(FINE, processes=("71 x",)),)}, "other processes on the GPUs", "GPU 0: 71 x", "end them"),
        ({"health": (replace(FINE, uncorrected=3),)}, "GPU 0 health", "3 memory errors", "--gpu-reset"),
        ({"health": (FINE, replace(FINE, remap_failed=True))}, "GPU 1 health", "cannot be replaced", "be replaced"),
        ({"health": (replace(FINE, remap_pending=True),)}, "GPU 0 health", "wait to be replaced", "--gpu-reset"),
        ({"health": (replace(FINE, slowed=("slowed down for heat",)),)}, "GPU 0 health", "for heat, 40 C", "cooling"),
        ({"shm_free_bytes": 64 << 20}, "/dev/shm", "64.0 MiB free", "--shm-size"),
        ({"host_free_bytes": GIB}, "host memory", "1.0 GiB free", "--mem"),
        ({"temporary_free_bytes": 0}, "temporary folder", "0 B free in /tmp", "TMPDIR"),
        ({"open_files": 256}, "open files", "256", "ulimit -n"),
        ({"locked_memory_limited": True}, "locked memory", "limited", "ulimit -l"),
        ({"port_free": False}, "port 8000", "taken", "--port"),
        ({"checkpoint": ("x.safetensors is cut off", "fetch it again")}, "checkpoint", "cut off", "fetch it again"),
        ({"tokenizer": ("no token <|end|>", "copy it")}, "tokenizer", "no token <|end|>", "copy it"),
    ],
)  # fmt: skip
def test_a_fault(change: dict[str, Any], name: str, found: str, hint: str) -> None:
    bad = [check for check in judge(replace(HEALTHY, **change)) if not check.ok]
    assert [check.name for check in bad] == [name]
    assert found in bad[0].found and hint in bad[0].hint and bad[0].wanted


def test_no_gpu_is_no_fault() -> None:
    facts = replace(HEALTHY, **NO_DRIVER, nvidia_devices=0, torch_cuda=None, infiniband=False)
    assert all(check.ok for check in judge(facts))


def test_a_missing_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command itself, on a checkpoint whose index names a file that is not there: exit 4."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(), folder)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run(["doctor", str(folder), "--json"]) == 4
    answer = json.loads(capsys.readouterr().out)
    (bad,) = [check for check in answer["checks"] if check["name"] == "checkpoint"]
    assert answer["ok"] is False and "model-00001-of-00001.safetensors" in bad["found"] and bad["hint"]
    assert set(bad) == {"name", "found", "wanted", "ok", "hint"}
    run(["doctor", str(folder)])
    assert "BAD  checkpoint" in capsys.readouterr().out


def test_what_gpus_say_of_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake driver: one GPU with every fault, one that says nothing, and one that is hidden."""

    class NotKnown(Exception):
        pass

    def only_first(value: Any) -> Any:
        def answer(handle: int, *_: int) -> Any:
            if handle:
                raise NotKnown
            return value

        return answer

    def name_of(pid: int) -> bytes:
        if pid == 72:
            raise NotKnown
        return b"/usr/bin/python3"

    processes = [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in ((71, 2 * GIB), (72, None))]
    nvml = SimpleNamespace(
        NVMLError=NotKnown,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlSystemGetProcessName=name_of,
        nvmlDeviceGetCurrentClocksThrottleReasons=only_first(0x04 | 0x40 | 0x80),  # 0x04: a power cap, no fault
        nvmlDeviceGetTotalEccErrors=only_first(5),
        nvmlDeviceGetRemappedRows=only_first((0, 1, 1, 0)),
        nvmlDeviceGetTemperature=only_first(91),
        nvmlDeviceGetComputeRunningProcesses=only_first(processes),
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    silent, bad = look_at_gpus(nvml)
    assert silent == Health(None, False, False, (), None, ())
    slowed = ("slowed down by hardware, for heat", "slowed down by the power supply")
    assert bad == Health(5, False, True, slowed, 91, ("71 python3, 2.0 GiB", "72 ?"))
    checks = list(judge_gpus((silent, bad)))
    assert [(check.name, check.ok) for check in checks] == [
        *[("GPU 0 health", True), *[("GPU 1 health", False)] * 4, ("other processes on the GPUs", False)]
    ]
    assert checks[-1].found == "GPU 1: 71 python3, 2.0 GiB; GPU 1: 72 ?"
    # the name that newer drivers have for it counts
    nvml.nvmlDeviceGetCurrentClocksEventReasons = only_first(0x20)
    assert look_at_gpus(nvml)[1].slowed == ("slowed down by the driver, for heat",)


def board(joined: dict[tuple[int, int], int | None], capability: tuple[int, int]) -> SimpleNamespace:
    """A fake driver of two GPUs on PCIe 4 x16 and x8. joined: (GPU, number of a link) -> the GPU at its end, or None
    for a switch."""

    class Not(Exception):
        pass

    def address(handle: int) -> SimpleNamespace:
        return SimpleNamespace(domain=0, bus=0x10 + handle, device=0)

    def state(handle: int, number: int) -> int:
        if (handle, number) not in joined:
            raise Not
        return 1

    return SimpleNamespace(
        NVMLError=Not,
        NVML_NVLINK_MAX_LINKS=18,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetPciInfo=address,
        nvmlDeviceGetCudaComputeCapability=lambda handle: capability,
        nvmlDeviceGetNvLinkState=state,
        nvmlDeviceGetNvLinkRemoteDeviceType=lambda handle, number: 2 if joined[handle, number] is None else 0,
        nvmlDeviceGetNvLinkRemotePciInfo=lambda handle, number: address(joined[handle, number] or 0),
        nvmlDeviceGetMaxPcieLinkGeneration=lambda handle: 4,
        nvmlDeviceGetMaxPcieLinkWidth=lambda handle: 16 if handle == 0 else 8,
    )


@pytest.mark.parametrize(
    ("joined", "capability", "link"),
    [
        ({(gpu, number): None for gpu in (0, 1) for number in range(18)}, (9, 0), Link("NVLink", 450e9)),
        ({(gpu, number): 1 - gpu for gpu in (0, 1) for number in range(4)}, (8, 6), Link("NVLink", 56.25e9)),
        ({(gpu, number): 7 for gpu in (0, 1) for number in range(4)}, (8, 0), Link("PCIe", 8 * 1.969e9)),
        ({}, (8, 9), Link("PCIe", 8 * 1.969e9)),
    ],
    ids=["switch", "bridge", "NVLink to others", "PCIe"],
)
def test_what_links_should_give(
    joined: dict[tuple[int, int], int | None],
    capability: tuple[int, int],
    link: Link,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert links_of(board(joined, capability)) == {(0, 1): link, (1, 0): link}


def test_a_slow_link_is_named() -> None:
    pairs = [(one, other) for one in range(3) for other in range(3) if one != other]
    links = dict.fromkeys(pairs, Link("NVLink", 450e9))
    fine = dict.fromkeys(pairs, 390e9) | {(2, 0): 380e9}
    assert [(check.name, check.ok) for check in judge_links(links, fine, 330e9)] == [
        *[("links between GPUs", True), ("all-reduce", True)]
    ]
    whole = next(iter(judge_links(links, fine, None)))
    assert whole.found == "6 ways, the slowest GPU 2 to 0: 380.0 GB/s of 450.0 GB/s (NVLink)"
    bad = [check for check in judge_links(links, fine | {(1, 2): 12e9}, 9e9) if not check.ok]
    assert [check.found for check in bad] == [
        *("GPU 1 to 2: 12.0 GB/s of 450.0 GB/s (NVLink)", "9.0 GB/s through each of 3 GPUs")
    ]
    assert [check.wanted for check in bad] == ["270.0 GB/s or more", "180.0 GB/s or more"]
    assert all(check.hint for check in bad)


def test_a_kernel_that_disagrees_is_named() -> None:
    found = [Agreement("attend", 0.3, 2e-2), Agreement("linear", 1e-3, 2e-2), Agreement("route", float("nan"), 2e-2)]
    bad = list(judge_kernels("on GPU 1", found))
    assert [(check.name, check.ok) for check in bad] == [("attend on GPU 1", False), ("route on GPU 1", False)]
    assert bad[0].found == "off by 3.0e-01 of the largest value" and bad[0].wanted == "at most 2e-02" and bad[0].hint
    (fine,) = judge_kernels("on GPU 1", found[1:2])
    assert fine.ok and fine.name == "kernels on GPU 1" and "1.0e-03 (linear)" in fine.found


def test_what_cannot_be_tried_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[Agreement]:
        raise RuntimeError("CUDA error: device-side assert\nmore")

    monkeypatch.setattr(kernel_check, "check_cpu", broken)
    monkeypatch.setattr(kernel_check, "check_gpu", broken)
    for gpus, name in (((), "kernels on the CPU"), ((H100,), "kernels on GPU 0")):
        (check,) = measure(gpus)
        assert (check.name, check.ok) == (name, False)
        assert check.found == "cannot be tried: RuntimeError: CUDA error: device-side assert"
    (check,) = measure((replace(H100, capability=(7, 5)),))
    assert check.ok and "sm_75" in check.found


def test_a_gpu_that_fell_off_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise UserError("a GPU does not answer: GPU is lost")

    monkeypatch.setattr(doctor, "_look_at_driver", lambda: (("580.65", (13, 0)), "", ()))
    monkeypatch.setattr(doctor, "probe", lost)
    facts = replace(look(None), nvidia_devices=8)
    (bad,) = [check for check in judge(facts) if not check.ok and check.name == "driver"]
    assert "8 NVIDIA devices, and no driver that answers: a GPU does not answer: GPU is lost" in bad.found


def test_what_is_seen_here() -> None:
    import torch

    facts = look("tiny")
    assert facts.packages["torch"] == torch.__version__ and facts.torch_cuda == torch.version.cuda
    assert facts.checkpoint is None and facts.tokenizer is None and facts.shm_free_bytes
    assert look("openai/nothing-of-this-name").checkpoint is not None


@pytest.mark.parametrize(
    ("found", "wanted", "fits"),
    [
        *(("2.11.0+cu130", ">=2.11,<2.14", True), ("2.14.0", ">=2.11,<2.14", False), ("2.9", ">=2.11", False)),
        *(("4.0.0b36", "==4.0.0", True), ("1.0", "==1.0.0", True), ("1.5", "!=1.5", False), ("1.6", "~=1.5", True)),
        *(("2.0", "~=1.5", False), ("3", "", True), ("1.0", "<=1", True), ("1.1", ">1.1", False)),
    ],
)
def test_version_ranges(found: str, wanted: str, fits: bool) -> None:
    assert _fits(found, wanted) is fits

"""MODEL: folders, published ids without a network, the hub's cache, and what is said when there is none of them."""

import shutil
import subprocess
from pathlib import Path

import pytest
from gptoss_launch.launch.resolve import make_plan, resolve
from gptoss_launch.launch.settings import ServeSettings, Settings
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning.plan import Plan
from gptoss_launch.parallel.planning.spec import PUBLISHED
from gptoss_launch.parallel.planning.speeds import Speeds, keep_speeds

MODEL = "openai/gpt-oss-20b"
ROOM = Settings(host_memory_bytes=40 << 30, gpu_memory_bytes=0)


def tiny_folder() -> Path:
    folder = resolve("tiny", need_weights=False)[1]
    assert folder is not None
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hugging Face cache, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_need_neither_weights_nor_network(model: str) -> None:
    assert resolve(model, need_weights=False) == (PUBLISHED[model], None)


def test_tiny_is_whole() -> None:
    spec, folder = resolve("tiny", need_weights=True)
    assert folder is not None and (folder / "config.json").exists() and spec.layers > 0


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder(), tmp_path / MODEL)
    assert resolve(MODEL, need_weights=True)[1] == tmp_path / MODEL


def test_a_damaged_folder_is_refused_only_when_it_is_to_run(tmp_path: Path) -> None:
    shutil.copytree(tiny_folder(), tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    make_plan(str(tmp_path / "broken"), ROOM, need_weights=False)
    with pytest.raises(UserError, match="truncated"):
        make_plan(str(tmp_path / "broken"), ROOM, need_weights=True)


def test_plan_names_the_checkpoint() -> None:
    plan = make_plan("tiny", ROOM, need_weights=True)
    assert (plan.model, plan.checkpoint, plan.device) == ("tiny", str(tiny_folder()), "cpu")


def test_a_plan_for_a_gpu_that_is_elsewhere_does_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert make_plan("tiny", Settings(machine="h100"), need_weights=False).device == "cuda"
    with pytest.raises(UserError, match="does not run here: GPUs needed 1, found 0"):
        make_plan("tiny", Settings(machine="h100"), need_weights=True)


def test_nodes_are_those_that_serve_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the Slurm job that this runs in, and for what runs on one node: one."""
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    given = {"gpu_memory_bytes": 0, "context_tokens": 1024}
    assert make_plan("tiny", Settings(**given), need_weights=True).dp == 1
    plan = make_plan("tiny", ServeSettings(**given, nnodes=3), need_weights=True)
    assert (plan.dp, plan.nodes) == (3, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="does not run here: GPUs needed 8, found 0"):
        make_plan("tiny", ServeSettings(machine="h100x8", nnodes=2), need_weights=True)


def test_bandwidths_are_measured_once_where_a_plan_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    commands: list[list[str]] = []
    failed = [(1, "Traceback\nOSError: no memory\n", "OSError: no memory"), (-9, "", "the process ended with -9")]

    def measure(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if len(commands) <= len(failed):
            code, error, _ = failed[len(commands) - 1]
            return subprocess.CompletedProcess(command, code, "", error)
        keep_speeds(Path(command[-1]), Speeds(host=123e9))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("gptoss_launch.launch.resolve.subprocess.run", measure)

    def made(host_memory_bytes: int, need_weights: bool = True) -> Plan:
        room = {"host_memory_bytes": host_memory_bytes, "gpu_memory_bytes": 0, "context_tokens": 1024, "sequences": 2}
        return make_plan("tiny", Settings(**room, dtype="bf16"), need_weights=need_weights)

    memory = made(1 << 33).memory[0]
    short = memory.device_bytes + memory.host_bytes - (1 << 20)  # not all experts fit
    made(short, need_weights=False)
    assert commands == []
    for *_, said in failed:
        assert "host memory 20.0 GB/s (assumed, not known)" in " ".join(made(short).why)
        assert capsys.readouterr().err.endswith(f"\nit could not be measured: {said}\n")
    for _ in range(2):
        assert "host memory 123.0 GB/s, disk" in " ".join(made(short).why)
    assert len(commands) == 3


def test_offline_download_says_what_to_do(hub: Path) -> None:
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        resolve(MODEL, need_weights=True)
    assert "copy the checkpoint's folder here" in caught.value.hint
    assert "\n" not in caught.value.message and "did you mean" not in caught.value.hint  # it was spelt right
    with pytest.raises(UserError, match="did you mean openai/gpt-oss-20b"):
        resolve("openai/gpt-oss-21b", need_weights=True)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, and no model") as caught:
        resolve(str(tmp_path), need_weights=True)
    assert "--format mxfp4" in caught.value.hint


def test_a_size_alone_gets_the_whole_name() -> None:
    for size in ("20b", "120B"):
        with pytest.raises(UserError, match=f"did you mean openai/gpt-oss-{size.lower()}"):
            resolve(size, need_weights=False)


def test_cached_checkpoint_is_found_offline(hub: Path) -> None:
    repository = hub / "models--someone--small-gpt-oss"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_folder(), repository / "snapshots" / ("0" * 40))
    for need_weights in (False, True):
        folder = resolve("someone/small-gpt-oss", need_weights=need_weights)[1]
        assert folder == repository / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("model", ["tinny", "./nowhere", "a/b/c", "a b/c"])
def test_what_is_no_model(model: str) -> None:
    with pytest.raises(UserError, match="no model") as caught:
        resolve(model, need_weights=False)
    assert "MODEL is a folder, a hub id, or tiny" in caught.value.hint

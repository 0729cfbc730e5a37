"""The wheel as a user gets it: what is in it, what a base install can do, and that [serve] serves tiny from it.

Fresh virtual environments outside of the source, with nothing of this one in them.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[1]
CODE = ("launch", "parallel", "configs", "slurm")
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE")
HELP_LIMIT_S = 0.4
END_LIMIT_S = 5.0

# Nothing of the environment that runs the tests, and no GPU even where there is one: tiny on the CPU is what is tested.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
ENVIRONMENT |= {"CUDA_VISIBLE_DEVICES": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(*command: object, cwd: Path) -> str:
    """stdout of a command that must succeed."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build/ folder left in the source would be reused, with what it still holds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    for name in CODE:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "-q", ".", "--no-deps", "-w", out, cwd=source)
    return next(out.glob("gptoss_launch-*.whl"))


@pytest.fixture(scope="module")
def install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """install(extras) -> the folder with the programs of a fresh environment; no code is on the way to it."""

    def fresh(extras: str) -> Path:
        folder = tmp_path_factory.mktemp("venv")
        run(sys.executable, "-m", "venv", folder, cwd=folder)
        run(folder / "bin" / "pip", "install", "-q", f"gptoss-launch{extras} @ {wheel.as_uri()}", cwd=folder)
        return folder / "bin"

    return fresh


@pytest.fixture(scope="module")
def base(install: Callable[[str], Path]) -> Path:
    return install("")


@pytest.fixture(scope="module")
def serving(install: Callable[[str], Path]) -> Path:
    return install("[serve]")


def help_s(programs: Path, cwd: Path) -> float:
    """Seconds that --help takes; the best of five, as other work on this machine is not what is measured."""
    took_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        assert run(programs / "gptoss-launch", "--help", cwd=cwd).startswith("Usage: gptoss-launch")
        took_s.append(time.perf_counter() - began_s)
    return min(took_s)


def test_the_wheel_holds_every_file_and_no_other_module(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {path for folder in CODE for path in (ROOT / folder).rglob("*") if path.is_file()}
    wanted = {f"gptoss_launch/{path.relative_to(ROOT).as_posix()}" for path in files if path.suffix != ".pyc"}
    assert names == wanted
    assert {f"gptoss_launch/{folder}/py.typed" for folder in ("launch", "parallel")} <= names
    assert "gptoss_launch/configs/tiny/model.safetensors" in names


def test_a_base_install_plans_without_torch(base: Path, tmp_path: Path) -> None:
    assert help_s(base, tmp_path) < HELP_LIMIT_S
    modules = "[find_spec(name) is not None for name in ('torch', 'transformers', 'safetensors', 'fastapi')]"
    present = run(base / "python", "-c", f"from importlib.util import find_spec; print(any({modules}))", cwd=tmp_path)
    assert present.strip() == "False"
    command = (base / "gptoss-launch", "plan", "openai/gpt-oss-120b", "--machine", "h100x8", "--json")
    plan = json.loads(run(*command, cwd=tmp_path))
    assert plan["model"] == "openai/gpt-oss-120b" and plan["machine"] == "h100x8" and len(plan["digest"]) == 8
    assert "replicas" in run(*command[:-1], cwd=tmp_path)


def test_a_base_install_renders_batch_scripts(base: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("run: {config: tiny, set: {run: /shared/first}}\n")
    script = run(base / "gptoss-launch", "submit", "finetune", "--config", job, "--render", cwd=tmp_path)
    assert script.startswith("#!/bin/bash\n") and "\npayload=(finetune --config tiny run=/shared/first)\n" in script
    (tmp_path / "job.sbatch").write_text(script)
    run(base / "gptoss-launch", "lint", tmp_path / "job.sbatch", cwd=tmp_path)


def test_a_base_install_says_what_serving_needs(base: Path, tmp_path: Path) -> None:
    command = [str(base / "gptoss-launch"), "serve", "tiny", "--port", "0"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("error: serve needs ") and "torch" in first
    assert second == "hint: pip install 'gptoss-launch[serve]'"
    command = [str(base / "gptoss-launch"), "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    found = {check["name"]: check["found"] for check in json.loads(done.stdout)["checks"] if not check["ok"]}
    assert done.returncode == 4 and found["torch"] == found["msgpack"] == "not installed"


def test_the_installed_wheel_serves_tiny(serving: Path, tmp_path: Path) -> None:
    assert help_s(serving, tmp_path) < HELP_LIMIT_S
    command = [str(serving / "gptoss-launch"), "serve", "tiny", "--port", "0"]
    temporary = tmp_path / "t"
    temporary.mkdir()
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=ENVIRONMENT | {"TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    with process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), (tmp_path / "stderr").read_text()
            answer = ask(url, stream=False)
            assert answer["model"] == "tiny" and answer["usage"]["completion_tokens"] == 8
            assert ask(url, stream=True) == answer["choices"][0]["message"]["content"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(END_LIMIT_S) == 0, (tmp_path / "stderr").read_text()
        finally:
            process.kill()
    assert not list(temporary.glob("gptoss-*")), "the run folder is left"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) != 0, "the port is still held"


def ask(url: str, *, stream: bool):
    """A chat completion through nothing but the standard library: its JSON, or the streamed content put together."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/chat/completions",
        json.dumps(body | {"stream": stream}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        text = response.read().decode()
    if not stream:
        return json.loads(text)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    return "".join(delta.get("content") or "" for delta in deltas)

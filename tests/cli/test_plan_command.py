"""`plan`: JSON and nothing else on stdout, a table for people, exit code 6 when nothing fits."""

import json
import re
from pathlib import Path

import pytest
from gptoss_launch.launch.cli import run
from gptoss_launch.parallel.planning.plan import Plan

PLAN_KEYS = {
    *("digest", "model", "machine", "dp", "ranks", "tp", "ep", "etp", "world_size", "dtype", "offload"),
    *("context_tokens", "kv_tokens", "memory", "why"),
}
MEMORY_KEYS = {
    *("rank", "weights_bytes", "kv_bytes", "workspace_bytes", "graphs_bytes", "communication_bytes", "context_bytes"),
    "host_bytes",
}
MODEL = "openai/gpt-oss-20b"


def test_json_has_the_keys_that_programs_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", MODEL, "--machine", "h100", "--json"]) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert err == "" and PLAN_KEYS <= plan.keys()
    assert (plan["model"], plan["machine"], plan["offload"]) == (MODEL, "h100", "none")
    assert [row.keys() for row in plan["memory"]] == [MEMORY_KEYS]
    assert plan["why"] and all(isinstance(line, str) for line in plan["why"])
    assert Plan.from_json(plan).digest == plan["digest"]


def test_table_shows_numbers_and_reasons(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["plan", MODEL, "--machine", "h100"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "12.8 GiB" in out and "131072 tokens" in out
    assert sum(line.startswith("why") for line in out.splitlines()) >= 5


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize(("model", "machine"), [("openai/gpt-oss-120b", "h100x8"), (MODEL, "laptop-8gb")])
def test_no_number_is_cut_in_a_narrow_terminal(
    model: str, machine: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(["plan", model, "--machine", machine]) == 0
    out = capsys.readouterr().out
    assert "…" not in out and all(len(line) <= columns for line in out.splitlines())
    head = out[out.index("\nrank") : out.index("\nwhy")]  # a number and its unit stay together
    assert "weights" in head and re.search(r"\d GiB", head) and not re.search(r"^\s*([KMG]iB\s*)+$", head, re.MULTILINE)
    if machine == "h100x8" and columns < 200:
        assert re.search(r"^rank +0-1 +2-7 *$", out, re.MULTILINE)


def test_no_plan_exits_6_with_the_shortfall_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "openai/gpt-oss-120b", "--machine", "rtx3090", "--gpu-memory", "3GiB", "--json"]) == 6
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("error: no plan for 1024 tokens of context fits rtx3090: short by ")
    assert lines[1].startswith("tried: 1 rank on NVIDIA GeForce RTX 3090, bf16")
    assert lines[2].startswith("tried: experts in host memory: all but the experts takes ")
    assert lines[-1].startswith("hint: a GPU with ")


def test_flags_reach_the_planner(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dtype", "fp16", "--gpu-memory", "20GiB", "--host-memory", "8GB", "--context", "4096"]
    assert run(["plan", MODEL, "--machine", "h100", *flags, "--dp", "1", "--ranks", "1", "--ep", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["dtype"], plan["context_tokens"]) == ("fp16", 4096)
    assert "20.0 GiB free" in plan["why"][0]


def test_a_preset_and_a_flag_that_wins(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", MODEL, "--machine", "h100", "--config", "tiny", "--json"]
    assert run(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["device"], plan["context_tokens"]) == ("cpu", 8192)
    assert run([*arguments, "--context", "2048"]) == 0
    assert json.loads(capsys.readouterr().out)["context_tokens"] == 2048


def test_workload_and_routing_reach_the_planner(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routing = tmp_path / "routing.json"
    routing.write_text(json.dumps({"model": MODEL, "counts": [list(range(32))] * 24}))
    flags = ["--machine", "h200x2", "--workload", "throughput", "--ranks", "2", "--routing", str(routing)]
    assert run(["plan", MODEL, *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["workload"], plan["ep"], len(plan["expert_order"])) == ("throughput", 2, 24)
    assert any("busiest rank over the mean" in line for line in plan["why"])
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["plan", MODEL, *flags]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.strip()[:1].isdigit()] == ["0", "1"]  # a row a rank
    assert "communication" in out and "CUDA graphs" in out
    assert run(["plan", MODEL, "--workload", "speed"]) == 2
    assert "'speed' is none of latency, throughput" in capsys.readouterr().err

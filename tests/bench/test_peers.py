"""The runners of peers: the keys that they print, and how they ask. In place of vLLM there is a module of its name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gptoss_launch.launch.resolve import tiny_folder
from results_table import KEYS

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"
SIZES = ("--batch", "1,2", "--prompt", "8", "--new", "4", "--repeats", "1")

FAKE_VLLM = '''
"""Sleeps STEP_S a token, and writes down what it was asked."""
import json, os, time
from types import SimpleNamespace
__version__ = "0.0.fake"
STEP_S = 0.002

def log(**what):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class SamplingParams:
    def __init__(self, **how):
        self.__dict__.update(how)

class LLM:
    def __init__(self, **how):
        log(environment={name: os.environ.get(name) for name in ("VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE")}, **how)

    def generate(self, prompts, sampling, use_tqdm):
        log(prompts=[len(one["prompt_token_ids"]) for one in prompts], **sampling.__dict__)
        time.sleep(STEP_S * sampling.max_tokens)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * sampling.max_tokens)]) for _ in prompts]
'''


def runner(name: str, *arguments: str, path: Path, **environment: str) -> list[dict]:
    full = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    full["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(PEERS / name), str(tiny_folder()), *SIZES, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=full, check=False)
    assert done.returncode == 0, done.stderr
    *cases, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert last["rows"] == cases and [(one["batch"], one["prompt"], one["new"]) for one in cases] == [
        (1, 8, 4),
        (2, 8, 4),
    ]
    for one in cases:
        assert set(KEYS) <= set(one) and one["model"] == "tiny" and one["device"] == "cpu"
        assert one["read_bytes"] > 0 and one["roofline"] is None
    return cases


@pytest.mark.slow
def test_vllm(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    out = tmp_path / "rows.jsonl"
    flags = ("--ranks", "2", "--out", str(out))
    cases = runner("bench_vllm.py", *flags, path=tmp_path, FAKE_LOG=str(tmp_path / "log"))
    start, *asked = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert start["environment"] == {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    assert start["tensor_parallel_size"] == 2 and start["enable_prefix_caching"] is False
    assert [(one["prompts"], one["max_tokens"]) for one in asked] == [
        (prompts, tokens)
        for prompts in ([8], [8, 8])
        for tokens in (1, 5) * 4  # three of each are not timed
    ]
    assert all(one["ignore_eos"] and one["temperature"] == 1.0 for one in asked)
    assert cases[0]["engine"] == "vllm" and cases[0]["version"] == "0.0.fake" and cases[0]["ranks"] == 2
    assert all(one["decode_ms"] >= 2 * 0.5 for one in cases)  # a sleep is no shorter, and two are compared
    assert any("multicast" in note for note in cases[0]["notes"])
    assert [json.loads(line) for line in out.read_text().splitlines()][:2] == cases


@pytest.mark.slow
def test_transformers(tmp_path: Path) -> None:
    cases = runner("bench_transformers.py", path=tmp_path)
    assert cases[0]["engine"] == "transformers" and cases[0]["ranks"] == 1 and cases[0]["prefill_tok_s"] > 0

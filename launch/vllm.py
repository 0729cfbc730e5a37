"""`serve --engine vllm`: a plan as the command line of vLLM's own server, and that server as a child of the command.

vLLM loads the same checkpoint, lays it out as the plan says and opens the same door. What it has no equivalent for is
refused by name, never left out. Knows vLLM's flags (0.26 to 0.33) and imports none of it.
"""

import asyncio
import ctypes
import hashlib
import json
import math
import os
import shutil
import signal
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from ..parallel.errors import RankDiedError, UserError
from ..parallel.planning.plan import DType, KvDType, Plan
from .keys import KEYS_VARIABLE, Key, first_key
from .settings import ServeSettings
from .stop import StopSignals
from .tokenizer import tiktoken_vocabulary

DTYPES: Mapping[DType, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TENSOR_PARALLEL = (1, 2, 4, 8)  # vLLM gives each rank whole KV heads, and as many as the others
KEY_VARIABLE = "VLLM_API_KEY"  # not on the command line, which everyone on the machine can read
POLL_S = 0.5  # between looks whether it answers
STDERR = 2
# Where openai-harmony, by which vLLM renders, looks for its vocabulary before it downloads it; it takes this one alone.
VOCABULARY_VARIABLE, VOCABULARY_FILE = "TIKTOKEN_ENCODINGS_BASE", "o200k_base.tiktoken"
VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def vllm_arguments(plan: Plan, settings: ServeSettings, served_name: str, port: int) -> list[str]:
    """What follows `vllm serve`. Raises UserError for what vLLM cannot do."""
    _check(plan, settings)
    arguments = [str(plan.checkpoint or plan.model), "--served-model-name", served_name]
    arguments += ["--host", settings.host, "--port", str(port), "--allowed-origins", json.dumps(settings.cors_origin)]
    arguments += ["--tensor-parallel-size", str(plan.ranks)]
    arguments += ["--enable-expert-parallel"] if plan.ep > 1 else []
    arguments += ["--data-parallel-size", str(plan.dp)] if plan.dp > 1 else []
    arguments += ["--dtype", DTYPES[plan.dtype], "--kv-cache-dtype", _kv_dtype(plan.dtype, plan.kv_dtype)]
    arguments += ["--kv-cache-memory-bytes", str(min(row.kv_bytes for row in plan.memory))]
    # The plan has counted what is free: with more than this left, vLLM does not refuse a GPU that others use as well.
    arguments += ["--gpu-memory-utilization", "0.01"]
    arguments += ["--max-model-len", str(plan.context_tokens), "--max-num-seqs", str(plan.sequences)]
    arguments += ["--max-num-batched-tokens", str(plan.step_tokens)]  # and pages as its attention wants them
    # Harmony's calls and its analysis, which other servers read without being told.
    arguments += ["--enable-auto-tool-choice", "--tool-call-parser", "openai", "--reasoning-parser", "openai_gptoss"]
    arguments += ["--shutdown-timeout", str(math.ceil(settings.drain_s))]  # at 0, vLLM's own, SIGTERM cuts answers off
    options = {"--ssl-certfile": settings.tls_cert, "--ssl-keyfile": settings.tls_key}
    options |= {"--otlp-traces-endpoint": settings.otlp}
    for flag, value in options.items():
        arguments += [] if value is None else [flag, str(value)]
    return arguments


def write_vocabulary(checkpoint: Path, folder: Path) -> bool:
    """Writes the vocabulary that openai-harmony would download into `folder`, from the checkpoint's own tokenizer, so
    that nodes without a network answer too. False where that tokenizer is another one, such as tiny's."""
    vocabulary = tiktoken_vocabulary(checkpoint)
    if hashlib.sha256(vocabulary).hexdigest() != VOCABULARY_SHA256:
        return False
    (folder / VOCABULARY_FILE).write_bytes(vocabulary)
    return True


def vllm_notes(plan: Plan, keys: Sequence[Key], vocabulary: bool = True) -> list[str]:
    """What is not the same, in words. vocabulary: whether openai-harmony finds its own here."""
    notes = []
    if not vocabulary:
        notes.append("warning: this tokenizer is not gpt-oss's, so vLLM downloads one to render and read chats with")
    if keys:
        notes.append("warning: vLLM asks for the key under /v1; /invocations, which answers as well, is open")
    if plan.dp > 1:
        notes.append(
            f"vLLM cuts experts over all {plan.world_size} ranks; the plan's {plan.dp} replicas are independent"
        )
    return notes


def vllm_program() -> list[str]:
    """How vLLM is started here. Raises UserError if it is not installed."""
    if find_spec("vllm") is not None:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    found = shutil.which("vllm")
    if found is None:
        raise UserError("--engine vllm: vLLM is not installed", "pip install vllm, here or where `vllm` is in the PATH")
    return [found, "serve"]


def vllm_environment(environment: Mapping[str, str], keys: Sequence[Key], key_file: Path | None) -> dict[str, str]:
    """With the key that clients must send, if there is one, and GPUs numbered by bus, as the plan's machine has them.
    Raises UserError for what vLLM cannot do with keys."""
    ours = {name: value for name, value in environment.items() if name not in (KEYS_VARIABLE, KEY_VARIABLE)}
    ours["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if not keys:
        return ours
    if len(keys) > 1 or keys[0].per_minute is not None or keys[0].at_once is not None:
        raise UserError(f"--engine vllm: {len(keys)} API keys, or limits", "vLLM takes one key, without limits")
    return ours | {KEY_VARIABLE: first_key(key_file, environment)}


async def run_vllm(
    command: Sequence[str],
    environment: Mapping[str, str],
    url: str,
    drain_s: float,
    stop: StopSignals,
    on_ready: Callable[[], None],
) -> None:
    """Runs it until the first signal; then it may take drain_s, or until the second. on_ready: called once it answers.
    Whatever it started ends with it.

    Raises RankDiedError if it ends by itself.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        env=dict(environment),
        stdout=STDERR,  # what it says there is no data of ours: the URL alone is
        preexec_fn=_end_with_parent,
        start_new_session=True,
    )
    ended = asyncio.ensure_future(process.wait())
    asking = asyncio.ensure_future(_answers(url))
    try:
        await asyncio.wait({ended, asking, stop.first}, return_when=asyncio.FIRST_COMPLETED)
        if asking.done() and not ended.done():
            on_ready()
            await asyncio.wait({ended, stop.first}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.first.done():
            raise RankDiedError(f"vLLM ended with code {ended.result()}", "what it said is above")
        if not ended.done():
            process.terminate()
            await asyncio.wait({ended, stop.second}, timeout=drain_s + 1, return_when=asyncio.FIRST_COMPLETED)
    finally:
        asking.cancel()
        try:
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own, with all of its engines' processes
        except ProcessLookupError:
            pass  # nothing is left
        await ended


def _end_with_parent() -> None:
    """Between fork and exec: a SIGTERM once the command is gone, even after kill -9 (prctl(2), Linux)."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


async def _answers(url: str) -> None:
    """Returns once the server behind `url` says that it is well."""
    health = url.removesuffix("/v1") + "/health"
    anyone = ssl.create_default_context()  # it is our own child, whatever its certificate says
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE

    def ask() -> bool:
        try:
            with urllib.request.urlopen(health, timeout=5, context=anyone) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    while not await asyncio.to_thread(ask):
        await asyncio.sleep(POLL_S)


def _check(plan: Plan, settings: ServeSettings) -> None:
    """Raises UserError for what has no equivalent."""
    if plan.device != "cuda" or plan.offload != "none":
        where = "a CPU" if plan.device != "cuda" else "a GPU that cannot hold all experts"
        raise UserError(f"--engine vllm: this plan is for {where}", "leave --engine out: ours runs it")
    if plan.ranks not in TENSOR_PARALLEL:
        sizes = ", ".join(map(str, TENSOR_PARALLEL))
        raise UserError(f"--engine vllm: {plan.ranks} ranks do not divide 8 KV heads", f"--ranks of {sizes}")
    if plan.ep not in (1, plan.ranks):
        raise UserError(f"--engine vllm: ep {plan.ep} of {plan.ranks} ranks", f"--ep 1 or --ep {plan.ranks}")
    if plan.nodes > 1:
        raise UserError(f"--engine vllm: {plan.nodes} nodes", "one server a node, each with its own command")
    if plan.dtype not in DTYPES:
        raise UserError(f"--engine vllm: dtype {plan.dtype}", f"--dtype of {', '.join(DTYPES)}")
    if plan.rest != "bf16":
        raise UserError(f"--engine vllm: --rest {plan.rest}", "leave --rest out")
    if plan.expert_order:
        raise UserError("--engine vllm: experts placed by --routing", "leave --routing out")
    if settings.tool_server:
        raise UserError("--engine vllm: --tool-server", "leave it out: vLLM's speaks MCP over SSE, ours over HTTP")
    if settings.access_log is not None:
        raise UserError("--engine vllm: --access-log", "vLLM writes its own log to stderr")


def _kv_dtype(dtype: DType, kv_dtype: KvDType) -> str:
    if kv_dtype == dtype:
        return "auto"
    if kv_dtype != "fp8":
        raise UserError(f"--engine vllm: a KV cache of {kv_dtype} beside {dtype}", f"--kv-dtype {dtype} or fp8")
    return "fp8"

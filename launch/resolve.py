"""MODEL -> its architecture and the folder with its weights, and from there the plan.

MODEL is a local folder, a hub id, or `tiny` (the checkpoint that ships with the package). The two published models can
be planned with neither weights nor network. Loads no torch.
"""

import importlib.resources
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..parallel.errors import UserError, did_you_mean
from ..parallel.planning.choice import Asked
from ..parallel.planning.headers import check_inventory, read_inventory
from ..parallel.planning.machine import Machine, machine_speeds_file, probe, read_machine
from ..parallel.planning.placement import read_routing
from ..parallel.planning.plan import Plan
from ..parallel.planning.planner import plan as choose_plan
from ..parallel.planning.spec import PUBLISHED, Spec, read_config
from ..parallel.planning.speeds import read_speeds
from .settings import ServeSettings, Settings

TINY = "tiny"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
ADAPTER = "adapter_config.json"  # of PEFT, as `export --format adapter` writes it
MEASURE_LIMIT_S = 180.0
NOT_WANTED = ["original/*", "metal/*"]  # the same weights again in other layouts
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def make_plan(model: str, settings: Settings, *, need_weights: bool) -> Plan:
    """The plan for MODEL on the machine that the settings name, else on this one.

    need_weights: the plan will be run here, so the checkpoint is found, if need be downloaded, and checked.
    """
    spec, folder = resolve(model, need_weights=need_weights)
    machine = read_machine(settings.machine) if settings.machine else probe()
    if isinstance(settings, ServeSettings):
        machine = replace(machine, nodes=settings.nnodes)
    elif need_weights:
        machine = replace(machine, nodes=1)  # what runs the ranks of a plan here knows no other node
    asked = Asked(
        dtype=settings.dtype,
        gpu_memory_bytes=settings.gpu_memory_bytes,
        host_memory_bytes=settings.host_memory_bytes,
        context_tokens=None if settings.context_tokens == "auto" else settings.context_tokens,
        longest_context=settings.context_tokens == "auto",
        dp=settings.dp,
        ranks=settings.ranks,
        ep=settings.ep,
        workload=settings.workload,
        kv_dtype=settings.kv_dtype,
        sequences=settings.sequences,
        kernels=settings.kernels,
        misses=settings.misses,
        look_ahead=settings.look_ahead,
        rest=settings.rest,
        rest_kl=settings.rest_kl,
        routing=read_routing(settings.routing, spec.layers, spec.experts) if settings.routing else None,
    )
    checkpoint = str(folder) if folder else None
    plan = choose_plan(spec, machine, asked, model=model, checkpoint=checkpoint)
    if need_weights and settings.machine:
        check_gpus(plan, 0, "leave out --machine")
    elif need_weights and plan.offload != "none" and not machine.measured:
        plan = choose_plan(spec, _measured(machine), asked, model=model, checkpoint=checkpoint)
    return plan


def _measured(machine: Machine) -> Machine:
    """With its bandwidths, which takes some seconds the first time; without what cannot be measured, which the plan
    then says it assumes."""
    file = machine_speeds_file(machine.gpus, machine.cpu_cores)
    command = [sys.executable, "-m", "gptoss_launch.parallel.offload.bandwidths", str(file)]
    environment = os.environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    print("measuring what this machine's memory and link give, once", file=sys.stderr)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MEASURE_LIMIT_S)
        silent = f"the process ended with {done.returncode}"  # killed for its memory, say
        why = (done.stderr.strip() or silent).splitlines()[-1] if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why:
        print(f"it could not be measured: {why}", file=sys.stderr)
    return replace(machine, speeds=read_speeds(file))


def check_gpus(plan: Plan, node: int, hint: str) -> None:
    """Raises UserError if what `plan` gives to this node does not have its GPUs here."""
    needed = plan.gpus_of(node)
    if needed and needed > (here := len(probe().gpus)):
        message = f"the plan for {plan.machine} does not run here: GPUs needed {needed}, found {here}"
        raise UserError(message, hint)


def resolve(model: str, *, need_weights: bool) -> tuple[Spec, Path | None]:
    """(architecture, folder with config.json or None) of MODEL.

    need_weights: the folder is never None, and its tensors are checked against the shard table. Raises UserError.
    """
    folder = _local_folder(model)
    if folder is None:
        if not _HUB_ID.fullmatch(model):
            raise _no_model(model)
        if not need_weights and model in PUBLISHED:
            return PUBLISHED[model], None
        folder = _from_hub(model, None if need_weights else CONFIG)
    if not (folder / CONFIG).exists() and (folder / ADAPTER).exists():
        raise UserError(
            f"{folder} holds an adapter, and no model", "gptoss-launch export RUN --format mxfp4 writes one"
        )
    spec = read_config(folder / CONFIG)
    if need_weights:
        check_inventory(spec, read_inventory(folder), folder, quantizes=True)
    return spec, folder


def tokenizer_folder(model: str) -> Path:
    """The folder of MODEL that has its tokenizer; nothing else of it is downloaded or looked at. Raises UserError."""
    folder = _local_folder(model)
    if folder is None and not _HUB_ID.fullmatch(model):
        raise _no_model(model)
    return folder or _from_hub(model, TOKENIZER)


def _local_folder(model: str) -> Path | None:
    if model == TINY:
        return tiny_folder()
    folder = Path(os.path.expanduser(model))
    return folder.resolve() if folder.is_dir() else None


def local_model(model: str) -> Path:
    """The folder of MODEL with nothing downloaded: a folder, tiny, or what the Hugging Face cache holds.

    Raises UserError.
    """
    folder = _local_folder(model)
    if folder is None and _HUB_ID.fullmatch(model):
        try:
            import huggingface_hub

            folder = Path(huggingface_hub.snapshot_download(model, local_files_only=True, ignore_patterns=NOT_WANTED))
        except (ImportError, OSError, ValueError):
            message = f"{model} is not in the Hugging Face cache of this machine"
            raise UserError(message, "serve downloads it; without a network copy its folder here") from None
    if folder is None:
        raise _no_model(model)
    return folder


def _no_model(model: str) -> UserError:
    return UserError(f"no model {model!r}", f"MODEL is a folder, a hub id, or tiny; {_nearest(model)}")


def _nearest(model: str) -> str:
    short = {name.rpartition("-")[2]: name for name in PUBLISHED}  # 20b, 120b
    return did_you_mean(short.get(model.lower(), model), [TINY, *PUBLISHED])


def _from_hub(model: str, file: str | None) -> Path:
    """The folder of a hub id, with this file or, None, all of the model: from the local Hugging Face cache, else
    downloaded."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{model} is no folder, and downloading needs huggingface_hub", _INSTALL) from None
    wanted: dict[str, Any] = {"ignore_patterns": NOT_WANTED} if file is None else {"allow_patterns": [file]}
    try:
        cached = Path(huggingface_hub.snapshot_download(model, local_files_only=True, **wanted))
        if file is None:
            read_inventory(cached)  # the cache may hold only part of it
        elif not (cached / file).exists():
            raise FileNotFoundError(file)
        return cached
    except (OSError, ValueError):  # not there, or (UserError) not whole
        pass
    try:
        return Path(huggingface_hub.snapshot_download(model, **wanted))
    except Exception as error:  # whatever the network stack raises: httpx, OSError, ValueError
        reason = " ".join(str(error).split())
        message = f"{model} is no folder here and could not be downloaded: {reason}"
        raise UserError(message, _COPY + ("" if model in PUBLISHED else f"; {_nearest(model)}")) from error


_INSTALL = "pip install 'gptoss-launch[serve]', or name a folder"
_COPY = "without a network, copy the checkpoint's folder here and name the folder"


def tiny_folder() -> Path:
    """The embedded checkpoint, as the package ships it."""
    return Path(str(importlib.resources.files("gptoss_launch.configs") / TINY))

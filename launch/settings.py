"""Settings: defaults < preset or YAML file < flags, each key typed and known.

The dataclasses are the one place where a setting, its default and its help live; the Click options and the YAML reader
are made from them. A YAML key is the flag's name with underscores. Does not know what the settings are used for.
"""

import dataclasses
import importlib.resources
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from ..parallel.errors import UserError, did_you_mean
from ..parallel.planning.machine import parse_size
from ..parallel.planning.plan import REST_KL, DType, Kernels, KvDType, Misses, Rest, Workload
from ..parallel.planning.yaml_text import load_yaml

DTYPES: tuple[DType, ...] = ("bf16", "fp16", "fp32")
KV_DTYPES: tuple[KvDType, ...] = (*DTYPES, "fp8")
KERNELS: tuple[Kernels, ...] = ("triton", "plain", "cpu", "cpu-int8")
RESTS: tuple[Rest, ...] = ("bf16", "fp8", "int8")
MISSES: tuple[Misses, ...] = ("copied", "computed")
Engine = Literal["ours", "vllm"]
ENGINES: tuple[Engine, ...] = ("ours", "vllm")
WORKLOADS: tuple[Workload, ...] = ("latency", "throughput")

PRESETS = "serve"  # folder in gptoss_launch.configs


def read_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{value!r} is no text")
    return value


def read_path(value: Any) -> Path:
    return Path(os.path.expanduser(read_text(value)))  # which leaves ~nobody as it is


def _size(value: Any) -> int:
    return parse_size(str(value))


def _number(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        text = str(value).strip()
        if isinstance(value, bool) or not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            raise UserError(f"{value!r} is no whole number from {low} to {high}")
        return int(text)

    return read


def _origins(value: Any) -> tuple[str, ...]:
    """Origins of the web (RFC 6454), or * for all; a list, or text with commas."""
    items = value if isinstance(value, list | tuple) else str(value).split(",")
    origins = tuple(str(item).strip() for item in items)
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", origin):
            raise UserError(f"{origin!r} is no origin such as https://chat.example.org")
    return origins


def _urls(value: Any) -> tuple[str, ...]:
    """A list, or text with commas."""
    items = value if isinstance(value, list | tuple) else str(value).split(",")
    urls = tuple(str(item).strip() for item in items)
    for url in urls:
        if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", url):
            raise UserError(f"{url!r} is no URL such as http://127.0.0.1:9000/mcp")
    return urls


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UserError(f"{value!r} is no number of seconds")
    return seconds


def _positive(unit: str) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = 0.0
        if not 0 < number < float("inf"):
            raise UserError(f"{value!r} is no positive number of {unit}")
        return number

    return read


def one_of(choices: Sequence[str]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value not in choices:
            raise UserError(f"{value!r} is none of {', '.join(choices)}")
        return value

    return read


def _rest(value: Any) -> Any:
    if value == "nf4":
        raise UserError(
            "nf4 needs a scale for each 64 values of a row, and the kernels that read weights here have one a row: "
            "int8 is the least"
        )
    return one_of(RESTS)(value)


_MOST = 2**31 - 1


def _context(value: Any) -> int | Literal["auto"]:
    return "auto" if value == "auto" else _number(1, _MOST)(value)


def _key(default: Any, flag: str, metavar: str, read: Callable[[Any], Any], help: str) -> Any:
    """A setting. flag: its name on the command line, without dashes. read: flag text or YAML value -> typed value."""
    return field(default=default, metadata={"flag": flag, "metavar": metavar, "read": read, "help": help})


@dataclass(frozen=True)
class Settings:
    """What plan, serve and generate have in common. None: the planner chooses."""

    machine: str | None = _key(
        None, "machine", "NAME", read_text, "Plan for a machine of configs/machines, or a YAML file."
    )
    dtype: DType | None = _key(None, "dtype", "|".join(DTYPES), one_of(DTYPES), "Compute dtype.")
    kv_dtype: KvDType | None = _key(
        None, "kv-dtype", "|".join(KV_DTYPES), one_of(KV_DTYPES), "KV cache dtype; the compute dtype when left out."
    )
    kernels: Kernels | None = _key(
        None, "kernels", "|".join(KERNELS), one_of(KERNELS), "Who computes; cpu-int8 is faster on a CPU and not exact."
    )
    misses: Misses | None = _key(
        None,
        "misses",
        "|".join(MISSES),
        one_of(MISSES),
        "Experts that a small GPU has not: copied to it, or left to the CPU.",
    )
    look_ahead: int = _key(
        0, "look-ahead", "N", _number(0, 8), "Experts of the next layer that are copied before it asks for them."
    )
    rest: Rest = _key(
        "bf16",
        "rest",
        "|".join(RESTS),
        _rest,
        "What is not experts: as it is, or in 8 bits, compared at the start.",
    )
    rest_kl: float = _key(
        REST_KL, "rest-kl", "NATS", _positive("nats"), "Refuse 8 bits from this mean KL divergence from bf16 on."
    )
    gpu_memory_bytes: int | None = _key(
        None, "gpu-memory", "SIZE", _size, "Free memory a GPU, in place of what is found; 0: no GPU."
    )
    host_memory_bytes: int | None = _key(
        None, "host-memory", "SIZE", _size, "Free host memory, in place of what is found."
    )
    context_tokens: int | Literal["auto"] | None = _key(
        None, "context", "N|auto", _context, "Longest prompt and answer together, in tokens; auto: the most that fits."
    )
    sequences: int | None = _key(
        None, "sequences", "N", _number(1, 4096), "Requests that run at the same time in a replica; others wait."
    )
    dp: int | None = _key(None, "dp", "N", _number(1, _MOST), "Replicas.")
    ranks: int | None = _key(None, "ranks", "R", _number(1, _MOST), "Ranks of one replica.")
    ep: int | None = _key(None, "ep", "N", _number(1, _MOST), "How many ways experts are placed; divides R.")
    workload: Workload = _key(
        "latency",
        "workload",
        "|".join(WORKLOADS),
        one_of(WORKLOADS),
        "What dp, R and ep are chosen for: one stream, or many.",
    )
    routing: Path | None = _key(
        None, "routing", "FILE", read_path, "Counts of each expert's use, to place experts by where ep > 1."
    )


@dataclass(frozen=True)
class ServeSettings(Settings):
    """What serve needs besides."""

    host: str = _key("127.0.0.1", "host", "ADDRESS", read_text, "Address to listen on.")
    port: int = _key(8000, "port", "N", _number(0, 65535), "Port to listen on; 0 takes a free one.")
    api_key_file: Path | None = _key(
        None, "api-key-file", "FILE", read_path, "File of keys, one a line: clients must send one of them."
    )
    tls_cert: Path | None = _key(None, "tls-cert", "FILE", read_path, "Certificate chain, PEM; serves HTTPS.")
    tls_key: Path | None = _key(None, "tls-key", "FILE", read_path, "Its private key, PEM, not encrypted.")
    cors_origin: tuple[str, ...] = _key(
        (), "cors-origin", "ORIGIN,..", _origins, "Web pages of these origins may call the server; * is all of them."
    )
    access_log: str | None = _key(
        None, "access-log", "FILE", read_text, "Write a line of JSON for each HTTP request; - is stderr."
    )
    otlp: str | None = _key(None, "otlp", "URL", read_text, "Send a span for each HTTP request to an OTLP collector.")
    served_name: str | None = _key(
        None, "served-name", "NAME", read_text, "Model name in the API; MODEL when left out."
    )
    engine: Engine = _key("ours", "engine", "|".join(ENGINES), one_of(ENGINES), "Who runs the plan: ours, or vLLM.")
    tool_server: tuple[str, ...] = _key(
        (), "tool-server", "URL,..", _urls, "MCP servers that run the built-in tools, python and browser."
    )
    nnodes: int = _key(1, "nnodes", "N", _number(1, 4096), "Nodes that work together, each by this command.")
    node_rank: int = _key(0, "node-rank", "R", _number(0, 4095), "Which of them this one is; 0 is the head.")
    head: str | None = _key(
        None, "head", "HOST[:PORT]", read_text, "Address of node 0, where the others join; port 29500 if none is said."
    )
    node_key_file: Path | None = _key(
        None, "node-key-file", "FILE", read_path, "Secret that nodes know each other by, the same on all of them."
    )
    drain_s: float = _key(30.0, "drain-s", "SECONDS", _seconds, "How long running requests may take to end on SIGTERM.")


NODE_SETTINGS = ("nnodes", "node_rank", "head", "node_key_file")

SettingsT = TypeVar("SettingsT", bound=Settings)


# --- as Click options


class _Reads(click.ParamType):
    """A Click type that reads with a setting's own reader."""

    def __init__(self, name: str, read: Callable[[Any], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._read(value)
        except UserError as error:
            self.fail(error.message, param, ctx)


def setting_options(names: Sequence[str]) -> Callable[[Any], Any]:
    """Decorator: an option for each of these settings of serve, for a command that has no others."""

    def decorate(command: Any) -> Any:
        for one in reversed([one for one in dataclasses.fields(ServeSettings) if one.name in names]):
            command = _option(one)(command)
        return command

    return decorate


def settings_options(kind: type[Settings]) -> Callable[[Any], Any]:
    """Decorator: an option for each setting of `kind`, then --config and --json.

    The command gets them as keyword arguments by field name, None where a flag was not given, and hands all but
    `config` and `json` to `load_settings`.
    """

    def decorate(command: Any) -> Any:
        options = [_option(one) for one in dataclasses.fields(kind)]
        options.append(
            click.option("--config", metavar="FILE", help="YAML file, or a preset of configs/serve; flags win.")
        )
        options.append(click.option("--json", is_flag=True, help="One JSON object on stdout, nothing else there."))
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _option(setting: "dataclasses.Field[Any]") -> Callable[[Any], Any]:
    key = setting.metadata
    default = "" if setting.default in (None, ()) else f"  [default: {setting.default}]"
    return click.option(
        f"--{key['flag']}",
        setting.name,
        type=_Reads(key["flag"], key["read"]),
        metavar=key["metavar"],
        help=key["help"] + default,
    )


# --- as YAML


def load_settings(kind: type[SettingsT], config: str | None, flags: dict[str, Any]) -> SettingsT:
    """Settings of `kind` from its defaults, the YAML file or preset `config`, and `flags` (None: not given).

    A file may hold any setting of serve, also where `kind` is smaller: one file describes a model for all commands.
    Raises UserError that names file and key.
    """
    from_file = {} if config is None else read_settings_file(config)
    names = {one.name for one in dataclasses.fields(kind)}
    given = {name: value for name, value in flags.items() if value is not None}
    assert given.keys() <= names, f"{given.keys() - names} are no settings of {kind.__name__}"
    return kind(**{name: value for name, value in (from_file | given).items() if name in names})


def preset_names(presets: str = PRESETS) -> tuple[str, ...]:
    folder = importlib.resources.files("gptoss_launch.configs") / presets
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def read_settings_file(config: str) -> dict[str, Any]:
    """Field name -> value for every key in a YAML file of serve, or in the preset of that name."""
    where, keys = read_yaml(config, PRESETS)
    known = {one.metadata["flag"].replace("-", "_"): one for one in dataclasses.fields(ServeSettings)}
    return read_keys(keys, known, where)


def read_yaml(config: str, presets: str) -> tuple[str, dict[Any, Any]]:
    """(its name for messages, its keys) of a YAML file, or of the preset of that name in configs/`presets`."""
    import yaml

    if config in preset_names(presets):
        where = f"configs/{presets}/{config}.yaml"
        text = (importlib.resources.files("gptoss_launch.configs") / presets / f"{config}.yaml").read_text(
            encoding="utf-8"
        )
    else:
        where = config
        try:
            text = Path(config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            hint = did_you_mean(config, preset_names(presets))
            raise UserError(f"--config {config}: not readable: {error}", hint) from None
    try:
        keys = load_yaml(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{where}: no YAML: {' '.join(str(error).split())}", "one `key: value` a line") from None
    if not isinstance(keys, dict):
        raise UserError(f"{where}: a {type(keys).__name__}, not a mapping", "one `key: value` a line")
    return where, keys


def read_keys(keys: dict[Any, Any], known: "dict[str, dataclasses.Field[Any]]", where: str) -> dict[str, Any]:
    """Field name -> value, each read by its own reader. Raises UserError that names `where` and the key."""
    values = {}
    for key, value in keys.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}", did_you_mean(str(key), known))
        try:
            values[known[key].name] = known[key].metadata["read"](value)
        except UserError as error:
            raise UserError(f"{where}: {key}: {error.message}", error.hint or known[key].metadata["help"]) from None
    return values

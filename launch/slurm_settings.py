"""What a Slurm job is made of: sbatch's options, environment variables, how it is launched, and the command it runs.

Read from YAML with the sections slurm, env and run; command line > YAML > site file > defaults. Every scalar is taken
as the text that was written, so that `time: 4:00:00` is not YAML's 14400. Does not know how a script looks.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..parallel.errors import UserError, did_you_mean
from ..parallel.planning.yaml_text import load_yaml
from .settings import NODE_SETTINGS, ServeSettings
from .slurm_options import read_option

Kind = Literal["serve", "finetune", "bench", "preflight"]
KINDS: tuple[Kind, ...] = ("serve", "finetune", "bench", "preflight")
SECTIONS = ("slurm", "env", "run")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(_|$)", re.IGNORECASE)
_READ_ONLY = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}  # `export UID=1` ends in an error
_OUTPUT = "%x-%j.out"  # job's name and id; no folder, for a missing one is a job that dies without a word
_WORD = re.compile(r"[A-Za-z0-9_.:-]+")


# --- readers of one value: the text that was written -> what the script gets


def _text(value: str) -> str:
    if not value or "\0" in value:
        raise UserError(f"{value!r} is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{value!r} is no UTF-8") from None
    return value


def absolute_path(value: str) -> str:
    """Absolute, for the job starts elsewhere; a backslash or a percent sign would be read by sbatch, not taken."""
    path = os.path.abspath(os.path.expanduser(_text(value)))
    if not path.isprintable() or "\\" in path or "%" in path:
        raise UserError(f"{value!r} has a line break, a backslash or a percent sign, which sbatch does not take")
    return path


def _mounts(value: str) -> str:
    if not value.isprintable():
        raise UserError(f"{value!r} is no list of SOURCE:TARGET, with commas")
    return value


def _word(value: str) -> str:
    if not _WORD.fullmatch(value):
        raise UserError(f"{value!r} is none: letters, digits, dot, colon and dash only")
    return value


def _count(low: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not value.isascii() or not value.isdigit() or not low <= int(value) < 10**6:
            raise UserError(f"{value!r} is no whole number from {low} on")
        return int(value)

    return read


def _rendezvous(value: str) -> str:
    if value not in ("static", "c10d"):
        raise UserError(f"{value!r} is none of static, c10d")
    return value


def _key(default: Any, read: Callable[[str], Any]) -> Any:
    return field(default=default, metadata={"read": read})


@dataclass(frozen=True)
class Launching:
    """How the script starts the payload. These keys may stand under run: in any file, the site file included.

    folder: the run folder, or None for a new one below ./runs. python: the interpreter on the nodes; in a container
    python3 unless it is named. setup: a shell file that every node sources first. ranks_per_node: None for one a GPU.
    lead_s: how long before the time limit the ranks are told to save; Slurm looks every 30 s and may be 60 s early.
    max_requeues: of our own, at the time limit and when preempted; None: 10 for serve and finetune, else 0.
    """

    folder: str | None = _key(None, absolute_path)
    python: str = _key(sys.executable, _text)
    setup: str | None = _key(None, absolute_path)
    container_image: str | None = _key(None, _text)
    container_mounts: str | None = _key(None, _mounts)
    interface: str | None = _key(None, _word)
    rendezvous: str = _key("static", _rendezvous)
    ranks_per_node: int | None = _key(None, _count(1))
    lead_s: int = _key(180, _count(30))
    max_requeues: int | None = _key(None, _count(0))


@dataclass(frozen=True)
class Job:
    """One job, resolved. options: sbatch's, defaults included, as (name, text or True). command: what is run, as the
    arguments of gptoss-launch. host, port: of serve; None is settled on the node."""

    kind: Kind
    options: tuple[tuple[str, str | bool], ...]
    env: tuple[tuple[str, str], ...]
    launching: Launching
    command: tuple[str, ...]
    host: str | None = None
    port: int | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)  # the keys under run: that `command` was made of

    @property
    def output_is_default(self) -> bool:
        return self.option("output") in (_OUTPUT, "slurm-%j.out")

    def option(self, name: str) -> str | bool | None:
        return dict(self.options).get(name)

    def to_yaml(self) -> dict[str, Any]:
        """The three sections, resolved: what a file must hold to give this job again."""
        launching = {
            name: str(value) for name, value in dataclasses.asdict(self.launching).items() if value is not None
        }
        options = {name: value if isinstance(value, bool) else str(value) for name, value in self.options}
        for name in ("open-mode", "signal", "ntasks-per-node"):  # the script's own, refused in a file
            options.pop(name, None)
        return {"slurm": options, "env": dict(self.env), "run": {**launching, **self.payload}}


# --- from files and flags to a job


def read_sections(path: Path, kind: Kind | None) -> dict[str, dict[str, Any]]:
    """The sections of a YAML file, keys and values checked. kind: whose keys run: may hold; None: a site file's."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: not readable: {reason}", "name a YAML file with slurm:, env: and run:") from None
    try:
        found = load_yaml(text, typed=False) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: no YAML: {' '.join(str(error).split())}", "one `key: value` a line") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: no mapping", f"it holds {', '.join(f'{name}:' for name in SECTIONS)}")
    for name, section in found.items():
        if name not in SECTIONS:
            raise UserError(f"{path}: unknown section {name!r}", did_you_mean(str(name), SECTIONS))
        if section != "" and not isinstance(section, dict):
            raise UserError(f"{path}: {name}: no mapping", "one `key: value` a line below it")
    sections = {name: dict(found.get(name) or {}) for name in SECTIONS}
    check_sections(sections, kind, str(path))
    return sections


def check_sections(sections: Mapping[str, Mapping[str, Any]], kind: Kind | None, where: str) -> None:
    """Raises UserError that names `where` and the key, for a key that is unknown or a value that cannot be."""
    for section, keys in sections.items():
        for key, value in keys.items():
            try:
                if section == "slurm":
                    read_option(key, value)
                elif section == "env":
                    _read_variable(key, value)
                else:
                    _read_run(kind, key, value)
            except UserError as error:
                raise UserError(f"{where}: {section}.{key}: {error.message}", error.hint) from None


def make_job(kind: Kind, layers: Sequence[Mapping[str, Mapping[str, Any]]]) -> Job:
    """The job that `layers` of checked sections give, the later winning over the earlier."""
    merged = {name: {} for name in SECTIONS}
    for layer in layers:
        for name in SECTIONS:
            keys = layer.get(name, {})
            if "requeue" in keys:
                merged[name].pop("no-requeue", None)
            if "no-requeue" in keys:
                merged[name].pop("requeue", None)
            merged[name] |= keys
    readers = {one.name: one.metadata["read"] for one in dataclasses.fields(Launching)}
    given: dict[str, Any] = {key: readers[key](value) for key, value in merged["run"].items() if key in readers}
    if "container_image" in given:
        given = {"python": "python3"} | given  # the container's own; ours is not in it
    launching = Launching(**given)
    payload = {key: value for key, value in merged["run"].items() if key not in readers}
    options = {name: read_option(name, value) for name, value in merged["slurm"].items()}
    again = kind in ("serve", "finetune") and not options.get("no-requeue")
    if launching.max_requeues is None:
        launching = dataclasses.replace(launching, max_requeues=10 if again else 0)
    if options.get("no-requeue") and launching.max_requeues:
        raise UserError(
            f"no-requeue and max_requeues {launching.max_requeues} contradict each other", "leave one of them out"
        )
    command, host, port = _COMMANDS[kind](payload)
    defaults: dict[str, str | bool] = {"job-name": f"gptoss-{kind}", "nodes": "1"}
    defaults["requeue" if again else "no-requeue"] = True
    if "requeue" in options or "no-requeue" in options:
        defaults.pop("requeue", None)
        defaults.pop("no-requeue", None)
    ours = {
        "ntasks-per-node": "1",
        "output": options.get("output", _OUTPUT if "/" not in str(options.get("job-name", "")) else "slurm-%j.out"),
        "open-mode": "append",
        "signal": f"B:USR1@{launching.lead_s}",
    }
    resolved = {name: value for name, value in (defaults | options | ours).items() if value is not False}
    if str(resolved["nodes"]).isdigit() and int(resolved["nodes"]) == 0:
        raise UserError("--nodes 0 leaves no node to run on", "--nodes=1, or leave it out")
    if resolved["nodes"] != "1" and (kind == "bench" or payload.get("engine") == "vllm"):
        what = "bench measures" if kind == "bench" else "engine vllm serves on"
        raise UserError(f"{what} one node, not {resolved['nodes']}", "--nodes=1")
    env = tuple((name, _read_variable(name, value)) for name, value in merged["env"].items())
    return Job(kind, tuple(resolved.items()), env, launching, command, host, port, payload)


def site_file() -> Path:
    """Where a site's defaults are, if it has any."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "gptoss-launch" / "site.yaml"


def read_assignment(text: str, kind: Kind) -> tuple[str, str, str]:
    """SECTION.KEY=VALUE of --set, checked."""
    name, equals, value = text.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot or section not in SECTIONS:
        raise UserError(f"--set {text!r} is no SECTION.KEY=VALUE", f"SECTION is {', '.join(SECTIONS)}")
    check_sections({section: {key: value}}, kind, "--set")
    return section, key, value


def _read_variable(name: str, value: Any) -> str:
    if not _NAME.fullmatch(name) or name in _READ_ONLY or name.startswith("SLURM_"):
        raise UserError(f"{name!r} is no environment variable that a script can set", "letters, digits and underscores")
    if _SECRET.search(name):
        raise UserError(
            "looks like a secret, and the script would hold it in clear text",
            "export it in the shell that submits: sbatch passes its environment on",
        )
    if not isinstance(value, str) or "\0" in value:
        raise UserError(f"{value!r} is no text", "NAME: value")
    return value if not value else _text(value)


def _read_run(kind: Kind | None, key: str, value: Any) -> None:
    launching = {one.name: one.metadata["read"] for one in dataclasses.fields(Launching)}
    own = PAYLOAD_KEYS[kind] if kind else {}
    if key not in launching and key not in own:
        more = "; a site file holds no keys of a command" if kind is None else ""
        raise UserError(f"unknown key {key!r}", did_you_mean(key, [*launching, *own]) + more)
    reader = launching.get(key) or own[key]
    if key != "set" and not isinstance(value, str):
        raise UserError(f"{value!r} is neither text nor a number", f"{key}: value")
    reader(value)


# --- the command of each kind of job


def _switch(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"{value!r} is neither true nor false")
    return value.lower() == "true"


def _model(value: str) -> str:
    """A folder becomes absolute, for the job starts elsewhere; a hub id or `tiny` stays."""
    folder = Path(os.path.expanduser(_text(value)))
    return str(folder.absolute()) if folder.is_dir() else value


def _assignments(value: Any) -> tuple[str, ...]:
    """key=value words for finetune, from a mapping or a list."""
    if isinstance(value, dict):
        value = [f"{key}={one}" for key, one in value.items()]
    if not isinstance(value, list) or not all(isinstance(one, str) and "=" in one[1:] for one in value):
        raise UserError(f"{value!r} is no list of key=value", "in --config: set: {steps: 100}, or set: [steps=100]")
    return tuple(_text(one) for one in value)


def _config(value: str) -> str:
    """A file becomes absolute; the name of a preset stays."""
    path = Path(os.path.expanduser(_text(value)))
    return str(path.absolute()) if path.is_file() else value


def _one_of(*known: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value not in known:
            raise UserError(f"{value!r} is none of {', '.join(known)}")
        return value

    return read


def _serve_reader(setting: "dataclasses.Field[Any]") -> Callable[[str], str]:
    def read(value: str) -> str:
        typed = setting.metadata["read"](_text(value))
        return str(typed.absolute()) if isinstance(typed, Path) else value

    return read


_SERVE = {
    one.metadata["flag"].replace("-", "_"): _serve_reader(one)
    for one in dataclasses.fields(ServeSettings)
    if one.name not in NODE_SETTINGS  # settled where the job runs
} | {"host": _word}


def _numbers(low: float) -> Callable[[str], str]:
    """Text that is numbers with commas between them, each at least `low`; whole ones where `low` is."""

    def read(value: str) -> str:
        try:
            numbers = [type(low)(word) for word in _text(value).split(",")]
        except ValueError:
            numbers = []
        if not numbers or not all(low <= number < 10**6 for number in numbers):
            raise UserError(f"{value!r} is no list of numbers from {low:g} on, such as 1,8,32")
        return value

    return read


def _whole(low: int) -> Callable[[str], str]:
    """Text that is one whole number."""
    return lambda value: str(_count(low)(value))


_BENCH: dict[str, Callable[[str], Any]] = {
    "batch": _numbers(1),
    "rate": _numbers(0.001),
    **dict.fromkeys(("prompt", "new", "repeats", "requests", "ranks"), _whole(1)),
    "seed": _whole(0),
    "compare": _text,
    "profile": _switch,
    **dict.fromkeys(("out", "plot"), absolute_path),
}

# kind: the keys that its command takes under run:, and their readers
PAYLOAD_KEYS: dict[Kind, dict[str, Callable[[Any], Any]]] = {
    "serve": {"model": _model, **_SERVE},
    "finetune": {"config": _config, "set": _assignments},
    "bench": {"what": _one_of("decode", "prefill", "serve"), "target": _model, **_BENCH},
    "preflight": {"model": _model, "measure": _switch},
}

_Command = tuple[tuple[str, ...], str | None, int | None]


def _need(payload: Mapping[str, Any], kind: Kind, *keys: str) -> None:
    for key in keys:
        if key not in payload:
            raise UserError(f"{kind}: run.{key} is missing", f"run: {{{key}: ...}} in --config, or --set run.{key}=...")


def _flags(payload: Mapping[str, Any], keys: Mapping[str, Callable[[Any], Any]]) -> list[str]:
    words: list[str] = []
    for key, read in keys.items():
        if key in payload:
            value, flag = read(payload[key]), "--" + key.replace("_", "-")
            if not isinstance(value, bool):
                words += [flag, value]
            elif value:
                words.append(flag)
    return words


def _serve_command(payload: Mapping[str, Any]) -> _Command:
    _need(payload, "serve", "model")
    flags = _flags(payload, {key: read for key, read in _SERVE.items() if key not in ("host", "port")})
    port = int(payload["port"]) if "port" in payload else None
    if port == 0:
        raise UserError("run.port 0: clients could not know the port", "leave it out: it follows from the job's id")
    return ("serve", _argument(_model(payload["model"])), *flags), payload.get("host"), port


def _finetune_command(payload: Mapping[str, Any]) -> _Command:
    _need(payload, "finetune", "config")
    return ("finetune", "--config", _config(payload["config"]), *_assignments(payload.get("set", []))), None, None


# What not every bench takes, and those that do.
_BENCH_ONLY = {
    **{"repeats": ("decode", "prefill"), "rate": ("serve",), "requests": ("serve",)},
    **{"new": ("decode", "serve"), "profile": ("decode",)},
}


def _bench_command(payload: Mapping[str, Any]) -> _Command:
    _need(payload, "bench", "what", "target")
    for key, kinds in _BENCH_ONLY.items():
        if key in payload and payload["what"] not in kinds:
            raise UserError(f"run.{key} is not for bench {payload['what']}", f"it is for bench {' and '.join(kinds)}")
    return ("bench", payload["what"], _argument(_model(payload["target"])), *_flags(payload, _BENCH)), None, None


def _preflight_command(payload: Mapping[str, Any]) -> _Command:
    """Measures unless it is told not to: a slow link is what it is there to find."""
    model = [_argument(_model(payload["model"]))] if "model" in payload else []
    return ("doctor", *model, *_flags({"measure": "true"} | dict(payload), {"measure": _switch})), None, None


def _argument(text: str) -> str:
    if text.startswith("-"):
        raise UserError(f"{text!r} looks like an option", "put ./ in front of a folder's name")
    return text


_COMMANDS: dict[Kind, Callable[[Mapping[str, Any]], _Command]] = {
    "serve": _serve_command,
    "finetune": _finetune_command,
    "bench": _bench_command,
    "preflight": _preflight_command,
}

"""Says which optional install a command needs, where a traceback would otherwise name a module."""

from importlib.util import find_spec

from ..parallel.errors import UserError

SERVE = (
    *("torch", "safetensors", "tokenizers", "msgpack", "fastapi", "uvicorn", "httptools", "prometheus_client"),
    "llguidance",
)


def need_serve_extra(command: str) -> None:
    """Raises UserError if the [serve] install is missing, or part of it. Imports none of it."""
    _need(command, SERVE, "serve")


# of [train]: for files of records on one device, and what reads datasets
FINETUNE = ("torch", "safetensors", "tokenizers", "pydantic")
TRAIN = ("datasets",)


def need_finetune_modules(command: str, deepspeed: bool = False) -> None:
    _need(command, (*FINETUNE, "deepspeed") if deepspeed else FINETUNE, "train")


def need_train_extra(command: str) -> None:
    """The same for what [train] brings besides."""
    _need(command, TRAIN, "train")


def need_module(what: str, module: str) -> None:
    """For what no extra brings."""
    if find_spec(module) is None:
        raise UserError(f"{what} needs {module}", f"pip install {module}")


def _need(command: str, modules: tuple[str, ...], extra: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(f"{command} needs {', '.join(missing)}", f"pip install 'gptoss-launch[{extra}]'")


def need_plot_extra(command: str) -> None:
    """The same for what draws."""
    _need(command, ("matplotlib",), "plot")


def need_tools_extra(what: str) -> None:
    """The same for what talks to tool servers."""
    _need(what, ("mcp",), "tools")

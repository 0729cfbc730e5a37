"""Says which optional install a command needs, where a traceback would otherwise name a module."""

from importlib.util import find_spec

from ..parallel.errors import UserError

SERVE = ("torch", "safetensors", "tokenizers", "msgpack", "fastapi", "uvicorn", "prometheus_client")


def need_serve_extra(command: str) -> None:
    """Raises UserError if the [serve] install is missing, or part of it. Imports none of it."""
    missing = [module for module in SERVE if find_spec(module) is None]
    if missing:
        raise UserError(f"{command} needs {', '.join(missing)}", "pip install 'gptoss-launch[serve]'")

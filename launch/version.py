"""Which version of gptoss-launch this is."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    try:
        return version("gptoss-launch")
    except PackageNotFoundError:
        return "not installed, run from its source"

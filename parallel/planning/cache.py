"""Where what takes long to find out or to make is kept from one start to the next."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Of one kind of thing, in the user's cache (XDG); it need not exist."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "gptoss-launch" / name

"""A server for as long as a command needs one: somebody's, by its URL, or our own, started here and ended after."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..parallel.errors import UserError


@contextmanager
def served(model: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """The URL of a server of `model`, with /v1 at its end: its own if it is one, or one that is started here with these
    flags of serve and ended after. Raises UserError for one that does not start, with what it said."""
    if model.startswith(("http://", "https://")):
        yield model.rstrip("/")
        return
    command = [sys.executable, "-m", "gptoss_launch.launch", "serve", model, "--port", "0", *flags]
    with (
        tempfile.TemporaryFile("w+") as stderr,  # a pipe that nobody reads would fill up and hold the server
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as server,
    ):
        assert server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            if not url:
                code = server.wait()
                stderr.seek(0)
                complaints = [line for line in stderr.read().splitlines() if line.startswith("error: ")]
                reason = complaints[-1].removeprefix("error: ") if complaints else f"exit code {code}"
                raise UserError(f"{model} is not served: {reason}", f"gptoss-launch serve {model}")
            yield url
        finally:
            server.terminate()
            server.wait()

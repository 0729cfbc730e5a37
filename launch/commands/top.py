"""`top URL`: a running server at a glance, in the terminal, from its /metrics; q or Ctrl-C leaves.

A server that goes away is waited for. Needs no torch and nothing of the server's install.
"""

import dataclasses
import http.client
import json as json_text
import os
import queue
import select
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from ...parallel.errors import UserError
from ..prometheus import Reading, parse

if TYPE_CHECKING:
    from ..top import Snapshot, View

ANSWER_S = 3.0
WINDOW_S = 10.0  # that rates and latencies are of, at most
SPEEDS = 60  # as many as are drawn
KEY_POLL_S = 0.1


@click.command
@click.argument("url")
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between looks.",
)
@click.option(
    "--json", is_flag=True, help="One JSON object on stdout, of the time between two looks, and nothing else."
)
def command(url: str, every_s: float, json: bool) -> None:
    """Watch a running server in the terminal.

    URL is that of the server, such as http://127.0.0.1:8000, with or without /v1. q or Ctrl-C leaves.
    """
    metrics = metrics_url(url)
    if json:
        from ..top import snapshot

        before = look(metrics)
        time.sleep(every_s)
        try:
            click.echo(json_text.dumps(dataclasses.asdict(snapshot(before, look(metrics)))))
        except ValueError as error:
            raise UserError(f"{metrics}: {error}", "is it the URL of a running server?") from None
        return
    if not sys.stdout.isatty():
        raise UserError("top draws in a terminal, and stdout is none", "--json prints one snapshot")
    watch(metrics, every_s)


def metrics_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.rstrip("/") not in ("", "/v1"):
        raise UserError(f"{url!r} is no URL of a server", "such as http://127.0.0.1:8000, with or without /v1")
    return f"{parts.scheme}://{parts.netloc}/metrics"


def look(metrics: str) -> Reading:
    """Raises UserError in one short line where there is no answer, or none that is metrics."""
    try:
        with urllib.request.urlopen(metrics, timeout=ANSWER_S) as response:
            text = response.read().decode()
        return parse(text, time.monotonic())
    except urllib.error.HTTPError as error:
        raise UserError(f"{metrics}: {error.code}", "is it the URL of a running server?") from None
    except urllib.error.URLError as error:
        raise UserError(f"{metrics}: {error.reason}", "is it the URL of a running server?") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{metrics}: {error}", "is it the URL of a running server?") from None


def watch(metrics: str, every_s: float) -> None:
    """Until q or Ctrl-C. Looks from a thread, so that keys are heard while a server is slow to answer."""
    from rich.console import Console
    from rich.live import Live

    from ..top import render

    looks: queue.SimpleQueue[Reading | UserError] = queue.SimpleQueue()
    threading.Thread(target=_look_on, args=(metrics, every_s, looks), daemon=True).start()
    screen = _Screen(metrics.removesuffix("/metrics"))
    try:
        with (
            _keys() as pressed,
            Live(render(screen.view()), console=Console(), screen=True, auto_refresh=False) as live,
        ):
            while pressed(KEY_POLL_S) not in ("q", "Q", "\x03"):
                while not looks.empty():
                    screen.take(looks.get())
                live.update(render(screen.view()), refresh=True)
    except KeyboardInterrupt:
        pass


def _look_on(metrics: str, every_s: float, looks: "queue.SimpleQueue[Reading | UserError]") -> None:
    while True:
        began_s = time.monotonic()
        try:
            looks.put(look(metrics))
        except UserError as error:
            looks.put(error)
        time.sleep(max(0.0, began_s + every_s - time.monotonic()))


class _Screen:
    """What the looks so far come to."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._readings: deque[Reading] = deque()
        self._speeds: deque[float] = deque(maxlen=SPEEDS)
        self._shown: Snapshot | None = None
        self._trouble = "no answer yet"
        self._lost_s: float | None = None

    def take(self, found: Reading | UserError) -> None:
        from ..top import snapshot

        try:
            if isinstance(found, UserError):
                raise ValueError(found.message.partition("/metrics: ")[2] or found.message)
            last = self._readings[-1] if self._readings else found
            self._shown = snapshot(self._readings[0] if self._readings else found, found)
            self._speeds.append(snapshot(last, found).generation_tok_s or 0.0)
            self._readings.append(found)
            while found.at_s - self._readings[0].at_s > WINDOW_S and len(self._readings) > 1:
                self._readings.popleft()
            self._trouble, self._lost_s = "", None
        except ValueError as error:
            self._trouble = str(error)
            self._lost_s = self._lost_s or time.monotonic()
            self._readings.clear()  # whoever answers next may be another process

    def view(self) -> "View":
        from ..top import View

        trouble = self._trouble
        if self._lost_s is not None:
            trouble = f"no answer for {time.monotonic() - self._lost_s:.0f} s, still trying: {trouble}"
        return View(self._url, self._shown, trouble, tuple(self._speeds))


@contextmanager
def _keys() -> "Iterator[_Pressed]":
    """Keys one by one, not by lines and not shown, while stdin is a terminal; it is left as it was."""
    if not sys.stdin.isatty():
        yield _Pressed(None)
        return
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setcbreak(number)
    try:
        yield _Pressed(number)
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


class _Pressed:
    def __init__(self, number: int | None) -> None:
        self._number = number

    def __call__(self, timeout_s: float) -> str:
        """The next key within timeout_s; "" if there is none. q at the end of the input, for nobody is there."""
        if self._number is None:
            time.sleep(timeout_s)
            return ""
        if not select.select([self._number], [], [], timeout_s)[0]:
            return ""
        return os.read(self._number, 1).decode(errors="replace") or "q"

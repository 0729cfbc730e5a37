"""How a command that runs for long is asked to end: signals, as things to wait for."""

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class StopSignals:
    """SIGTERM and SIGINT as things to wait for: `first` asks for an orderly end, `second` for an end at once."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[signal.Signals] = loop.create_future()
        self.second: asyncio.Future[signal.Signals] = loop.create_future()

    @contextmanager
    def caught(self) -> Iterator["StopSignals"]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._take, number)
        try:
            yield self
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _take(self, number: signal.Signals) -> None:
        for future in (self.first, self.second):
            if not future.done():
                future.set_result(number)
                return


async def until(work: Coroutine[Any, Any, T], stop: asyncio.Future[signal.Signals]) -> T | None:
    """The result of `work`, or None, and `work` cancelled, if `stop` comes first."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({working, stop}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

"""Full garbage collections at times when they hold nobody up.

With 500 streams one takes up to 0.2 s, in which all of them stand still, every few seconds, and finds next to nothing:
what a stream leaves behind is mostly freed at once, and the rest by collections of what is young. So there are none
while anything runs, or hardly any. Knows nothing of what runs.
"""

import asyncio
import gc
import time
from collections.abc import Callable

LOOK_EVERY_S = 5.0
FULL_EVERY_S = 900.0  # however much runs


def settle() -> None:
    """What is there now stays, and is not looked through again; the rest only by `keep_tidy`."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 1 << 30)


async def keep_tidy(running: Callable[[], int], look_every_s: float = LOOK_EVERY_S) -> None:
    """Collects for ever: when nothing runs, after something did; and now and then. running: how much does now."""
    last_s, used = time.monotonic(), False
    while True:
        await asyncio.sleep(look_every_s)
        now = running()
        used |= now > 0
        if used and (not now or time.monotonic() - last_s >= FULL_EVERY_S):
            gc.collect()
            last_s, used = time.monotonic(), False

"""How late the event loop runs what is due: the time by which every stream is held up at that moment.

Two figures for each sample. Late: by the clock, from when a timer was due until it ran. Turn: what this thread computed
in the next turn of the loop; late is no more than one or two of those unless other processes take the cores. Knows
nothing of HTTP.
"""

import asyncio
import time
from collections.abc import Callable

EVERY_S = 0.05


async def watch_lag(observe: Callable[[float, float], None], every_s: float = EVERY_S) -> None:
    """Calls observe(late_s, turn_s) for ever, once every `every_s`."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + every_s
        await asyncio.sleep(every_s)
        late_s, computed_s = max(loop.time() - due_s, 0.0), time.thread_time()
        await asyncio.sleep(0)
        observe(late_s, time.thread_time() - computed_s)

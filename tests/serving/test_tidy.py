"""Full garbage collections: none of their own accord, none while anything runs, one once nothing does any more."""

import asyncio
import gc
import subprocess
import sys

from gptoss_launch.launch.api import tidy

CYCLES = """
import gc
from gptoss_launch.launch.api.tidy import settle
settle()
full = []
gc.callbacks.append(lambda phase, about: full.append(1) if about["generation"] == 2 else None)
kept = []
for _ in range(200_000):
    kept.append([kept])
print(len(full), gc.get_freeze_count() > 1000)
"""


def test_no_full_collection_of_its_own_accord() -> None:
    done = subprocess.run([sys.executable, "-c", CYCLES], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == ["0", "True"]


def test_collections_come_when_nothing_runs(monkeypatch) -> None:
    running, full = [0], []
    monkeypatch.setattr(gc, "collect", lambda: full.append(running[0]))

    async def story() -> None:
        task = asyncio.create_task(tidy.keep_tidy(lambda: running[0], 0.01))
        await asyncio.sleep(0.1)
        assert not full  # nothing ran
        running[0] = 5
        await asyncio.sleep(0.1)
        assert not full
        running[0] = 0
        await asyncio.sleep(0.1)
        assert full == [0]
        monkeypatch.setattr(tidy, "FULL_EVERY_S", 0.0)
        running[0] = 5
        await asyncio.sleep(0.1)
        assert 5 in full
        task.cancel()

    asyncio.run(story())

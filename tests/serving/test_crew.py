"""Why a crew has failed: what a rank says of its end, and the end itself."""

import asyncio
import sys

import pytest
from gptoss_launch.launch.crew import Crew

RANK = """
import sys
from pathlib import Path
from gptoss_launch.parallel.engine.lifeline import hold
from gptoss_launch.parallel.engine.wire import Failed, encode

control = hold(Path(sys.argv[1]), "rank", 0)
if sys.argv[2] == "says why":
    control.sendall(encode(Failed(0, "RuntimeError: reset by peer", "", exit_code=1, follows=True)))
"""  # and ends at once, as a process does whose teardown aborts


@pytest.mark.parametrize(
    ("end", "said", "follows"),
    [
        ("says why", "rank 0 on .* failed while starting: RuntimeError: reset by peer", True),
        ("says nothing", "rank 0 on .* died while starting", False),
    ],
)
def test_what_a_rank_says_of_its_end_counts_more_than_the_end(tmp_path, end, said, follows):
    async def story():
        crew = Crew(tmp_path / "rank.sock", range(1), lambda rank: None)
        await crew.start([sys.executable, "-c", RANK, str(crew.control), end], log=None)
        try:
            return await asyncio.wait_for(crew.failed, 30)
        finally:
            await crew.stop(1.0)

    error = asyncio.run(story())
    with pytest.raises(type(error), match=said):
        raise error
    assert error.follows is follows

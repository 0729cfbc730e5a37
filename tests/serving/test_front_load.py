"""Five hundred streams at once through the HTTP process: whole, and cheap. tests/benchmarks/front_end.py runs longer.

What a token costs is CPU time, which others on the machine do not use up but do make longer: `slowness` says by how
much. A token costs about 60 us on a quiet core and must not cost 100, so the limit of 80 leaves a third for noise. A
turn of the event loop computes 10 ms in the 99th percentile (50 ms are allowed), so three of those are the limit.
"""

import http_load
import pytest


@pytest.mark.slow
def test_five_hundred_streams_are_whole_and_cheap():
    row = http_load.measure(streams=500, seconds=5, words=40, step_s=0.08)
    assert row["errors"] == {} and row["answers"] >= 500
    assert row["tokens"] > 100_000
    assert row["cpu_us_per_token"] <= 80 * row["slowness"], row
    assert row["turn_p99_s"] <= 0.03 * row["slowness"], row

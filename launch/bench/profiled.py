"""Which kernels the decode steps of a checkpoint spend their time in: an engine of its own under torch's profiler.

Apart from the engine that is timed, so that profiling is in none of the times.
"""

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...parallel.planning.plan import Plan
from .checkpoint import started
from .kernel_groups import OTHER, by_group, group_of
from .measure import send
from .target import Progress

OTHERS_NAMED = 5


async def profile(
    plan: Plan, worker: str, batches: Sequence[int], prompt: int, progress: Progress
) -> dict[int, dict[str, float]]:
    """Microseconds of a step by group of kernels, for each batch size; of kernels in no group by name.

    Those of rank 0. On the CPU, of torch's operations.
    """
    from ...parallel.engine.profile import LEAST_TOKENS

    draw = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.jsonl"
        async with started(plan, worker, ("--profile", str(path))) as target:
            for batch in batches:
                # the first stream is answered while the last one's prompt is computed
                late = -(-batch * prompt // plan.step_tokens)
                await send(target, batch, prompt, LEAST_TOKENS + late, draw)
                progress.step()
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    found = {}
    for batch in batches:
        sizes = sorted((line["decodes"], line["us"]) for line in lines if line["decodes"] >= batch)
        if sizes:
            found[batch] = grouped(sizes[0][1])
    return found


def grouped(microseconds: dict[str, float]) -> dict[str, float]:
    """By group, and after that the largest of those in none as "other: NAME"."""
    groups = by_group(microseconds)
    unknown = {name: spent for name, spent in microseconds.items() if group_of(name) == OTHER}
    groups.pop(OTHER, None)
    largest = sorted(unknown.items(), key=lambda item: -item[1])[:OTHERS_NAMED]
    named = {f"{OTHER}: {name[:60]}": spent for name, spent in largest}
    rest = sum(unknown.values()) - sum(named.values())
    return groups | named | ({OTHER: rest} if rest > 0 else {})

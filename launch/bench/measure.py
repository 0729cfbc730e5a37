"""The three measurements, over any target: a batch decoding, a batch of prompts, and requests that arrive over time.

`decode` is timed as the peers' own benches are: all streams are sent at once, every token is waited for, and a step
takes (t(1 + n) - t(1)) / n, with t(k) the time until the last stream has k tokens; t is the median of several runs. So
prefill, queueing and the way there cancel out. Prompts are random and new in every run. Knows nothing of what a target
is.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ...parallel.errors import UserError
from .numbers import median, percentile, poisson_arrivals_s
from .rows import Kind, Row, make_row
from .target import Progress, Sample, Target

WARM_TOKENS = 4  # enough to compile and capture what a batch size needs


async def send(target: Target, batch: int, prompt: int, new: int, draw: random.Random) -> list[Sample]:
    """`batch` streams at once. Raises UserError if one of them has no whole answer."""
    prompts = [target.prompt(prompt, draw) for _ in range(batch)]
    samples = await asyncio.gather(*(target.stream(one, new) for one in prompts))
    errors = Counter(sample.error for sample in samples if sample.error)
    if errors:
        reason, count = errors.most_common(1)[0]
        raise UserError(
            f"{target.about.engine}: {sum(errors.values())} of {batch} streams failed; {count}: {reason}",
            "fewer streams at once (--batch), or shorter ones",
        )
    return samples


def took_s(samples: Sequence[Sample]) -> float:
    return max(sample.ended_s for sample in samples) - min(sample.sent_s for sample in samples)


async def decode(
    target: Target, batch: int, prompt: int, new: int, repeats: int, draw: random.Random, progress: Progress
) -> Row:
    await send(target, batch, prompt, 1 + new, draw)  # as a whole: a peer compiles at sizes that only a long run meets
    progress.step()
    ones, wholes, streams = [], [], []
    for _ in range(repeats):
        ones.append(await send(target, batch, prompt, 1, draw))
        progress.step()
        wholes.append(await send(target, batch, prompt, 1 + new, draw))
        streams += wholes[-1]
        progress.step()
    one_s, whole_s = median([took_s(run) for run in ones]), median([took_s(run) for run in wholes])
    # as many as were asked for, unless the target cannot be told to go on after the model has ended
    steps = max(sample.tokens for sample in streams) - 1
    decoded = sum(sample.tokens - 1 for sample in streams) / repeats
    notes, early = list(target.notes), sum(sample.tokens < 1 + new for sample in streams)
    if early:
        notes.append(f"{early} of {len(streams)} streams ended before {1 + new} tokens: tok/s counts those that came")
    spent_s = whole_s - one_s
    if spent_s <= 0 or steps < 1:
        notes.append(f"{new} tokens more took no longer than the spread of the runs: nothing can be said; raise --new")
        spent_s = None
    figures = _latencies(streams, notes)
    return make_row(
        "decode",
        target.about,
        batch=batch,
        prompt=_prompt_tokens(streams, prompt),
        new=new,
        repeats=repeats,
        prefill_tok_s=_prefill(ones, one_s),
        decode_ms=None if spent_s is None else spent_s / steps * 1e3,
        decode_tok_s=None if spent_s is None else decoded / spent_s,
        tok_s_user=None if spent_s is None else decoded / batch / spent_s,
        notes=tuple(notes),
        **figures,
    )


async def prefill(
    target: Target, batch: int, prompt: int, repeats: int, draw: random.Random, progress: Progress
) -> Row:
    await send(target, batch, prompt, 1, draw)
    progress.step()
    runs = []
    for _ in range(repeats):
        runs.append(await send(target, batch, prompt, 1, draw))
        progress.step()
    streams = [sample for run in runs for sample in run]
    notes = list(target.notes)
    figures = _latencies(streams, notes) | {"itl_ms": None, "itl_p99_ms": None}
    return make_row(
        "prefill",
        target.about,
        batch=batch,
        prompt=_prompt_tokens(streams, prompt),
        new=1,
        repeats=repeats,
        prefill_tok_s=_prefill(runs, median([took_s(run) for run in runs])),
        notes=tuple(notes),
        **figures,
    )


async def serve(
    target: Target,
    prompt: int,
    new: int,
    requests: int,
    seed: int,
    progress: Progress,
    *,
    rate: float | None = None,
    batch: int | None = None,
) -> Row:
    """Requests that arrive at random, `rate` a second, or `batch` streams of which each is followed by the next.

    Those that fail are counted, not tried again: a server that refuses is not a fast one.
    """
    draw = random.Random(seed)
    prompts = [target.prompt(prompt, draw) for _ in range(requests)]
    await send(target, min(batch or 1, requests), prompt, WARM_TOKENS, draw)
    progress.step()

    async def one(number: int) -> Sample:
        sample = await target.stream(prompts[number], new)
        progress.step()
        return sample

    began_s = time.perf_counter()
    if rate is not None:
        samples = await _arriving(one, poisson_arrivals_s(rate, requests, seed), began_s)
    else:
        samples = await _following(one, requests, batch or 1)
    whole = [sample for sample in samples if not sample.error]
    spent_s = max((sample.ended_s for sample in whole), default=began_s) - began_s
    notes, tokens = list(target.notes), sum(sample.tokens for sample in whole)
    steps = [(sample.came_s[-1] - sample.came_s[0]) / (sample.tokens - 1) for sample in whole if len(sample.came_s) > 1]
    asked_ms = [(sample.ended_s - sample.sent_s) * 1e3 for sample in whole]
    step_s = percentile(steps, 50)
    return make_row(
        "serve",
        target.about,
        batch=batch,
        prompt=_prompt_tokens(whole, prompt),
        new=new,
        rate=rate,
        requests=requests,
        seed=seed,
        prefill_tok_s=sum(sample.prompt_tokens for sample in whole) / spent_s if whole else None,
        decode_ms=None if step_s is None else step_s * 1e3,
        decode_tok_s=tokens / spent_s if whole else None,
        tok_s_user=None if not step_s else 1 / step_s,
        request_ms=percentile(asked_ms, 50),
        request_p99_ms=percentile(asked_ms, 99),
        failed=dict(Counter(sample.error for sample in samples if sample.error)),
        **_latencies(whole, notes),
        notes=tuple(notes),
    )


async def _arriving(
    one: Callable[[int], Awaitable[Sample]], arrivals_s: Sequence[float], began_s: float
) -> list[Sample]:
    async def at(number: int, arrival_s: float) -> Sample:
        await asyncio.sleep(max(0.0, began_s + arrival_s - time.perf_counter()))
        return await one(number)

    return await asyncio.gather(*(at(number, arrival_s) for number, arrival_s in enumerate(arrivals_s)))


async def _following(one: Callable[[int], Awaitable[Sample]], requests: int, batch: int) -> list[Sample]:
    numbers = iter(range(requests))

    async def lane() -> list[Sample]:
        return [await one(number) for number in numbers]

    lanes = await asyncio.gather(*(lane() for _ in range(batch)))
    return [sample for samples in lanes for sample in samples]


def runs_of(kind: Kind, repeats: int, requests: int) -> int:
    """How often a case calls progress.step."""
    return {"decode": 1 + 2 * repeats, "prefill": 1 + repeats, "serve": 1 + requests}[kind]


def _latencies(streams: Sequence[Sample], notes: list[str]) -> dict[str, Any]:
    """TTFT and ITL; what their reader must know is added to notes."""
    first_ms = [sample.first_s * 1e3 for sample in streams if sample.first_s is not None]
    gaps_ms = [gap_s * 1e3 for sample in streams for gap_s in sample.gaps_s]
    tokens, pieces = sum(sample.tokens for sample in streams), sum(len(sample.came_s) for sample in streams)
    if pieces and tokens != pieces:
        notes.append(f"{tokens} tokens came in {pieces} pieces: ITL is between pieces")
    return {
        "ttft_ms": percentile(first_ms, 50),
        "ttft_p99_ms": percentile(first_ms, 99),
        "itl_ms": percentile(gaps_ms, 50),
        "itl_p99_ms": percentile(gaps_ms, 99),
    }


def _prompt_tokens(streams: Sequence[Sample], asked: int) -> int:
    """As the target counted them; as asked for where it did not."""
    counted = [sample.prompt_tokens for sample in streams if sample.prompt_tokens]
    return round(median(counted)) if counted else asked


def _prefill(runs: Sequence[Sequence[Sample]], spent_s: float) -> float:
    return sum(sample.prompt_tokens for run in runs for sample in run) / len(runs) / spent_s

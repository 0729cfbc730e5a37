"""What the runners of peers share: the cases, how they are timed, and rows with the keys of `bench`.

Timed as ours is: all prompts at once, t(1) and t(1 + n) with the last token on the host, and random prompts that are
new in every run. Of several runs the best counts, not the median as for ours: a peer that compiles kernels when their
shapes first come may do so in any run. Knows no engine: `generate` is the peer's own call.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gptoss_launch.launch.bench.rows import About, Row, make_row, with_roofline
from gptoss_launch.launch.bench.target import id_range, random_ids
from gptoss_launch.parallel.planning.roofline import decode_floor
from gptoss_launch.parallel.planning.shards import Mesh
from gptoss_launch.parallel.planning.spec import read_config

# Not timed, of each batch size, with one token and whole. vLLM's first token of 32 prompts took 1.9 s after a run of
# four tokens, and 1.4 s, the median of five, after three whole ones (two H200, 2026-11-30): most of it was compiling.
WARM_RUNS = 3
# (prompts, new tokens) -> seconds until every answer has so many tokens, all on the host
Generate = Callable[[Sequence[tuple[int, ...]], int], float]


def arguments(about: str, batches: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--batch", default=batches)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="add the lines of JSON to this file as well")
    return parser


def rows(given: argparse.Namespace, about: About, generate: Generate, notes: tuple[str, ...] = ()) -> Iterator[Row]:
    """A row for each batch size, as it is measured."""
    spec = read_config(given.checkpoint / "config.json")
    draw = random.Random(0)

    def run(batch: int, new: int) -> float:
        return generate([random_ids(given.prompt, id_range(spec.vocab), draw) for _ in range(batch)], new)

    for batch in map(int, given.batch.split(",")):
        for _ in range(WARM_RUNS):
            run(batch, 1)
            run(batch, 1 + given.new)
        times = [(run(batch, 1), run(batch, 1 + given.new)) for _ in range(given.repeats)]
        pairs = ", ".join(f"{first_s:.3f} and {last_s:.3f}" for first_s, last_s in times)
        print(f"batch {batch}, seconds to the first and the last token: {pairs}", file=sys.stderr, flush=True)
        one_s, whole_s = (min(pair[place] for pair in times) for place in (0, 1))
        step_s = (whole_s - one_s) / given.new if whole_s > one_s else None
        row = make_row(
            "decode",
            about,
            prompt=given.prompt,
            new=given.new,
            batch=batch,
            repeats=given.repeats,
            prefill_tok_s=batch * given.prompt / one_s,
            decode_ms=None if step_s is None else step_s * 1e3,
            decode_tok_s=None if step_s is None else batch / step_s,
            tok_s_user=None if step_s is None else 1 / step_s,
            ttft_ms=one_s * 1e3,
            notes=(*notes, "ttft_ms is to the first token of all streams", "the best of its runs, not the median"),
        )
        middle = given.prompt + (given.new + 1) // 2
        device = None if about.device == "cpu" else about.device
        yield with_roofline(row, decode_floor(spec, Mesh(about.ranks or 1), "bf16", "bf16", device, batch, middle))


def tell(given: argparse.Namespace, found: Iterator[Row]) -> None:
    """As `bench` prints: a line a case, and all again in the last under `rows`."""
    told: list[dict] = []
    for row in found:
        told.append(row.to_json())
        _write(told[-1], given.out)
    _write({"rows": told, "ratios": []}, given.out)


def _write(line: dict, out: Path | None) -> None:
    print(json.dumps(line), flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

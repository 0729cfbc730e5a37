"""Times the draw on a GPU in CUDA graphs, and checks that the Triton version draws what the plain one draws.

    python tests/benchmarks/kernels_sample.py [--out FILE]

One JSON line a case: sequences, vocabulary rows of a rank (the whole one, and half of it), what is asked for, median
microseconds of a draw, bytes of logits, and these over the time. `race` lines time the kernel alone over its constants.
The last lines are for what else may be asked for, with the memory that it takes at most. The logits may stand in the L2
cache, as they do after the head's product. Takes about 40 s.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from gptoss_launch.parallel.kernels import sample as plain
from gptoss_launch.parallel.kernels import triton_sample
from gptoss_launch.parallel.kernels.adjust import adjust, count_tokens
from gptoss_launch.parallel.kernels.logprobs import logprobs
from gptoss_launch.parallel.kernels.sample import Draws, Wanted
from gptoss_launch.parallel.model.comm import Alone

VOCABS = (201088, 100544)
SEQUENCES = (1, 8, 32, 64, 256)
MODES = {
    "greedy": ({"temperature": 0.0}, Wanted(candidates=False, min_p=False)),
    "drawn": ({}, Wanted(candidates=False, min_p=False)),
    "min_p": ({"min_p": 0.05}, Wanted(candidates=False, min_p=True)),
    "top_p": ({"top_p": 0.9}, Wanted(candidates=True, min_p=False)),
}
VARIANTS = ((1024, 4, 2048), (1024, 8, 2048), (2048, 8, 2048), (512, 4, 2048), (1024, 4, 1024), (1024, 4, 4096))
REPLAYS = 20
DEVICE = torch.device("cuda")


def draws_of(rows: int, temperature: float = 1.0, top_p: float = 1.0, min_p: float = 0.0) -> Draws:
    def column(value: float) -> torch.Tensor:
        return torch.full((rows,), value, device=DEVICE)

    row_S = torch.arange(rows, device=DEVICE)
    return Draws(
        temperature_S=column(temperature),
        top_p_S=column(top_p),
        min_p_S=column(min_p),
        presence_S=column(0.0),
        frequency_S=column(0.0),
        repetition_S=column(1.0),
        top_k_S=torch.zeros(rows, dtype=torch.int32, device=DEVICE),
        seed_S=row_S * 7919,
        position_S=row_S + 1000,
    )


def seconds(call: Callable[[], object]) -> float:
    """Median over replays of a graph of the call."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times)


def agreement(logits_SV: torch.Tensor, draws: Draws, wanted: Wanted) -> dict[str, float]:
    """Shares of rows: alike in both versions; complete; and, where that is so, alike in sample_exact."""
    given = logits_SV, 0, Alone().all_gather, draws
    fast, slow = triton_sample.sample(*given, wanted), plain.sample(*given, wanted)
    exact_S = triton_sample.sample_exact(*given)
    differs_S = (exact_S != fast.tokens_S) & fast.complete_S
    return {
        "alike": ((fast.tokens_S == slow.tokens_S) | ~slow.complete_S).float().mean().item(),
        "complete": fast.complete_S.float().mean().item(),
        "differs_from_exact": differs_S.float().mean().item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    failed = False

    def report(**line: object) -> None:
        text = json.dumps({"device": torch.cuda.get_device_name(), **line})
        print(text, flush=True)
        if out is not None:
            with out.open("a") as file:
                print(text, file=file)

    generator = torch.Generator(DEVICE).manual_seed(0)
    for vocab in VOCABS:
        whole_SV = (torch.randn((max(SEQUENCES), vocab), generator=generator, device=DEVICE) * 6).bfloat16()
        for rows in SEQUENCES:
            logits_SV = whole_SV[:rows]
            for mode, (values, wanted) in MODES.items():
                draws = draws_of(rows, **values)
                given = logits_SV, 0, Alone().all_gather, draws, wanted
                checks = agreement(logits_SV, draws, wanted) if vocab == VOCABS[0] else {}
                failed |= bool(checks) and (checks["alike"] < 0.99 or checks["differs_from_exact"] > 0)
                case = {"case": "sample", "sequences": rows, "vocab": vocab, "mode": mode}
                time_s = seconds(lambda given=given: triton_sample.sample(*given))
                times = {"us": round(time_s * 1e6, 1), "gb_s": round(logits_SV.nbytes / time_s / 1e9, 1)}
                if vocab == VOCABS[0] and mode in ("drawn", "top_p"):
                    times["plain_us"] = round(seconds(lambda given=given: plain.sample(*given)) * 1e6, 1)
                report(**case, bytes=logits_SV.nbytes, **times, **checks)
            top_s = seconds(lambda logits_SV=logits_SV: plain.most_likely(logits_SV, 0, plain.CANDIDATES))
            report(case="most_likely", sequences=rows, vocab=vocab, us=round(top_s * 1e6, 1))
        if vocab == VOCABS[0]:
            for rows in (1, 32, 256):
                draws, logits_SV = draws_of(rows), whole_SV[:rows]
                for variant in VARIANTS:
                    triton_sample.BLOCK, triton_sample.WARPS, triton_sample.PROGRAMS = variant
                    time_s = seconds(
                        lambda logits_SV=logits_SV, draws=draws: triton_sample.race(logits_SV, 0, draws, None, None)
                    )
                    report(case="race", sequences=rows, variant=variant, us=round(time_s * 1e6, 1))
                triton_sample.BLOCK, triton_sample.WARPS, triton_sample.PROGRAMS = VARIANTS[0]
    # what else a step may ask for: that a graph can capture it, and what it takes
    counts_RV = torch.zeros((max(SEQUENCES), VOCABS[0]), dtype=torch.int32, device=DEVICE)
    whole_SV = torch.randn((max(SEQUENCES), VOCABS[0]), generator=generator, device=DEVICE).bfloat16()
    for rows in (1, 32, 256):
        logits_SV, draws, row_S = whole_SV[:rows], draws_of(rows), torch.arange(rows, device=DEVICE)
        bias = row_S[:, None].repeat(1, 300), torch.ones((rows, 300), device=DEVICE)
        allowed_SW = torch.full((rows, VOCABS[0] // 32), -1, dtype=torch.int32, device=DEVICE)
        calls = {
            "count": partial(count_tokens, counts_RV, 0, row_S, row_S, row_S >= 0),
            "penalties": partial(adjust, logits_SV, 0, draws, counts_RV, row_S),
            "bias": partial(adjust, logits_SV, 0, draws, bias=bias),
            "mask": partial(adjust, logits_SV, 0, draws, allowed_SW=allowed_SW),
            "logprobs": partial(logprobs, logits_SV, 0, Alone().all_gather, row_S, 20),
            "plain": partial(plain.sample, logits_SV, 0, Alone().all_gather, draws, plain.EVERYTHING),
            "triton": partial(triton_sample.sample, logits_SV, 0, Alone().all_gather, draws, plain.EVERYTHING),
        }
        for name, call in calls.items():
            torch.cuda.reset_peak_memory_stats()
            before_bytes = torch.cuda.memory_allocated()
            call()
            peak_bytes = torch.cuda.max_memory_allocated() - before_bytes
            report(case=name, sequences=rows, us=round(seconds(call) * 1e6, 1), peak_bytes=peak_bytes)
    report(case="verdict", ok=not failed)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""What batching gives on one GPU: `python batching.py CHECKPOINT [--rounds decode,batching,busy] [--out FILE]`.

decode    milliseconds of a decode step through the leader's loop, every token on the host, by batch size
batching  256 requests, prompts of 64 to 2,048 tokens and answers of 16 to 512, uniform, seed 0, at most 64 at a time:
          tokens a second with continuous batching, and in groups of 64 in order of arrival: "static" keeps the size of
          its batch until the longest answer is done, as static batching does; "shrinking" lets finished ones go
busy      share of a decode step at batch 32 during which the GPU works, from the profiler

One process, no HTTP, the engine as `serve` has it. Prints one JSON object a line.
"""

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from gptoss_launch.launch.resolve import make_plan
from gptoss_launch.launch.settings import Settings
from gptoss_launch.parallel.engine.engine import Engine, refusal, scheduler_for
from gptoss_launch.parallel.engine.grammars import grammars_of
from gptoss_launch.parallel.engine.leader import Device, Leader
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.engine.start import Options, start
from gptoss_launch.parallel.engine.trace import Trace
from gptoss_launch.parallel.engine.wire import Generate, Message, Refused, Tokens

LIVE = 64


class Run:
    """A leader in this process, and when each request's tokens came."""

    def __init__(self, engine: Engine) -> None:
        self.came_s: dict[str, list[float]] = {}
        device = Device(engine.launch, engine.graphs.of, engine.sizes, ahead=True)
        plan = engine.plan
        grammars = grammars_of(plan.checkpoint, plan.spec.vocab)
        self.leader = Leader(scheduler_for(plan), device, self._take, lambda one: refusal(plan, one), grammars)

    def _take(self, front_end: str, message: Message) -> None:
        assert not isinstance(message, Refused), message
        if isinstance(message, Tokens):
            now_s = time.perf_counter()
            for token in message.tokens:
                self.came_s[token.request_id].append(now_s)

    def ask(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.came_s[request.id] = []
            self.leader.take("bench", Generate(request))

    def until_idle(self) -> float:
        began_s = time.perf_counter()
        while not self.leader.idle:
            self.leader.turn()
        return time.perf_counter() - began_s

    @property
    def tokens(self) -> int:
        return sum(map(len, self.came_s.values()))


def prompts(count: int, tokens: int, new: int, seed: int = 0) -> list[Request]:
    r = random.Random(seed)
    return [
        Request(f"{i}", tuple(r.randrange(200_000) for _ in range(tokens)), new, Sampling(seed=i)) for i in range(count)
    ]


def decode(engine: Engine, batch: int, prompt: int = 1024, new: int = 129) -> dict:
    """As the peers are timed: (t(new) - t(1)) / (new - 1), here between the first and last token of the last stream."""
    run = Run(engine)
    run.ask(prompts(batch, prompt, new, seed=batch))
    began_s = time.perf_counter()
    run.until_idle()
    first_s = max(times[0] for times in run.came_s.values())
    last_s = max(times[-1] for times in run.came_s.values())
    after_first = [sum(at > first_s for at in times) for times in run.came_s.values()]
    step_s = (last_s - first_s) / max(after_first)
    return {
        "round": "decode",
        "batch": batch,
        "prompt": prompt,
        "decode_ms": round(step_s * 1e3, 3),
        "decode_tok_s": round(sum(after_first) / (last_s - first_s), 1),
        "prefill_tok_s": round(batch * prompt / (first_s - began_s), 1),
    }


def batching(engine: Engine) -> list[dict]:
    r = random.Random(0)
    requests = [
        Request(
            f"{i}",
            tuple(r.randrange(200_000) for _ in range(r.randint(64, 2048))),
            r.randint(16, 512),
            Sampling(seed=i),
        )
        for i in range(256)
    ]
    wanted = sum(request.max_tokens for request in requests)
    rows = []
    for name in ("continuous", "static", "shrinking"):
        run, seconds = Run(engine), 0.0
        size = len(requests) if name == "continuous" else LIVE
        for first in range(0, len(requests), size):
            group = requests[first : first + size]
            if name == "static":
                longest = max(request.max_tokens for request in group)
                group = [dataclasses.replace(request, max_tokens=longest) for request in group]
            run.ask(group)
            seconds += run.until_idle()
        assert run.tokens == wanted or name == "static"
        rows.append({"round": "batching", "way": name, "seconds": round(seconds, 2), "tok_s": round(wanted / seconds)})
    for row in rows[1:]:
        row["continuous_is_faster"] = round(row["seconds"] / rows[0]["seconds"], 3)
    return rows


def busy(engine: Engine, batch: int = 32, steps: int = 100) -> dict:
    """Kernels of `steps` steps in the middle of decoding, their union over the time from the first to the last."""
    run = Run(engine)
    run.ask(prompts(batch, 256, 400))
    while min(map(len, run.came_s.values())) < 20:
        run.leader.turn()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            run.leader.turn()
        torch.cuda.synchronize()
    run.until_idle()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy_us, end_us = 0.0, spans[0][0]
    for start_us, stop_us in spans:
        busy_us += max(0.0, stop_us - max(start_us, end_us))
        end_us = max(end_us, stop_us)
    whole_us = end_us - spans[0][0]
    names: dict[str, float] = {}
    for event in profile.key_averages():
        names[event.key[:60]] = names.get(event.key[:60], 0.0) + event.self_device_time_total
    top = {name: round(us / steps, 1) for name, us in sorted(names.items(), key=lambda item: -item[1])[:14]}
    share = busy_us / whole_us
    return {"round": "busy", "batch": batch, "busy": share, "step_us": whole_us / steps, "us_a_step": top}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", default="decode,batching,busy")
    parser.add_argument("--batch", default="1,8,32,64")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    settings = Settings(context_tokens=8192, ranks=1, dp=1, sequences=LIVE)
    plan = make_plan(arguments.checkpoint, settings, need_weights=True)
    trace = Trace(Path("/tmp/batching.trace"))
    engine, _, ready = start(plan, 0, Options(), trace, lambda done, total: None)
    rows: list[dict] = []

    def tell(row: dict) -> None:
        row |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "model": arguments.checkpoint}
        rows.append(row)
        print(json.dumps(row), flush=True)

    tell({"round": "start", "load_s": ready.load_s, "memory": ready.memory, "times": ready.times})
    rounds = arguments.rounds.split(",")
    if "decode" in rounds:
        for size in map(int, arguments.batch.split(",")):
            decode(engine, size, new=9)  # captures and compiles what the size needs
            tell(decode(engine, size))
    if "busy" in rounds:
        tell(busy(engine))
    if "batching" in rounds:
        for row in batching(engine):
            tell(row)
    if arguments.out is not None:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()

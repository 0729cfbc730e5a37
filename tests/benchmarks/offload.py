"""What a GPU of less memory gives: `python offload.py CHECKPOINT [--caps none,11GiB] [--misses copied,computed]`.

For each cap and way to treat misses a process of its own, whose allocator may take no more than the cap leaves beside
the CUDA context: one request, greedy, a prompt of 128 tokens and 64 more. Prints one JSON object a line: tokens a
second of the decode steps beside the estimate of the plan and what the link allows for the bytes that went over it, the
most that was taken of the device, and how many of the first tokens are those of the first run. --rest int8 or fp8 is
for all runs but the first, --look-ahead N for those with a cap. --dtype fp16 is the way of sm_75, on any GPU. Engine
and plan are those of `serve --gpu-memory`; no HTTP. Ends with 1 where a run failed, took more than its cap, or copied
experts and drew other tokens than the first one.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # as for the ranks of `serve`
PROMPT_TOKENS, NEW_TOKENS, WARM_TOKENS = 128, 64, 16


def one(checkpoint: str, cap: str, misses: str, rest: str, ahead: str, dtype: str, out: Path) -> None:
    """Writes a row, with the tokens."""
    import random

    import torch
    from batching import Run
    from gptoss_launch.launch.resolve import make_plan
    from gptoss_launch.launch.settings import Settings
    from gptoss_launch.parallel.engine.request import Request, Sampling
    from gptoss_launch.parallel.engine.start import Options, start
    from gptoss_launch.parallel.engine.trace import Trace
    from gptoss_launch.parallel.engine.wire import Message, Tokens
    from gptoss_launch.parallel.planning.machine import parse_size, probe
    from gptoss_launch.parallel.planning.memory import PROCESS
    from gptoss_launch.parallel.planning.offload import known

    cap_bytes = None if cap == "none" else parse_size(cap)
    more: dict[str, Any] = (
        {} if cap_bytes is None else {"gpu_memory_bytes": cap_bytes, "misses": misses, "look_ahead": int(ahead)}
    )
    if rest != "bf16":
        more |= {"rest": rest, "rest_kl": 1e9}  # random weights are far from themselves
    if dtype != "auto":
        more |= {"dtype": dtype}
    plan = make_plan(checkpoint, Settings(context_tokens=8192, ranks=1, dp=1, sequences=4, **more), need_weights=True)
    free, total = torch.cuda.mem_get_info()
    before_bytes = total - free  # of others, and our context
    if cap_bytes is not None:
        torch.cuda.set_per_process_memory_fraction((cap_bytes - PROCESS["cuda"].context_bytes) / total)
    engine, _, ready = start(plan, 0, Options(), Trace(out.with_suffix(".trace")), lambda done, total: None)

    class Kept(Run):
        """Keeps the tokens, too."""

        ids: list[int]
        moved_bytes: list[int]  # so far, as each token came

        def _take(self, front_end: str, message: Message) -> None:
            super()._take(front_end, message)
            if isinstance(message, Tokens):
                self.ids += [token.id for token in message.tokens]
                self.moved_bytes.append(engine.experts().moved_bytes)

    r = random.Random(7)
    prompt = tuple(r.randrange(200_000) for _ in range(PROMPT_TOKENS))
    run = Kept(engine)
    times: dict[str, list[float]] = {}
    for name in ("warm", "timed"):
        run.ids, run.moved_bytes = [], []
        run.ask([Request(name, prompt, NEW_TOKENS, Sampling(temperature=0.0))])
        run.until_idle()
        times[name] = run.came_s[name]
    came_s = times["timed"][WARM_TOKENS:]
    moved_bytes = (run.moved_bytes[-1] - run.moved_bytes[WARM_TOKENS]) / (len(came_s) - 1)  # for each token
    link = known(probe().speeds).link
    free, _ = torch.cuda.mem_get_info()
    row = {
        "bench": "offload",
        "model": Path(checkpoint).name,
        "cap": cap,
        "misses": None if cap_bytes is None else misses,
        "rest": rest,
        "dtype": plan.dtype,
        "kernels": plan.kernels,
        "look_ahead": int(ahead),
        "notes": ready.notes,
        "slots": None if plan.offload == "none" else plan.offload.taken.slots,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "tok_s": round((len(came_s) - 1) / (came_s[-1] - came_s[0]), 2),
        "predicted_tok_s": None if plan.offload == "none" else plan.offload.taken.tok_s,
        "link_bytes_predicted": None if plan.offload == "none" else plan.offload.taken.link_bytes,
        "link_bytes": moved_bytes,
        "link_bound_tok_s": round(link / moved_bytes, 2) if link and moved_bytes else None,
        "load_s": round(ready.load_s, 1),
        "cap_bytes": cap_bytes,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "used_bytes": total - free,
        "before_bytes": before_bytes,
        "expert_counts": vars(engine.experts()),
        "slow_paths": ready.slow_paths,
        "ids": run.ids,
    }
    out.write_text(json.dumps(row), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--caps", default="none,11GiB")
    parser.add_argument("--misses", default="copied,computed")
    parser.add_argument("--look-ahead", default="0", metavar="N", help="of every run with a cap")
    parser.add_argument("--rest", default="bf16", help="of every run but the first")
    parser.add_argument("--dtype", default="auto", help="of every run")
    parser.add_argument("--out", type=Path)
    hidden = ("CAP", "MISSES", "REST", "N", "DTYPE", "FILE")
    parser.add_argument("--one", nargs=6, metavar=hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.checkpoint, *asked.one[:5], Path(asked.one[5]))
        return
    whole: list[int] | None = None
    wrong = 0
    for cap in asked.caps.split(","):
        for misses in asked.misses.split(",") if cap != "none" else ("none",):
            file = Path(f"/tmp/offload-{cap}-{misses}.json")
            file.unlink(missing_ok=True)
            rest = "bf16" if whole is None else asked.rest
            command = [sys.executable, __file__, asked.checkpoint]
            command += ["--one", cap, misses, rest, asked.look_ahead, asked.dtype, str(file)]
            done = subprocess.run(command, check=False, env=os.environ | ALLOCATOR)
            if not file.exists():
                print(json.dumps({"bench": "offload", "cap": cap, "misses": misses, "failed": done.returncode}))
                wrong += 1
                continue
            row = json.loads(file.read_text("utf-8"))
            ids = row.pop("ids")
            whole = whole or ids
            pairs = zip(ids, whole, strict=True)
            row["same_tokens"] = next((at for at, (a, b) in enumerate(pairs) if a != b), len(ids))
            over = row["cap_bytes"] is not None and row["used_bytes"] > row["cap_bytes"]
            other = misses == "copied" and rest == "bf16" and row["same_tokens"] < len(ids)
            wrong += over or other
            print(json.dumps(row), flush=True)
            if asked.out is not None:
                with asked.out.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main()

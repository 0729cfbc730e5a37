"""What a step of training takes on one GPU: `python training.py CHECKPOINT --case CASE [--packs 1,8] [--out FILE]`;
on several, with DeepSpeed: `torchrun --nproc-per-node 2 training.py CHECKPOINT --case full --deepspeed NAME ...`

lora       adapters of rank 32 on attention and experts
lora-120b  adapters of rank 32 on attention and of rank 8 on experts
attention  adapters of rank 16 on attention
full       all weights of the first --layers layers

Packs of --pack-tokens, filled with documents of at most 2,048 tokens, whose lengths are spread as those of real
conversations (log-normal, median 400 tokens, the second half learnt). Tokens are random: speed and memory do not depend
on them, but for how evenly experts are used. With --same-packs every step learns the same documents, so that its loss
falls. The loop is the one that `finetune` runs. Prints one JSON object a line, which --out appends to a file; the first
steps, which compile, are left out of speeds. --cap GIB: torch gets no more memory than a GPU of so much would leave it.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch
from gptoss_launch.launch.finetune_settings import read_deepspeed
from gptoss_launch.parallel.planning.machine import format_size
from gptoss_launch.parallel.planning.spec import Spec, read_config
from gptoss_launch.parallel.training.job import AdapterDtype, Job, OptimizerKind, Recipe
from gptoss_launch.parallel.training.loop import Step, train
from gptoss_launch.parallel.training.order import Mixture, steps_per_epoch
from gptoss_launch.parallel.training.place import read_place
from gptoss_launch.parallel.training.samples import Sample, sample
from gptoss_launch.parallel.training.trainee import load_trainee
from gptoss_launch.parallel.training.world import World, joined
from torch._C._autograd import DeviceType

GIB = 1 << 30
DOCUMENT_TOKENS = 2048
WARM_STEPS = 4
SEED = 0  # of the order in which documents are taken
PROFILED_STEPS = 3  # at the end: one while the profiler begins, one that is recorded, one while it ends
CASES = {"lora": (32, 32), "lora-120b": (32, 8), "attention": (16, 0), "full": (0, 0)}  # ranks of attention and experts
RECIPE = Recipe(
    learning_rate=1e-4,
    schedule="cosine",
    warmup_fraction=0.03,
    floor_fraction=0.1,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.0,
    clip=1.0,
)


class Enough(Exception):
    """Ends the loop after a step, before it writes a checkpoint."""


def documents(spec: Spec, tokens: int, seed: int = 0) -> Iterator[Sample]:
    """Of so many tokens together."""
    r = random.Random(seed)
    while tokens > 0:
        length = min(DOCUMENT_TOKENS, tokens, max(32, round(r.lognormvariate(math.log(400), 0.9))))
        ids = [r.randrange(spec.vocab) for _ in range(length)]
        yield sample(ids, [float(place >= max(1, length // 2)) for place in range(length)])
        tokens -= length


def of_one_step(samples: list[Sample], pack_tokens: int, packs: int, epochs: int) -> list[Sample]:
    """As many of them as a step takes whole, in whichever order epochs have them."""
    lengths = tuple(map(len, samples))

    def whole(count: int) -> bool:
        mixture = Mixture(lengths[:count], (0,) * count, (1.0,))
        return all(steps_per_epoch(mixture, SEED, pack_tokens, packs, epoch) == 1 for epoch in range(epochs))

    return samples[: next(count for count in range(len(samples), 0, -1) if whole(count))]


def first_layers(spec: Spec, layers: int) -> Spec:
    """Of a checkpoint that may have more: what is not asked for is not read."""
    kinds = spec.layer_kinds[:layers]
    return dataclasses.replace(spec, layers=len(kinds), layer_kinds=kinds)


def measure(folder: Path, spec: Spec, packs: int, run: Path, world: World, asked: argparse.Namespace) -> dict[str, Any]:
    attention_rank, expert_rank = CASES[asked.case]
    pack_tokens, steps, profile = asked.pack_tokens, asked.steps, asked.profile
    job = Job(
        model=folder.name,
        checkpoint=str(folder),
        spec=spec,
        mode="full" if asked.case == "full" else "lora",
        attention_rank=attention_rank,
        attention_alpha=32.0,
        expert_rank=expert_rank,
        expert_alpha=32.0,
        dtype="bf16",
        device="cuda",
        sequence_tokens=pack_tokens,
        packs_per_step=packs,
        steps=steps + 1,
        recipe=dataclasses.replace(RECIPE, learning_rate=asked.learning_rate),
        seed=SEED,
        data="random",
        weights=(1.0,),
        save_every=0,
        keep_last=1,
        eval_every=0,
        check_first_loss=False,
        ranks=world.size,
        deepspeed=None if asked.deepspeed is None else read_deepspeed(asked.deepspeed, "bf16"),
        optimizer=asked.optimizer,
        adapter_dtype=asked.adapter_dtype,
        host_layers=asked.host_layers,
    )
    torch.cuda.reset_peak_memory_stats()
    trainee = load_trainee(job, world, None, lambda done, total: None)
    samples = list(documents(spec, packs * (1 if asked.same_packs else steps + 1) * pack_tokens))
    if asked.same_packs:
        samples = of_one_step(samples, pack_tokens, packs, steps + 1)
    seen: list[Step] = []
    used_bytes = []
    schedule = torch.profiler.schedule(wait=steps - PROFILED_STEPS, warmup=1, active=1, repeat=1)
    profiler = torch.profiler.profile(schedule=schedule, record_shapes=True) if profile else nullcontext()

    def report(step: Step) -> None:
        seen.append(step)
        free, total = torch.cuda.mem_get_info()  # all that is taken on the device, its context included
        used_bytes.append(total - free)
        if isinstance(profiler, torch.profiler.profile):
            profiler.step()
        if step.step == steps and world.size == 1:
            raise Enough

    passes = itertools.count(1)

    def stop() -> bool:
        """Asked on every rank, in every step."""
        if next(passes) > steps:
            raise Enough
        return False

    said: list[str] = []
    with profiler, suppress(Enough):
        train(job, run, world, trainee, samples, [], stop, report, said.append)
    if not world.first:
        return {}
    warm = seen[asked.warm :]
    if isinstance(profiler, torch.profiler.profile):
        warm = warm[:-PROFILED_STEPS]
        print_profile(profiler, statistics.median(step.step_s for step in warm))
    tokens = sum(step.tokens for step in warm)
    return {
        "bench": f"train-{asked.case}",
        "model": folder.name,
        "layers": spec.layers,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "document_tokens": DOCUMENT_TOKENS,
        "pack_tokens": pack_tokens,
        "packs_per_step": packs,
        "steps": len(warm),
        "tok_s": tokens / sum(step.step_s for step in warm),
        "step_s_median": statistics.median(step.step_s for step in warm),
        "reserved_bytes": max(step.memory_bytes for step in seen),
        "used_bytes": max(used_bytes),
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # of this rank, at most; KiB on Linux
        "mfu": statistics.median(step.mfu or 0.0 for step in warm),  # planning.flops; 0: no peak is known
        "ranks": world.size,
        "deepspeed": asked.deepspeed,
        "optimizer": asked.optimizer,
        "adapter_dtype": asked.adapter_dtype,
        "host_layers": asked.host_layers,
        "cap_bytes": asked.cap * GIB if asked.cap else None,
        "learning_rate": asked.learning_rate,
        "same_packs": asked.same_packs,
        "trained_values": sum(trainee.values.values()),
        "losses": [step.loss for step in seen],
        "said": said,
    }


def print_profile(profiler: torch.profiler.profile, step_s: float) -> None:
    """What one step's time goes to. step_s: of a step that no profiler slows."""
    work, calls = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    spans: list[tuple[float, float]] = []
    for event in profiler.events() or ():
        if getattr(event, "is_user_annotation", False) or event.name.startswith("ProfilerStep"):
            continue
        if event.device_type == DeviceType.CUDA:
            work[event.name].append(event.time_range.elapsed_us())
            spans.append((event.time_range.start, event.time_range.end))
        else:
            calls[event.name].append(event.self_cpu_time_total)
    busy_us = end = 0.0
    gaps = []
    for begin, until in sorted(spans):
        if end:
            gaps.append(max(0.0, begin - end))
        busy_us += max(0.0, until - max(begin, end))
        end = max(end, until)
    step_us = step_s * 1e6
    print(f"step {step_us / 1e3:.2f} ms without profiler: {busy_us / 1e3:.2f} ms of kernels and copies, the rest gaps")
    if spans:
        over = [gap for gap in gaps if gap > 20]
        whole_ms, over_ms = (end - min(spans)[0]) / 1e3, sum(over) / 1e3
        print(f"profiled: {whole_ms:.2f} ms of {len(spans)} kernels, {len(over)} gaps over 20 us take {over_ms:.2f} ms")
    for title, table, rows in (("on the GPU", work, 60), ("on the host (itself)", calls, 40)):
        print(
            f"{title}: {sum(map(sum, table.values())) / 1e3:.2f} ms\n{'ms':>9} {'share':>6} {'count':>6} {'us each':>9}"
        )
        for name, times in sorted(table.items(), key=lambda item: -sum(item[1]))[:rows]:
            total = sum(times)
            print(f"{total / 1e3:9.3f} {total / step_us:6.1%} {len(times):6} {total / len(times):9.1f}  {name[:120]}")
    print("on the GPU by operation and shapes:")
    for one in sorted(profiler.key_averages(group_by_input_shape=True), key=lambda one: -one.self_device_time_total)[
        :40
    ]:
        if one.self_device_time_total:
            total_ms = one.self_device_time_total / 1e3
            print(f"{total_ms:9.3f} {one.count:6}  {one.key[:60]} {str(one.input_shapes)[:140]}")
    sys.stdout.flush()


def cap_memory(cap_bytes: int) -> None:
    """Of all that this process may take on the device, its context included."""
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((cap_bytes - (total - free)) / total)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--case", choices=CASES, default="lora")
    parser.add_argument("--pack-tokens", type=int, default=2048)
    parser.add_argument("--packs", default="1,8")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=WARM_STEPS, help="first steps that are left out")
    parser.add_argument("--layers", type=int, default=6, help="of --case full: the first of the checkpoint")
    parser.add_argument("--learning-rate", type=float, default=RECIPE.learning_rate)
    parser.add_argument("--same-packs", action="store_true", help="learn the same documents in every step")
    parser.add_argument("--deepspeed", metavar="NAME", help="a configuration of configs/deepspeed, or a file")
    parser.add_argument("--optimizer", choices=get_args(OptimizerKind), default="adamw")
    parser.add_argument("--adapter-dtype", choices=get_args(AdapterDtype), default="fp32")
    parser.add_argument("--host-layers", type=int, default=0)
    parser.add_argument("--cap", type=float, metavar="GIB", help="GPU memory that may be taken")
    parser.add_argument("--profile", action="store_true", help="print what a step's time goes to")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    least = asked.warm + 1 + (PROFILED_STEPS if asked.profile else 0)
    if asked.steps < least:
        parser.error(f"--steps is at least {least}")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as finetune sets it
    with joined(read_place(os.environ), "cuda", asked.deepspeed is not None) as world:
        if asked.cap:
            cap_memory(round(asked.cap * GIB))
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            run_cases(asked, world, Path(name))
        world.wait()


def run_cases(asked: argparse.Namespace, world: World, scratch: Path) -> None:
    folder, spec = asked.checkpoint, read_config(asked.checkpoint / "config.json")
    if asked.case == "full":
        spec = first_layers(spec, asked.layers)
    for packs in map(int, asked.packs.split(",")):
        run = scratch / "run"
        run.mkdir()
        row = measure(folder, spec, packs, run, world, asked)
        shutil.rmtree(run)
        torch.cuda.empty_cache()
        if not world.first:
            continue
        print(json.dumps(row), flush=True)
        sizes = " reserved, ".join(format_size(row[key]) for key in ("reserved_bytes", "used_bytes"))
        speed = f"{row['tok_s']:,.0f} tokens/s, {row['mfu']:.1%} of peak"
        print(f"{row['bench']} {packs} x {asked.pack_tokens}: {speed}, {sizes} used", flush=True)
        if asked.out is not None:
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

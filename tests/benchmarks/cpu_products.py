"""How fast the C++ products of a CPU are, at the true width of 20b: both of its experts, and a quarter of its head in
bf16 and int8 beside torch's in fp32; all beside what the memory gives.

    python tests/benchmarks/cpu_products.py [--tokens 1,2,8,64] [--threads N] [--seconds 20]

Each round reads 1 GiB (all threads, nothing computed), then runs every case once on experts that were not used before,
so that no cache helps; rounds follow one another until the time is over, and the best of each counts, as others may use
the machine. The share is that of the bytes of weights in use, as they are kept, over the best read. Prints JSON lines.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable

import torch
from gptoss_launch.parallel.kernels import cpu_build, cpu_products
from gptoss_launch.parallel.kernels.cpu_products import CpuExperts, CpuLinear, Threads
from gptoss_launch.parallel.kernels.experts import Packed
from gptoss_launch.parallel.kernels.experts import experts as plain_experts
from gptoss_launch.parallel.kernels.weight_only import narrowed
from torch import Tensor

HIDDEN, INNER, HELD, CHOSEN, LIMIT = 2880, 2880, 32, 4, 7.0  # of 20b
HEAD_ROWS = 201088 // 4
READ_BYTES = 1 << 30


def product(outputs: int, columns: int) -> Packed:
    size = (HELD, outputs, columns // 32)
    blocks = torch.randint(0, 256, (*size, 16), dtype=torch.uint8)
    return Packed(blocks, torch.randint(117, 123, size, dtype=torch.uint8), torch.randn(size[:2]))


def routes(tokens: int, turn: int) -> Tensor:
    """At one token four experts that follow on those of the turn before; random ones for more."""
    if tokens == 1:
        return (torch.arange(CHOSEN) + CHOSEN * turn)[None] % HELD
    return torch.rand((tokens, HELD)).topk(CHOSEN).indices


def seconds(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,2,8,64")
    parser.add_argument("--threads", type=int, default=cpu_products.thread_count())
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    level = cpu_build.level_for(cpu_build.cpu_flags())
    threads = Threads(cpu_build.library(cpu_products.SOURCE, level), arguments.threads)
    ways = {"exact": CpuExperts(threads)}
    if threads.library.has_int8():
        ways["int8"] = CpuExperts(threads, int8=True)
    gate_up, down = product(2 * INNER, HIDDEN), product(HIDDEN, INNER)
    expert_bytes = sum(part[0].nbytes for one in (gate_up, down) for part in (one.blocks, one.scales))
    other = torch.zeros(READ_BYTES, dtype=torch.uint8).fill_(1)
    wide_OI = torch.randn((HEAD_ROWS, HIDDEN))
    bf16_OI, int8_OI = (narrowed(wide_OI, codes, torch.float32) for codes in (torch.bfloat16, torch.int8))
    linear = CpuLinear(threads)
    heads = {
        "head": (lambda x_TH: linear(x_TH, bf16_OI), bf16_OI.codes_OI.nbytes),
        "head, int8": (lambda x_TH: linear(x_TH, int8_OI), int8_OI.codes_OI.nbytes),
        "head, torch": (lambda x_TH: torch.nn.functional.linear(x_TH, wide_OI), wide_OI.nbytes),
    }
    torch.set_num_threads(arguments.threads)

    def keep(name: str, tokens: int, took_s: float, read_bytes: int) -> None:
        kept = best.get((name, tokens))
        if kept is None or read_bytes / took_s > kept[1] / kept[0]:
            best[name, tokens] = took_s, read_bytes

    cases = [int(count) for count in arguments.tokens.split(",")]

    read_s, best, rounds = float("inf"), {}, 0
    ends_s = time.perf_counter() + arguments.seconds
    while time.perf_counter() < ends_s or rounds < 2:
        read_s = min(read_s, seconds(lambda: threads.read(other)))
        for tokens in cases:
            x_TH, weights_TX = torch.randn((tokens, HIDDEN)), torch.rand((tokens, CHOSEN))
            for turn, (name, run) in enumerate(ways.items()):
                experts_TX = routes(tokens, 2 * rounds + turn)
                given = (x_TH, weights_TX, experts_TX, gate_up, down, 0, LIMIT)
                took_s = seconds(lambda run=run, given=given: run(*given))
                keep(name, tokens, took_s, len(experts_TX.unique()) * expert_bytes)
            for name, (run, read_bytes) in heads.items():
                keep(name, tokens, seconds(lambda run=run, x_TH=x_TH: run(x_TH)), read_bytes)
        rounds += 1

    read_gb_s = READ_BYTES / read_s / 1e9
    about = {"cpu": platform.processor() or platform.machine(), "level": level.name, "threads": arguments.threads}
    about |= {"load": os.getloadavg()[0], "rounds": rounds, "read_gb_s": round(read_gb_s, 2)}
    for (name, tokens), (took_s, read_bytes) in sorted(best.items()):
        row = {"way": name, "tokens": tokens, "ms": round(took_s * 1e3, 2)}
        row |= {"gb_s": round(read_bytes / took_s / 1e9, 2), "share": round(read_bytes / took_s / 1e9 / read_gb_s, 3)}
        products = HEAD_ROWS * HIDDEN if name in heads else CHOSEN * 3 * HIDDEN * INNER  # of a token
        row |= {"gflop_s": round(2 * tokens * products / took_s / 1e9, 1)}
        if tokens == 1 and name in ways:
            x_TH, weights_TX, experts_TX = torch.randn((1, HIDDEN)), torch.rand((1, CHOSEN)), routes(1, 0)
            wanted = plain_experts(x_TH, weights_TX, experts_TX, gate_up, down, 0, LIMIT)
            found = ways[name](x_TH, weights_TX, experts_TX, gate_up, down, 0, LIMIT)
            row["error"] = float((found - wanted).norm() / wanted.norm())
        print(json.dumps(about | row), flush=True)


if __name__ == "__main__":
    main()

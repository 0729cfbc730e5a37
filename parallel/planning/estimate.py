"""How long a decode step may take on one layout: an estimate, made to compare layouts, not to promise a speed.

    step = bytes that the busiest rank reads / what of the bandwidth kernels reach
           + what layers and sequences take besides + 2 all-reduces a layer

Counts weights and KV cache, and nothing of prefill. Works through the shard table for any mesh. Knows nothing of
whether a layout fits. The tables below are datasheets and measurements with their sources; what is not in them is
None, never a guess.
"""

from dataclasses import dataclass
from functools import cache
from math import comb, prod
from typing import Literal

from .machine import Link
from .memory import flagged_limit_bytes, is_rest, stored_bytes
from .pages import local_kv_heads
from .plan import DTYPE_BYTES, DType, Kept, Kernels, Workload
from .shards import Mesh, part, table
from .spec import Spec

# Tokens a step that a workload is judged at, for each replica: one stream, or many.
BATCH_TOKENS: dict[Workload, int] = {"latency": 1, "throughput": 64}
DECODE_CONTEXT_TOKENS = 8192  # tokens of KV cache that each of them reads, where the context is as long

# Memory bandwidth in bytes/s by the name that NVML gives, less its maker: NVIDIA's datasheets and product pages.
BANDWIDTH: dict[str, float] = {
    "A10": 600e9,
    "A10G": 600e9,
    "A30": 933e9,
    "A40": 696e9,
    "A100-PCIE-40GB": 1555e9,
    "A100-SXM4-40GB": 1555e9,
    "A100 80GB PCIe": 1935e9,
    "A100-SXM4-80GB": 2039e9,
    "B200": 8000e9,
    "GeForce RTX 2080 Ti": 616e9,
    "GeForce RTX 3060": 360e9,
    "GeForce RTX 3080": 760e9,
    "GeForce RTX 3090": 936e9,
    "GeForce RTX 3090 Ti": 1008e9,
    "GeForce RTX 4060 Laptop GPU": 256e9,
    "GeForce RTX 4080": 716.8e9,
    "GeForce RTX 4090": 1008e9,
    "GeForce RTX 4090 Laptop GPU": 576e9,
    "GeForce RTX 5090": 1792e9,
    "H100 80GB HBM3": 3350e9,
    "H100 NVL": 3900e9,
    "H100 PCIe": 2000e9,
    "H200": 4800e9,
    "H200 NVL": 4800e9,
    "L4": 300e9,
    "L40": 864e9,
    "L40S": 864e9,
    "RTX 6000 Ada Generation": 960e9,
    "RTX A5000": 768e9,
    "RTX A6000": 768e9,
    "T4": 320e9,
}
READ_SHARE = 0.93  # of the datasheet that a pure read reaches: 4.45 of 4.8 TB/s, measured on an H200


@dataclass(frozen=True)
class Pace:
    """What kernels make of a memory. experts: share of READ_SHARE's bandwidth that they read experts at. layer_s: what
    a layer takes besides its bytes; sequence_s: each sequence of it, attention's programs and the draw above all."""

    experts: float
    layer_s: float
    sequence_s: float

    def read_s(self, bytes_per_s: float, others_bytes: float, experts_bytes: float) -> float:
        return others_bytes / bytes_per_s + experts_bytes / (bytes_per_s * self.experts)

    def besides_s(self, layers: int, sequences: int) -> float:
        return layers * (self.layer_s + sequences * self.sequence_s)


# triton: fitted to steps of 1 to 128 sequences of 20b on one H200 and on two, 2026-11-30, from which it is off by at
# most 7 % (tests/planning/test_estimate.py). plain: torch, some hundred kernels a layer that are started one by one,
# 69 ms for a step of one token in fp16 on an H200; more sequences were not measured.
PACE = {"triton": Pace(0.68, 14e-6, 0.75e-6), "plain": Pace(1.0, 2.7e-3, 0.0)}


@dataclass(frozen=True)
class LinkCost:
    """One all-reduce inside a CUDA graph: latency_s with two ranks, rank_s more for each further rank, and the bytes
    that each rank sends at bytes_per_s, of which `all_reduce_s` knows how many they are."""

    latency_s: float
    rank_s: float
    bytes_per_s: float


# nvlink: the fastest of NCCL, one-shot and two-shot over symmetric memory on two H200, 9.1 us at 369 KB and 12.5 us at
# 1.0 MB in a step (tests/benchmarks/all_reduce.py at 9832f1e, 2026-11-29) and 15.7 us at 2.9 MB alone; by number of
# ranks, one-shot on H100s: 3.9 us with 2 and 5.7 us with 8 ranks (sgl-project/sglang pull request 2904).
# pcie: NCCL on four GPUs under one switch, 20.3 us at 8 KB and 83.5 us at 384 KB, in haohervchb/sglang-V100 pull
# request 2; a ring has two hops more for each rank, 1 us each by NCCL's own tuning table (src/graph/tuning.cc).
# network, between nodes: NCCL on four nodes over RoCE, 54 to 64 us at 48 KB, in local-inference-lab/b12x pull request
# 295; a ring's two hops more for each rank are 3 us each by the same tuning table. Plain TCP takes longer.
LINK: dict[Link | Literal["network"], LinkCost] = {
    "nvlink": LinkCost(latency_s=8e-6, rank_s=0.4e-6, bytes_per_s=300e9),
    "pcie": LinkCost(latency_s=16e-6, rank_s=2e-6, bytes_per_s=9e9),
    "network": LinkCost(latency_s=41e-6, rank_s=6e-6, bytes_per_s=12.5e9),
}
# Small messages over nvlink, by words that carry flags (`kernels.triton_all_reduce`): 1.8 us at 5,760 B and 3.5 us at
# 259,200 B in the same run. Not measured with more ranks, for which rank_s is taken over; counted alike before sm_80,
# where there is no such kernel.
FLAGGED = LinkCost(latency_s=1.7e-6, rank_s=0.4e-6, bytes_per_s=150e9)


@dataclass(frozen=True)
class Step:
    """One decode step of one replica, of `batch_tokens` sequences; read_bytes are those of the busiest rank."""

    batch_tokens: int
    read_bytes: float
    read_s: float
    besides_s: float
    reduces: int
    reduce_s: float  # each

    @property
    def seconds(self) -> float:
        return self.read_s + self.besides_s + self.reduces * self.reduce_s


def bandwidth(gpu_name: str) -> float | None:
    """Bytes/s that a GPU of this name reads from its memory; None if it is not in the table."""
    datasheet = BANDWIDTH.get(gpu_name.removeprefix("NVIDIA ").removeprefix("Tesla "))
    return None if datasheet is None else datasheet * READ_SHARE


def decode_step(
    spec: Spec,
    mesh: Mesh,
    dtype: DType,
    bytes_per_s: float,
    link: Link | Literal["network"],
    batch_tokens: int,
    context_tokens: int,
    kept: Kept = None,
    kernels: Kernels = "triton",
) -> Step:
    """The estimate for `mesh`, whose ranks each read bytes_per_s at most and are joined by `link`."""
    others, experts = _read_bytes(spec, mesh, dtype, batch_tokens, context_tokens, kept)
    pace = PACE[kernels]
    return Step(
        batch_tokens=batch_tokens,
        read_bytes=others + experts,
        read_s=pace.read_s(bytes_per_s, others, experts),
        besides_s=pace.besides_s(spec.layers, batch_tokens),
        reduces=2 * spec.layers if mesh.ranks > 1 else 0,
        reduce_s=all_reduce_s(link, mesh.ranks, batch_tokens * spec.hidden * DTYPE_BYTES[dtype]),
    )


def all_reduce_s(link: Link | Literal["network"], ranks: int, message_bytes: int) -> float:
    """Seconds of one all-reduce of message_bytes; 0 for one rank.

    Each rank sends a small message over nvlink to every other one, and otherwise 2 (R - 1) / R of it.
    """
    if ranks == 1:
        return 0.0
    if link == "nvlink" and message_bytes <= flagged_limit_bytes(ranks):
        cost, sent_bytes = FLAGGED, (ranks - 1) * message_bytes
    else:
        cost, sent_bytes = LINK[link], 2 * (ranks - 1) / ranks * message_bytes
    return cost.latency_s + (ranks - 2) * cost.rank_s + sent_bytes / cost.bytes_per_s


def read_bytes(
    spec: Spec, mesh: Mesh, dtype: DType, batch_tokens: int, context_tokens: int, kept: Kept = None
) -> float:
    """Bytes of weights and KV cache that the busiest rank reads in one step of batch_tokens sequences, judged at no
    more than DECODE_CONTEXT_TOKENS each."""
    return sum(_read_bytes(spec, mesh, dtype, batch_tokens, context_tokens, kept))


def _read_bytes(
    spec: Spec, mesh: Mesh, dtype: DType, batch_tokens: int, context_tokens: int, kept: Kept
) -> tuple[int, float]:
    """Of experts the second."""
    dense, experts = _weight_bytes(spec, mesh, dtype, batch_tokens, kept)
    seen = min(context_tokens, DECODE_CONTEXT_TOKENS)
    return dense + batch_tokens * kv_bytes(spec, mesh, DTYPE_BYTES[dtype], seen), experts


def weight_bytes(spec: Spec, mesh: Mesh, dtype: DType, batch_tokens: int, kept: Kept = None) -> float:
    """Bytes of weights that the busiest rank reads in one step of batch_tokens tokens: all but the embedding, and of
    the experts the expected number of different ones.

    Rank 0 is the busiest of those that hold equally much, as larger parts come first. Of the embedding only the rows
    of the batch are read, which count for nothing here.
    """
    return sum(_weight_bytes(spec, mesh, dtype, batch_tokens, kept))


def _weight_bytes(spec: Spec, mesh: Mesh, dtype: DType, batch_tokens: int, kept: Kept) -> tuple[int, float]:
    """Of experts the second."""
    dense, experts = 0, 0
    for row in table(spec):
        size = stored_bytes(row, mesh, 0, dtype, kept)
        if any(cut.axis == "ep" for cut in row.cuts):
            experts += size
        elif row.name != "embed":
            dense += size
    held = _held(spec.experts, mesh.ep)[0]
    active = busiest_experts(spec.experts, spec.experts_per_token, batch_tokens, mesh.ep)
    return dense, experts * active / held


def unpacked_bytes(spec: Spec, dtype: DType) -> int:
    """What weights of 8 bits cost besides, for each token, where they are dequantized first: written and read again,
    for fp16 in fp32 before. One rank."""
    rows = [row for row in table(spec) if is_rest(row) and row.name != "embed"]
    element = DTYPE_BYTES[dtype] + (DTYPE_BYTES["fp32"] if dtype == "fp16" else 0)
    return 2 * sum(prod(row.shape) for row in rows) * element


def kv_bytes(spec: Spec, mesh: Mesh, element_bytes: int, context_tokens: int) -> int:
    """Bytes of KV cache that rank 0 reads to decode one token of a sequence that is context_tokens long: full layers
    see all of it, window layers their window."""
    window = min(context_tokens, spec.window_tokens)
    tokens = spec.layers_of("full") * context_tokens + spec.layers_of("window") * window
    return tokens * 2 * local_kv_heads(spec, mesh, 0) * spec.head_dim * element_bytes


def expert_load(spec: Spec, mesh: Mesh, batch_tokens: int) -> float:
    """Whole experts a layer that the busiest rank is expected to read: experts it holds times its share of a width."""
    blocks = spec.intermediate_blocks
    width = part(blocks, 1, 0, mesh.etp).stop / blocks
    return busiest_experts(spec.experts, spec.experts_per_token, batch_tokens, mesh.ep) * width


@cache
def busiest_experts(experts: int, chosen: int, tokens: int, ep: int) -> float:
    """Expected number of different experts that `tokens` tokens need on the position of `ep` that needs the most.

    Each token chooses `chosen` of `experts`, all choices alike, tokens independent of one another: a recorded routing
    is more uneven. Exact: the number of different experts is a Markov chain over tokens, and given it every set of so
    many is as likely, so that P(busiest <= m) is the share of such sets with at most m in each position's part.
    """
    different = [1.0] + [0.0] * experts  # probability of so many different experts
    for _ in range(tokens):
        after = [0.0] * (experts + 1)
        for count, probability in enumerate(different):
            if probability:
                for new in range(min(chosen, experts - count) + 1):
                    ways = comb(experts - count, new) * comb(count, chosen - new)
                    after[count + new] += probability * ways / comb(experts, chosen)
        different = after
    held = _held(experts, ep)
    expected = 0.0
    for most in range(held[0]):  # the expectation is the sum of P(busiest > most)
        sets = [1.0]  # how many sets of so many experts have at most `most` in each part
        for size in held:
            sets = _product(sets, [float(comb(size, taken)) for taken in range(min(most, size) + 1)])
        within = sum(p * count / comb(experts, n) for n, (p, count) in enumerate(zip(different, sets, strict=False)))
        expected += 1.0 - within
    return expected


def _held(experts: int, ep: int) -> list[int]:
    """Experts at each position of the axis, the largest first."""
    slices = [part(experts, 1, index, ep) for index in range(ep)]
    return [one.stop - one.start for one in slices]


def _product(a: list[float], b: list[float]) -> list[float]:
    """Of two polynomials, by coefficients."""
    product = [0.0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    return product

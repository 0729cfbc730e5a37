"""Predicted bytes by part for one rank: weights, KV cache, workspace, communication, the process itself.

Works for any rank of any mesh through the shard table. Knows nothing of machines or of how a layout is chosen.
"""

from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import Literal

from .pages import local_kv_heads, page_bytes, pool_pages
from .plan import DTYPE_BYTES, DType, Kept, Kernels, KvDType, RankMemory
from .shards import Mesh, Row, local_shape, table
from .spec import Spec

Device = Literal["cuda", "cpu"]

SCORES_LIMIT_BYTES = 256 << 20  # attention goes over queries in tiles whose scores stay under this
DRAW_LIMIT_BYTES = 256 << 20  # the draw goes over rows of logits in tiles that take no more, but one row at a time
DENSE_TILE_BYTES = 16 << 20  # weights of 8 bits are dequantized by so much at a time, where products need it
# Of those weights as they were, besides: a layer's attention and a tile of the head, while both are compared.
COMPARED_BYTES = 64 << 20
DRAW_ELEMENT_BYTES = (24, 32)  # of a row, for each of its logits: raced in fp32, in fp64; measured 22 and 26


@dataclass(frozen=True)
class ProcessCost:
    """What one rank's process takes besides tensors."""

    context_bytes: int  # CUDA context, loaded kernels
    nccl_bytes: int  # NCCL's own buffers on the device, in a replica of several ranks
    host_bytes: int  # Python, torch and its libraries


PROCESS: dict[Device, ProcessCost] = {
    "cuda": ProcessCost(context_bytes=690 << 20, nccl_bytes=840 << 20, host_bytes=3 << 30),  # seen on two H200
    "cpu": ProcessCost(context_bytes=0, nccl_bytes=0, host_bytes=1 << 30),
}

# CUDA graphs, on an H200 for 20b: those of decodes that are captured at the start take 158 MiB; of those of steps with
# prompts the largest 200, of which most are counted as what lives in it, and the 28 smaller ones, in its memory, 30.
DECODE_GRAPHS_BYTES = 192 << 20
SMALLER_GRAPHS_BYTES = 32 << 20
SYMMETRIC_BUFFERS = 1  # of a whole step's hidden states
FLAGGED_BYTES = 2 << 20  # besides, for messages with flags
INSIDE_BYTES = 1 << 20  # and for those inside two products: of 4,096 values each among eight ranks

# How many copies of a thing live at the same time at the worst moment, counted over the plain operations in kernels/ by
# following every tensor of a step at the published width: 2048 tokens of 2048, 512 of 32768 and 64 of 131072.
SCORE_TILES = 2  # scores, and once more where a product reorders them
WIDE_KEY_COPIES = 2  # a sequence's keys and values, in fp32
DEQUANTIZED_COPIES = 3  # last matrix, looked-up values, their product with the scales
INNER_COPIES = 6  # gate_up's product counts two; gate, up, sigmoid, result
EXPERT_ROWS_COPIES = 2  # rows of one expert and its output
HIDDEN_COPIES = 3  # normalised input, attention's output and what is added to the residual
WIDE_HIDDEN_COPIES = 3  # norm: value, square, product; experts: the sum and what is added to it
QKV_COPIES = 2  # the product and what is rotated
ALLOCATOR_SLACK = 1.25  # what torch's allocator holds besides, with expandable segments: a guess on the safe side

KEPT_WIDE = ("norm", "attn_norm", "mlp_norm", "sinks")  # kept in fp32: few bytes, and their readers compute so
WIDE_BYTES = 4  # fp32
CODE_BYTES = {"bf16": 2, "fp8": 1, "int8": 1}
INDEX_BYTES = 4  # int32, for one byte of packed weights while it is looked up
TABLE_ENTRY_BYTES = 4  # int32 page numbers
COUNT_BYTES = 2  # int16: how often a token stands in an answer, and whether it does in the prompt
CUBLAS_BYTES = 33 << 20  # its workspace, which torch allocates with the first product, seen on an H200


def stored_dtype(row: Row, dtype: DType) -> DType | None:
    """In which dtype a rank keeps `row` where `dtype` is the plan's: packed experts (U8) as they are, for which None
    stands; norms and sinks in fp32 at least; the rest in the plan's."""
    if row.dtype == "U8":
        return None
    is_wide = row.name.split(".")[-1] in KEPT_WIDE and DTYPE_BYTES[dtype] < WIDE_BYTES
    return "fp32" if is_wide else dtype


def stored_element_bytes(row: Row, dtype: DType) -> int:
    kept = stored_dtype(row, dtype)
    return 1 if kept is None else DTYPE_BYTES[kept]


def is_rest(row: Row) -> bool:
    """Whether `kept` says what `row` is kept in: the matrices that are neither experts nor routers."""
    return row.dtype != "U8" and len(row.shape) == 2 and not row.by_expert


def stored_bytes(row: Row, mesh: Mesh, rank: int, dtype: DType, kept: Kept) -> int:
    """What `rank` keeps of `row`."""
    shape = local_shape(row, mesh, rank)
    if kept is not None and is_rest(row):
        return prod(shape) * CODE_BYTES[kept] + shape[0] * WIDE_BYTES  # codes, and a scale for each row
    return prod(shape) * stored_element_bytes(row, dtype)


@cache
def weights_bytes(spec: Spec, mesh: Mesh, rank: int, dtype: DType, kept: Kept = None) -> int:
    """Sum over the shard table of this rank's elements as they are stored."""
    return sum(stored_bytes(row, mesh, rank, dtype, kept) for row in table(spec))


@dataclass(frozen=True)
class Room:
    """What a rank is made for. context_tokens: the longest sequence. sequences: that run at the same time. kv_tokens:
    of all of them together. step_tokens: of one step."""

    context_tokens: int
    sequences: int
    kv_tokens: int
    page_tokens: int
    step_tokens: int


def rows_bytes(spec: Spec, mesh: Mesh, rank: int, room: Room) -> int:
    """What is kept for every sequence that may run, beside its pages: two page tables, counts of its answer's tokens,
    and a bit for each token that a grammar allows."""
    tables = 2 * -(-room.context_tokens // room.page_tokens) * TABLE_ENTRY_BYTES
    counts = _widths(spec, mesh, rank).vocab * COUNT_BYTES
    return (room.sequences + 1) * (tables + counts + spec.vocab // 8)


def workspace_bytes(
    spec: Spec,
    mesh: Mesh,
    rank: int,
    dtype: DType,
    residual_dtype: DType,
    kernels: Kernels,
    room: Room,
    prompts: int,
    kept: Kept = None,
) -> int:
    """Most bytes that live during a step besides weights, KV and graphs. prompts: `prompt_bytes`, 0 if they live in
    graphs; before there are any, prompts take their room.

    What is kept for each sequence, with Triton's kernels the workspace of cuBLAS, and, times the allocator's slack, the
    larger of two steps: one of prompts, and a token of every sequence, beside the head: logits of every sequence, again
    in fp32 where penalties or masks change them, and a tile of the draw. Where the rest has 8 bits, COMPARED_BYTES
    besides.
    """
    element, here = DTYPE_BYTES[dtype], _widths(spec, mesh, rank)
    draw = here.vocab * DRAW_ELEMENT_BYTES[dtype == "fp64"]
    head = room.sequences * here.vocab * (element + WIDE_BYTES)
    head += max(draw, min(DRAW_LIMIT_BYTES, room.sequences * draw))
    passing = max(prompts, room.sequences * spec.hidden * _lasting_bytes(dtype, residual_dtype) + head)
    slack = 1.0 if kernels == "triton" else ALLOCATOR_SLACK
    cublas = CUBLAS_BYTES if kernels == "triton" else 0
    unpacked = COMPARED_BYTES if kept in ("fp8", "int8") else 0
    return rows_bytes(spec, mesh, rank, room) + cublas + unpacked + ceil(passing * slack)


def prompt_bytes(
    spec: Spec, mesh: Mesh, rank: int, dtype: DType, residual_dtype: DType, kernels: Kernels, room: Room
) -> int:
    """Most bytes that live during a step of T = step_tokens tokens of prompts, of C context_tokens: hidden states, H
    wide, beside the largest of (attention, experts, norm). For the plain operations in kernels/:
      hidden     T x H x (2 residual + HIDDEN_COPIES x compute)
      attention  SCORE_TILES x min(limit, heads x T x C x fp32), keys and values of C tokens, q, k, v of T tokens
      experts    one expert's larger matrix (gate_up) DEQUANTIZED_COPIES times, its bytes as indexes, T rows inside
      norm       WIDE_HIDDEN_COPIES x T x H x fp32
    The CPU's own experts take less, but where they cannot be compiled the plain ones stand in for them. Triton's
    kernels keep no scores and no dequantized weights:
      attention  q, k, v of T tokens, attention's output
      experts    rows in their order, and for each chosen expert of a token what is inside and its output
    """
    element, step_tokens, context_tokens = DTYPE_BYTES[dtype], room.step_tokens, room.context_tokens
    here, rows = _widths(spec, mesh, rank), step_tokens * spec.hidden
    scores = here.q // spec.head_dim * step_tokens * context_tokens * WIDE_BYTES
    attention = (
        SCORE_TILES * min(SCORES_LIMIT_BYTES, scores)
        + context_tokens * here.kv * WIDE_KEY_COPIES * WIDE_BYTES
        + step_tokens * (here.q + 2 * here.kv) * QKV_COPIES * element
    )
    matrix = here.gate_up * spec.hidden
    norm = rows * WIDE_HIDDEN_COPIES * WIDE_BYTES
    experts = (
        matrix * DEQUANTIZED_COPIES * element
        + matrix // 2 * INDEX_BYTES
        + step_tokens * here.gate_up // 2 * INNER_COPIES * element
        + rows * EXPERT_ROWS_COPIES * element
        + norm
    )
    if kernels == "triton":
        attention = step_tokens * (2 * here.q + 2 * here.kv) * element
        pairs = step_tokens * spec.experts_per_token
        experts = (rows + pairs * (here.gate_up // 2 + spec.hidden)) * element
        norm = 0
    return rows * _lasting_bytes(dtype, residual_dtype) + max(attention, experts, norm)


def _lasting_bytes(dtype: DType, residual_dtype: DType) -> int:
    """Of one number of a hidden state."""
    return 2 * DTYPE_BYTES[residual_dtype] + HIDDEN_COPIES * DTYPE_BYTES[dtype]


def prompt_graphs_bytes(spec: Spec, dtype: DType, room: Room, prompts: int) -> int:
    """Of CUDA graphs of steps with prompts: what lives in the largest, the hidden states that it ends with, something
    for each of the others. Beside the workspace, as a graph's memory is its own."""
    return prompts + room.step_tokens * spec.hidden * DTYPE_BYTES[dtype] + SMALLER_GRAPHS_BYTES


def communication_bytes(spec: Spec, mesh: Mesh, device: Device, dtype: DType, step_tokens: int) -> int:
    """NCCL's buffers and those of symmetric memory; 0 for one rank, and on the CPU, where gloo's are small."""
    if mesh.ranks == 1 or device == "cpu":
        return 0
    steps_bytes = SYMMETRIC_BUFFERS * step_tokens * spec.hidden * DTYPE_BYTES[dtype]
    return PROCESS[device].nccl_bytes + steps_bytes + FLAGGED_BYTES + INSIDE_BYTES


def flagged_limit_bytes(ranks: int) -> int:
    """The largest message that FLAGGED_BYTES have room for: 256 KiB among two ranks, 64 KiB among eight. A message of
    each rank lies there in two places, and its flags take as much once more."""
    return FLAGGED_BYTES // (4 * ranks)


def rank_memory(
    spec: Spec,
    mesh: Mesh,
    rank: int,
    device: Device,
    dtype: DType,
    residual_dtype: DType,
    kv_dtype: KvDType,
    kernels: Kernels,
    room: Room,
    kept: Kept = None,
    prompt_graphs: bool = True,
) -> RankMemory:
    """All parts of rank `rank` of a replica. prompt_graphs: whether steps with prompts are CUDA graphs, if any are."""
    given = spec, mesh, rank, dtype, residual_dtype, kernels, room
    prompts = prompt_bytes(*given)
    in_graphs = prompt_graphs and kernels == "triton"
    graphs_bytes = DECODE_GRAPHS_BYTES if kernels == "triton" else 0
    graphs_bytes += prompt_graphs_bytes(spec, dtype, room, prompts) if in_graphs else 0
    # and one that nobody holds, for the padding of steps
    pages = 1 + pool_pages(spec, room.kv_tokens, room.sequences, room.step_tokens, room.page_tokens)
    return RankMemory(
        rank=rank,
        weights_bytes=weights_bytes(spec, mesh, rank, dtype, kept),
        kv_bytes=pages * page_bytes(spec, mesh, rank, kv_dtype, room.page_tokens),
        workspace_bytes=workspace_bytes(*given, 0 if in_graphs else prompts, kept),
        graphs_bytes=graphs_bytes,
        communication_bytes=communication_bytes(spec, mesh, device, dtype, room.step_tokens),
        context_bytes=PROCESS[device].context_bytes,
        host_bytes=PROCESS[device].host_bytes,
    )


@dataclass(frozen=True)
class _Widths:
    """Columns that one rank computes."""

    q: int
    kv: int
    gate_up: int
    vocab: int


@cache
def _widths(spec: Spec, mesh: Mesh, rank: int) -> _Widths:
    rows = {row.name: row for row in table(spec)}
    return _Widths(
        q=local_shape(rows["layers.0.q.weight"], mesh, rank)[0],
        kv=local_kv_heads(spec, mesh, rank) * spec.head_dim,
        gate_up=local_shape(rows["layers.0.gate_up.blocks"], mesh, rank)[1],
        vocab=local_shape(rows["head"], mesh, rank)[0],
    )

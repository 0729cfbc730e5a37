"""Predicted bytes by part of a training run on each of its ranks, and of its checkpoints on disk.

Counted over the operations in training/; a test holds it to what runs on an H200 took. Knows nothing of settings or of
torch.
"""

from dataclasses import dataclass
from math import prod

from .memory import ALLOCATOR_SLACK, DEQUANTIZED_COPIES, INDEX_BYTES, PROCESS, WIDE_BYTES, Device, weights_bytes
from .plan import DTYPE_BYTES, DType
from .shards import Mesh, table
from .spec import Spec
from .zero import Zero

VALUE_BYTES = GRADIENT_BYTES = 4  # fp32, but for adapters that are bf16 on request
MOMENTS_BYTES = {"adamw": 4 + 4, "adamw8bit": 1 + 1}  # of a value; blocks of 256 share a scale, which is left out
SAVED_BYTES = 4 + 4 + 4  # a value and its moments
GATHERED_PARTS = 2  # of stage 3: the part that is computed with, and the one that is on its way
BUCKET_VALUES = 500_000_000  # of gradients that are summed together: DeepSpeed's default, and our files'
ZERO_SLACK = 1.025  # of what stage 3 holds on a GPU: two H200 had 1.0 and 2.1 % more in use than is counted
LOGITS_LIMIT_BYTES = 256 << 20  # of a chunk, in the compute dtype
LOGITS_COPIES = 6  # plain: besides, in fp32, less their log-sum-exp, and their gradient; fused they are written over
WIDE_ROW_COPIES = 4  # fp32, of a token's hidden state in a layer's norms and their gradients
# Of the matrices of a layer's experts, dequantized or cast, at a time; and what a part of their rows or columns is a
# multiple of: whole tiles of a grouped product, whole blocks of MXFP4.
PART_LIMIT_BYTES, PART_MULTIPLE = 256 << 20, 256
SPARE_COLUMNS = 8  # of a product of experts, beside weights and adapter: kernels.triton_mixture
FUSED_SLACK = 1.4  # of what is counted so: 1.6 to 1.7 GB were seen on an H200 where 1.2 are counted
COMPILED_BYTES = 176 << 20  # of kernels that are compiled for a pass: 0.88 to 0.90 GB with the context, on an H200
FUSED_HIDDEN_COPIES = 8  # a layer's hidden states: what its norms and its router read, and gradients
FUSED_ROW_COPIES = 4  # a token's rows for its experts: on the way in, their gradient, and those of the way out
FUSED_INNER_COPIES = 6  # gate_up's product and its gradient count two each; SwiGLU's result, and its gradient
EXPERT_ROW_COPIES = 4  # one by one: repeated, in order, back in order, and their gradients
INNER_COPIES = 6  # one by one: gate_up's product, gate and up clamped, sigmoid, result, and a gradient


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the device of a rank: frozen or cast weights; what is trained; its gradients; AdamW's moments, with
    the fp32 values that ZeRO keeps beside them; hidden states kept for the backward pass; the largest moment besides;
    the process and its communication. host: of the rank, besides, in host memory. disk: one checkpoint."""

    weights_bytes: int
    trained_bytes: int
    gradients_bytes: int
    moments_bytes: int
    kept_bytes: int
    workspace_bytes: int
    context_bytes: int
    host_bytes: int
    disk_bytes: int

    @property
    def device_bytes(self) -> int:
        return (
            self.weights_bytes
            + self.trained_bytes
            + self.gradients_bytes
            + self.moments_bytes
            + self.kept_bytes
            + self.workspace_bytes
            + self.context_bytes
        )


@dataclass(frozen=True)
class Share:
    """Who trains. zero: None where every rank holds all that is trained. adapter_dtype: of what is trained, and of its
    gradients, where it is. host_layers: whose frozen experts wait in host memory."""

    ranks: int = 1
    zero: Zero | None = None
    optimizer: str = "adamw"
    adapter_dtype: DType = "fp32"
    host_layers: int = 0


def all_values(spec: Spec) -> int:
    """Weights of the model, as values: 20.91 and 116.83 billion for the published ones."""
    return sum(
        prod(row.shape) * (2 if row.name.endswith(".blocks") else 1)
        for row in table(spec)
        if not row.name.endswith(".scales")
    )


def lora_values(spec: Spec, attention_rank: int, expert_rank: int) -> int:
    """Trained values; a rank of 0 trains none."""
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = 2 * (spec.hidden + q_width) + 2 * (spec.hidden + kv_width)
    experts = spec.experts * ((spec.hidden + 2 * spec.intermediate) + (spec.intermediate + spec.hidden))
    return spec.layers * (attention_rank * attention + expert_rank * experts)


@dataclass(frozen=True)
class _Trained:
    """Bytes of what is trained, on the device of a rank and in its host memory."""

    values: int
    gradients: int
    moments: int
    host: int


def _trained(values: int, largest_part: int, dtype: DType, device: Device, share: Share) -> _Trained:
    """values: that are trained. largest_part: of them, in one part of the model. Stages are those of
    https://arxiv.org/abs/1910.02054, table 1."""
    zero = share.zero
    if zero is None:
        moments = values * MOMENTS_BYTES[share.optimizer]
        value_bytes = values * DTYPE_BYTES[share.adapter_dtype]
        return _Trained(value_bytes, value_bytes, moments, 0)
    element, cut = DTYPE_BYTES[dtype], -(-values // share.ranks)
    on_device = cut if zero.stage == 3 else values
    weights = on_device * element
    host = 0
    if zero.weights_on_host:
        host, weights = weights, 0
    if zero.stage == 3:
        weights += GATHERED_PARTS * largest_part * element
    moments = (cut if zero.stage else values) * MOMENTS_BYTES["adamw"] + (cut * VALUE_BYTES if zero.stage else 0)
    gradients = (cut if zero.stage >= 2 else values) * GRADIENT_BYTES
    if zero.stage == 1:
        gradients += cut * GRADIENT_BYTES  # its share of the sums, as they come
    if zero.stage:
        gradients += largest_part * element  # as they come from a part, before they are summed and cut
    if zero.on_host:
        pinned, summed = zero.pinned and device == "cuda", cut * GRADIENT_BYTES
        host += round((moments + summed) * zero.on_host)
        if pinned:  # of many sizes, each of which is rounded up: at most to twice as much
            host += round(summed * zero.on_host)
        if zero.stage == 3:  # packs add up there, for whatever part; below it, on the device
            host += 1 << (summed - 1).bit_length() if pinned else summed
            gradients = round(gradients * (1 - zero.on_host))
        moments -= round(moments * zero.on_host)
        gradients += 2 * largest_part * element
    if device == "cuda":  # on a CPU what is not written to is not taken
        # buckets are there whole, whatever is on the host; below stage 3 one fills while another is summed
        gradients += BUCKET_VALUES * (0, 2 * GRADIENT_BYTES, 2 * element, element)[zero.stage]
        if zero.stage == 3:
            gradients += round((ZERO_SLACK - 1) * (weights + gradients + moments))
    return _Trained(weights, gradients, moments, host)


def part_size(size: int, one_bytes: int) -> int:
    """Rows or columns of a product of experts that are there at a time. one_bytes: of one, for all experts."""
    parts = -(-size * one_bytes // PART_LIMIT_BYTES)
    return min(size, -(-size // (parts * PART_MULTIPLE)) * PART_MULTIPLE)


def layer_experts_bytes(spec: Spec) -> int:
    """Packed MXFP4 of a layer's experts, without biases."""
    names = tuple(f"layers.0.{product}.{part}" for product in ("gate_up", "down") for part in ("blocks", "scales"))
    return sum(prod(row.shape) for row in table(spec) if row.name in names)


def embedding_bytes(spec: Spec, dtype: DType) -> int:
    return spec.vocab * spec.hidden * DTYPE_BYTES[dtype]


def _fused_layer_bytes(spec: Spec, tokens: int, expert_rank: int) -> int:
    """What training.grouped and kernels.triton_layer hold at the worst moment of a layer's gradient, in bf16."""
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    routed, width = tokens * spec.experts_per_token, spec.hidden + expert_rank + SPARE_COLUMNS
    row, column = spec.experts * width * 2, spec.experts * 2 * spec.intermediate * 2
    part = max(part_size(2 * spec.intermediate, row) * row, part_size(spec.hidden, column) * column)
    values = (
        tokens * spec.hidden * FUSED_HIDDEN_COPIES
        + tokens * (5 * q_width + 6 * kv_width)  # q, k, v twice, attention's result twice, a gradient
        + routed * spec.hidden * FUSED_ROW_COPIES
        + routed * spec.intermediate * FUSED_INNER_COPIES
    )
    return values * 2 + part


def _layer_bytes(spec: Spec, dtype: DType, rows: int) -> int:
    """The same for the plain operations. rows: values of a pack's hidden state."""
    element, tokens = DTYPE_BYTES[dtype], rows // spec.hidden
    matrix = 2 * spec.intermediate * spec.hidden
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    routed = tokens * spec.experts_per_token
    experts = (
        routed * spec.hidden * (EXPERT_ROW_COPIES * element + WIDE_BYTES)
        + routed * spec.intermediate * INNER_COPIES * element
        + matrix * DEQUANTIZED_COPIES * element
        + matrix // 2 * INDEX_BYTES
    )
    return rows * WIDE_ROW_COPIES * WIDE_BYTES + tokens * (3 * q_width + 4 * kv_width) * element + experts


def training_memory(
    spec: Spec,
    trained_values: int,
    full: bool,
    dtype: DType,
    device: Device,
    sequence_tokens: int,
    share: Share = Share(),  # frozen
    expert_rank: int = 0,
) -> TrainingMemory:
    """One pack of `sequence_tokens` at a time; every layer is computed again for its gradient."""
    element, rows = DTYPE_BYTES[dtype], sequence_tokens * spec.hidden
    waiting = share.host_layers * layer_experts_bytes(spec)
    if not full and device == "cuda":
        waiting += embedding_bytes(spec, dtype)  # a pack needs few of its rows
    fused = dtype == "bf16" and device == "cuda"
    layer = _fused_layer_bytes(spec, sequence_tokens, expert_rank) if fused else _layer_bytes(spec, dtype, rows)
    if share.host_layers:
        layer += layer_experts_bytes(spec)  # as they come from the host
    # those of a CUDA graph are not the head's
    workspace = layer + LOGITS_LIMIT_BYTES if fused else max(layer, LOGITS_COPIES * LOGITS_LIMIT_BYTES)
    process = PROCESS[device]
    embedding = spec.vocab * spec.hidden if full else 0
    trained = _trained(
        trained_values, max(embedding, (trained_values - 2 * embedding) // spec.layers), dtype, device, share
    )
    return TrainingMemory(
        # a full run keeps no weights but those that it trains; a layer of them is cast and rounded at a time
        weights_bytes=2 * spec.experts * 2 * spec.intermediate * spec.hidden * WIDE_BYTES
        if full
        else weights_bytes(spec, Mesh(), 0, dtype) - waiting,
        trained_bytes=trained.values,
        gradients_bytes=trained.gradients,
        moments_bytes=trained.moments,
        kept_bytes=(spec.layers + 2) * rows * element,
        workspace_bytes=round(workspace * (FUSED_SLACK if fused else ALLOCATOR_SLACK)),
        context_bytes=process.context_bytes
        + (COMPILED_BYTES if fused else 0)
        + (process.nccl_bytes if share.ranks > 1 else 0),
        host_bytes=process.host_bytes + trained.host + waiting,
        disk_bytes=trained_values * SAVED_BYTES,
    )

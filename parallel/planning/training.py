"""Predicted bytes by part of a training run on one device, and of its checkpoints on disk.

Counted over the operations in training/, not measured on a GPU yet. Knows nothing of settings or of torch.
"""

from dataclasses import dataclass
from math import prod

from .memory import ALLOCATOR_SLACK, DEQUANTIZED_COPIES, INDEX_BYTES, PROCESS, WIDE_BYTES, Device, weights_bytes
from .plan import DTYPE_BYTES, DType
from .shards import Mesh, table
from .spec import Spec

TRAINED_BYTES = 4 + 4 + 4 + 4  # a value, its gradient and AdamW's two moments, all fp32
SAVED_BYTES = 4 + 4 + 4  # a value and its moments
LOGITS_BYTES = 3 * (256 << 20)  # of a chunk: in the compute dtype, in fp32, and their gradient
WIDE_ROW_COPIES = 4  # fp32, of a token's hidden state in a layer's norms and their gradients
EXPERT_ROW_COPIES = 4  # a token's rows for its experts: repeated, in order, back in order, and their gradients
INNER_COPIES = 6  # gate_up's product, gate and up clamped, sigmoid, result, and a gradient


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the device: frozen or cast weights; what is trained with gradients and moments; hidden states kept for
    the backward pass; the largest moment besides; the process. host: besides, in host memory. disk: one checkpoint."""

    weights_bytes: int
    trained_bytes: int
    kept_bytes: int
    workspace_bytes: int
    context_bytes: int
    host_bytes: int
    disk_bytes: int

    @property
    def device_bytes(self) -> int:
        return self.weights_bytes + self.trained_bytes + self.kept_bytes + self.workspace_bytes + self.context_bytes


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


def training_memory(
    spec: Spec, trained_values: int, full: bool, dtype: DType, device: Device, sequence_tokens: int
) -> TrainingMemory:
    """One pack of `sequence_tokens` at a time; every layer is computed again for its gradient."""
    element, rows = DTYPE_BYTES[dtype], sequence_tokens * spec.hidden
    matrix = 2 * spec.intermediate * spec.hidden
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    routed = sequence_tokens * spec.experts_per_token
    attention = sequence_tokens * (3 * q_width + 4 * kv_width) * element
    experts = (
        routed * spec.hidden * (EXPERT_ROW_COPIES * element + WIDE_BYTES)
        + routed * spec.intermediate * INNER_COPIES * element
        + matrix * DEQUANTIZED_COPIES * element
        + matrix // 2 * INDEX_BYTES
    )
    layer = rows * WIDE_ROW_COPIES * WIDE_BYTES + attention + experts
    process = PROCESS[device]
    return TrainingMemory(
        # a full run keeps no weights but those that it trains; a layer of them is cast and rounded at a time
        weights_bytes=2 * spec.experts * matrix * WIDE_BYTES if full else weights_bytes(spec, Mesh(), 0, dtype),
        trained_bytes=trained_values * TRAINED_BYTES,
        kept_bytes=(spec.layers + 2) * rows * element,
        workspace_bytes=round(max(layer, LOGITS_BYTES) * ALLOCATOR_SLACK),
        context_bytes=process.context_bytes,
        host_bytes=process.host_bytes,
        disk_bytes=trained_values * SAVED_BYTES,
    )

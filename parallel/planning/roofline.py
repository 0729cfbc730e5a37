"""How fast a decode step could be if nothing but memory bandwidth held it back, and what share of that was reached.

    floor = bytes that the busiest rank must read / bandwidth of one GPU
    bytes = weights but the embedding, experts by the expected number of different ones, + KV cache of every sequence

The roofline model of Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (CACM 52(4),
2009), on its memory side: a decode step of a few tokens does few operations a byte. Bandwidths are those of `estimate`:
the datasheet's, times the share of it that a pure read reaches. From some hundred sequences on arithmetic counts as
well, and so it does in prefill: this says nothing about either. Knows no timings.
"""

from dataclasses import dataclass

from .estimate import bandwidth, kv_bytes, weight_bytes
from .plan import DTYPE_BYTES, DType, Kept, KvDType
from .shards import Mesh
from .spec import Spec


@dataclass(frozen=True)
class Floor:
    """The least that one decode step must read on its busiest rank, and how long that takes.

    bytes_per_s, seconds: None where the bandwidth of the device is in no table.
    """

    weight_bytes: float
    kv_bytes: int
    bytes_per_s: float | None

    @property
    def read_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes

    @property
    def seconds(self) -> float | None:
        return None if self.bytes_per_s is None else self.read_bytes / self.bytes_per_s

    def share(self, step_s: float) -> float | None:
        """Of the roofline that a step of step_s reaches, 0 to 1; None if the floor is not known."""
        return None if self.seconds is None else self.seconds / step_s


def decode_floor(
    spec: Spec,
    mesh: Mesh,
    dtype: DType,
    kv_dtype: KvDType,
    device: str | None,
    batch: int,
    context_tokens: int,
    kept: Kept = None,
) -> Floor:
    """Of a step of `batch` sequences, each context_tokens long. device: name of the GPU as NVML gives it, or None."""
    return Floor(
        weight_bytes(spec, mesh, dtype, batch, kept),
        batch * kv_bytes(spec, mesh, DTYPE_BYTES[kv_dtype], context_tokens),
        None if device is None else bandwidth(device),
    )

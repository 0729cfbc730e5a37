"""How many operations training takes, and what a GPU could do: for MFU, and for how long a run may take.

MFU is model FLOPs utilization (PaLM, https://arxiv.org/abs/2204.02311, appendix B): what the model's own products need
over what the GPU could do, whatever is computed again besides. A product of frozen weights has no gradient of its own:
with adapters a step costs two forward passes, else three; adapters themselves, some per cent, are left out.
"""

from collections.abc import Iterable

from .plan import DType
from .spec import Spec

# Dense products with fp32 sums, operations a second, by the name that NVML gives, less its maker: NVIDIA's datasheets
# and architecture whitepapers.
PEAK_BF16: dict[str, float] = {
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A100-PCIE-40GB": 312e12,
    "A100-SXM4-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "A100-SXM4-80GB": 312e12,
    "GeForce RTX 3090": 71e12,
    "GeForce RTX 4090": 165.2e12,
    "GeForce RTX 5090": 209.5e12,
    "H100 80GB HBM3": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
}
FORWARDS = {"lora": 2, "full": 3}
# Of the peak, with which hours are estimated: 11,439 tokens/s of 20b with adapters of rank 32, measured on one H200; of
# full training nothing is measured yet.
ASSUMED_MFU = {"lora": 0.17, "full": 0.07}


def peak_flops(gpu_name: str, dtype: DType) -> float | None:
    """Operations a second of a GPU of this name; None if it is not in the table."""
    return PEAK_BF16.get(gpu_name.removeprefix("NVIDIA ")) if dtype == "bf16" else None


def forward_flops(spec: Spec, lengths: Iterable[int]) -> float:
    """Of documents of so many tokens, each of which sees what comes before it in its own."""
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = spec.hidden * (2 * q_width + 2 * kv_width)
    experts = spec.experts_per_token * 3 * spec.hidden * spec.intermediate + spec.hidden * spec.experts
    weights = spec.layers * (attention + experts) + spec.vocab * spec.hidden
    total = 0.0
    for length in lengths:
        seen = {"full": length * (length + 1) // 2}
        edge = min(length, spec.window_tokens)
        seen["window"] = edge * (edge + 1) // 2 + (length - edge) * edge
        pairs = sum(seen[kind] for kind in spec.layer_kinds)
        total += 2 * length * weights + 4 * q_width * pairs  # a score, and its share of a value
    return total


def training_flops(spec: Spec, lengths: Iterable[int], mode: str) -> float:
    """mode: "lora" or "full"."""
    return FORWARDS[mode] * forward_flops(spec, lengths)

"""The plan's names for dtypes, as torch has them."""

import torch

from ..planning.plan import KvDType

TORCH_DTYPE: dict[KvDType, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8": torch.float8_e4m3fn,
}

"""In which precision the delicate parts (norms, softmax, routing, sums over experts) are computed."""

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where everything is computed in fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32

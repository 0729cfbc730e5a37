"""One pack of samples as the training forward sees it: a row of tokens, and where each document in it begins and ends.

T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .samples import Sample, sample


@dataclass(frozen=True)
class Pack:
    """tokens_T, positions_T: int64; positions begin again with each document. targets_T: the token that follows, and
    weights_T (fp32) what predicting it counts; 0 at the end of a document. bounds: first token of each document, then
    the end: cu_seqlens."""

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    weights_T: Tensor
    bounds: tuple[int, ...]

    @property
    def weight(self) -> float:
        """What all its tokens count together."""
        return float(self.weights_T.sum(dtype=torch.float64))


def make_pack(samples: Sequence[Sample], device: torch.device) -> Pack:
    bounds = [0]
    for one in samples:
        bounds.append(bounds[-1] + len(one))
    tokens = [token for one in samples for token in one.tokens]
    weights = [weight for one in samples for weight in (*one.weights[1:], 0.0)]
    positions = [position for one in samples for position in range(len(one))]
    targets = [token for one in samples for token in (*one.tokens[1:], 0)]
    return Pack(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(weights, dtype=torch.float32, device=device),
        tuple(bounds),
    )


def blank_pack(device: torch.device) -> Pack:
    """Two tokens of which nothing is learnt, for a rank that has nothing else to do."""
    return make_pack([sample([0, 0], [0, 0])], device)

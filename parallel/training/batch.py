"""One pack of samples as the training forward sees it: a row of tokens, and where each document in it begins and ends.

T tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .samples import Sample, sample


@dataclass(frozen=True)
class Pack:
    """tokens_T, positions_T: int64; positions begin again with each document. learnt_R: tokens after which something is
    learnt, none of them the last of a document; targets_R: the token that follows each; weights_R (fp32): what
    predicting it counts. All but tokens_T are on the device; those wait in host memory, where an embedding may be.
    weight: all of weights_R together. bounds: first token of each document, then the end."""

    tokens_T: Tensor
    positions_T: Tensor
    learnt_R: Tensor
    targets_R: Tensor
    weights_R: Tensor
    weight: float
    bounds: tuple[int, ...]


def make_pack(samples: Sequence[Sample], device: torch.device) -> Pack:
    """Made on the host, which knows what is learnt: it need not ask the device."""
    bounds = [0]
    for one in samples:
        bounds.append(bounds[-1] + len(one))
    # an array and a tensor of the same memory, which is not written to
    tokens_T = torch.cat([torch.frombuffer(one.tokens, dtype=torch.int32) for one in samples]).long()
    weights_T = torch.cat([torch.frombuffer(one.weights, dtype=torch.float32) for one in samples])
    follows = weights_T.nonzero()[:, 0]  # the first token of a document has weight 0
    return Pack(
        tokens_T,
        torch.cat([torch.arange(len(one)) for one in samples]).to(device),
        (follows - 1).to(device),
        tokens_T[follows].to(device),
        weights_T[follows].to(device),
        math.fsum(weights_T[follows].tolist()),
        tuple(bounds),
    )


def blank_pack(device: torch.device) -> Pack:
    """Two tokens of which nothing is learnt, for a rank that has nothing else to do."""
    return make_pack([sample([0, 0], [0, 0])], device)

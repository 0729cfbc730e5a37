"""What one may want to know about routing while a model runs: whether all ranks agree, and which experts are used.

Both wrap the `norm_route` operation and leave its result alone. A forward pass routes once a layer, in order.
"""

import dataclasses
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels import Operations
from ..model.comm import Comm, check_equal
from ..planning.plan import Plan

WRITE_EVERY_S = 5.0


def checked(ops: Operations, comm: Comm, layers: int) -> Operations:
    """`ops` whose every router choice is compared across ranks; a difference raises RuntimeError, with layer and ranks.

    Hidden states are bitwise equal on all ranks, or experts are added up for different tokens. Slow; for debugging.
    """
    layer = itertools.cycle(range(layers))

    def norm_route(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        residual_TH, x_TH, weights_TX, experts_TX = ops.norm_route(*inputs)
        check_equal(comm, experts_TX, f"the router's choice in layer {next(layer)}")
        return residual_TH, x_TH, weights_TX, experts_TX

    return dataclasses.replace(ops, norm_route=norm_route)


class Recorder:
    """How often each expert was chosen, a count for each token: [layers, experts]."""

    def __init__(self, path: Path, plan: Plan, device: torch.device) -> None:
        layers, experts = plan.spec.layers, plan.spec.experts
        self._path = path
        self._model = plan.model
        self._layer = itertools.cycle(range(layers))
        self._counts = torch.zeros((layers, experts), dtype=torch.int64, device=device)
        self._order = plan.expert_order or (tuple(range(experts)),) * layers
        self._written_s = 0.0

    def counted(self, ops: Operations) -> Operations:
        def norm_route(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            residual_TH, x_TH, weights_TX, experts_TX = ops.norm_route(*inputs)
            self._counts[next(self._layer)] += torch.bincount(experts_TX.flatten(), minlength=self._counts.shape[1])
            return residual_TH, x_TH, weights_TX, experts_TX

        return dataclasses.replace(ops, norm_route=norm_route)

    def reset(self) -> None:
        """Forget what warming up counted."""
        self._counts.zero_()

    def write(self, *, at_once: bool = False) -> None:
        """Write the file as a whole, at most every WRITE_EVERY_S: `plan --routing FILE` reads it at any time."""
        if not at_once and time.monotonic() - self._written_s < WRITE_EVERY_S:
            return
        self._written_s = time.monotonic()
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        placed = self._counts.tolist()
        counts = [  # by published expert: place i holds expert order[i]
            [count for _, count in sorted(zip(order, row, strict=True))]
            for order, row in zip(self._order, placed, strict=True)
        ]
        draft.write_text(json.dumps({"model": self._model, "counts": counts}) + "\n", encoding="utf-8")
        draft.replace(self._path)

"""The matrices that a rank keeps in 8 bits as the checkpoint has them: read again, a little at a time, to compare.

On the device there is never more of them than a layer's attention, or a tile of the head. Everything else is that of
the weights that are compared. Does not know what is computed with them.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..planning.headers import Entry
from ..planning.shards import Row, local_shape, table
from .checkpoint import Placed, read_rows, tiles_of
from .weights import Layer, Weights


@dataclass(frozen=True)
class Originals:
    """rows: of the shard table, by name."""

    plan: Placed
    rank: int
    weights: Weights
    rows: dict[str, Row]
    inventory: Mapping[str, Entry]

    def embedding(self, tokens_U: Tensor) -> Tensor:
        """[U, H]: rows of these tokens, zeros for those that another rank holds."""
        first, here = self.weights.first_token, len(self.weights.embed_VH)
        embedded_UH = torch.zeros(
            (len(tokens_U), self.plan.spec.hidden), dtype=self.weights.embed_VH.dtype, device=tokens_U.device
        )
        for place, token in enumerate(tokens_U.tolist()):
            if first <= token < first + here:
                embedded_UH[place] = self._read("embed", slice(token - first, token - first + 1))[0]
        return embedded_UH

    def layers(self) -> Iterator[Layer]:
        for number, layer in enumerate(self.weights.layers):
            qkv = [self._read(f"layers.{number}.{letter}.weight") for letter in "qkv"]
            out_HQ = self._read(f"layers.{number}.o.weight")
            yield dataclasses.replace(layer, qkv_QH=torch.cat(qkv), out_HQ=out_HQ)

    def head(self) -> Iterator[Tensor]:
        """Tiles of its rows here, in their order."""
        return (self._read("head", tile) for tile in tiles_of(self.rows["head"], self.plan, self.rank))

    def _read(self, name: str, some: slice | None = None) -> Tensor:
        row = self.rows[name]
        some = slice(0, local_shape(row, self.plan.mesh, self.rank)[0]) if some is None else some
        return read_rows(self.inventory, row, self.plan, self.rank, self.weights.embed_VH.device, some)


def originals(plan: Placed, rank: int, inventory: Mapping[str, Entry], weights: Weights) -> Originals:
    return Originals(plan, rank, weights, {row.name: row for row in table(plan.spec)}, inventory)

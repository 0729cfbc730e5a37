"""safetensors files -> this rank's tensors, through the shard table and nothing else.

All of the rank's tensors are made first, so that nothing that passes through the device leaves gaps between them; then
they are filled, a piece at a time, with what was read meanwhile. Each rank asks for its own slices only, and the host
holds no more of what has not been placed than a few pieces. The files were checked before (`planning.headers`), so a
mismatch here is our own mistake.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.experts import LAYOUT, Layout, Packed
from ..kernels.quantize import quantize
from ..kernels.weight_only import CODES, Narrow, Weight, narrowed
from ..planning.headers import Entry, wide_name
from ..planning.memory import DENSE_TILE_BYTES, WIDE_BYTES, is_rest, stored_dtype
from ..planning.plan import DType, Kept
from ..planning.shards import Mesh, Row, is_zero_here, local_shape, local_slices, table
from ..planning.spec import Spec
from .dtypes import TORCH_DTYPE
from .files import Box, mapped, read_ahead
from .weights import Layer, Weights


class Placed(Protocol):
    """What loading needs to know of a Plan, or of a training run."""

    @property
    def spec(self) -> Spec: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def expert_order(self) -> tuple[tuple[int, ...], ...]: ...


def load(
    plan: Placed,
    rank: int,
    inventory: Mapping[str, Entry],
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
    layout: Layout = LAYOUT,
    experts: Literal["device", "memory", "file"] = "device",
    kept: Kept = None,
    embedding_device: torch.device | None = None,
) -> Weights:
    """The share of `rank`; experts that the files have in bf16 are quantized as they come. Calls progress(done_bytes,
    total_bytes) after each piece, in bytes of MXFP4 files.

    layout: of the experts, whose products are asked for layer by layer, gate_up and then down, first in `room` and
    again in `put`. experts: where they are: on the device, in host memory, or as views into the mapped file (of blocks
    and scales, in `pack`; a replica of one rank). kept: what attention, embedding and head are kept in, as a plan says.
    embedding_device: of the embedding, if not on the device.
    """
    room = _Room(plan, rank, inventory, device, layout, experts, kept, {row.name: row for row in table(plan.spec)}, [])
    made = room.all(embedding_device or device)
    done_bytes, total_bytes = 0, sum(piece.counted_bytes for piece in room.pieces)
    with read_ahead([piece.boxes for piece in room.pieces], device) as tensors:
        for piece, parts in zip(room.pieces, tensors, strict=True):
            piece.put(*parts)
            done_bytes += piece.counted_bytes
            progress(done_bytes, total_bytes)
    return made


@dataclass(frozen=True)
class _Piece:
    """boxes: what is read at a time. put: takes a tensor in host memory for each, which is another's soon."""

    boxes: tuple[Box, ...]
    put: Callable[..., None]
    counted_bytes: int


@dataclass(frozen=True)
class _Room:
    """Makes tensors with nothing in them; pieces: what is to be filled in, in the order in which they were made."""

    plan: Placed
    rank: int
    inventory: Mapping[str, Entry]
    device: torch.device
    layout: Layout
    experts: Literal["device", "memory", "file"]
    kept: Kept
    rows: Mapping[str, Row]
    pieces: list[_Piece]

    def all(self, embedding_device: torch.device) -> Weights:
        plan, rank = self.plan, self.rank
        return Weights(
            embed_VH=replace(self, device=embedding_device)._matrix("embed"),
            layers=tuple(self._layer(f"layers.{layer}") for layer in range(plan.spec.layers)),
            norm_H=self._tensor("norm"),
            head_VH=self._matrix("head"),
            first_token=local_slices(self.rows["embed"], plan.mesh, rank)[0].start,
            first_expert=local_slices(self.rows["layers.0.gate_up.bias"], plan.mesh, rank)[0].start,
        )

    def _layer(self, prefix: str) -> Layer:
        return Layer(
            attn_norm_H=self._tensor(f"{prefix}.attn_norm"),
            qkv_QH=self._matrix(*(f"{prefix}.{letter}.weight" for letter in "qkv")),
            qkv_bias_Q=self._tensor(*(f"{prefix}.{letter}.bias" for letter in "qkv")),
            sinks_N=self._tensor(f"{prefix}.sinks"),
            out_HQ=self._matrix(f"{prefix}.o.weight"),
            out_bias_H=self._tensor(f"{prefix}.o.bias"),
            mlp_norm_H=self._tensor(f"{prefix}.mlp_norm"),
            router_EH=self._tensor(f"{prefix}.router.weight"),
            router_bias_E=self._tensor(f"{prefix}.router.bias"),
            gate_up=self._product(f"{prefix}.gate_up"),
            down=self._product(f"{prefix}.down"),
        )

    def _matrix(self, *names: str) -> Weight:
        """Rows of all of `names` in this order, in what the rest is kept in."""
        if self.kept is None:
            return self._tensor(*names)
        shape, dtype, codes = self._shape(*names), TORCH_DTYPE[self.plan.dtype], CODES[self.kept]
        codes_OI = torch.empty(shape, dtype=codes, device=self.device)
        made = Narrow(codes_OI, torch.empty(shape[:1], dtype=torch.float32, device=self.device), dtype)

        def put(rows: slice, tensor: Tensor) -> None:
            """On the device it is never whole as it was."""
            some = narrowed(tensor.to(self.device, non_blocking=True).to(dtype), codes, dtype)
            made.codes_OI[rows], made.scale_O[rows] = some.codes_OI, some.scale_O

        assert all(is_rest(self.rows[name]) for name in names)
        self._fill(names, put)
        return made

    def _tensor(self, *names: str) -> Tensor:
        """Rows of all of `names` in this order, in the dtype that the forward pass reads."""
        dtype = _kept_dtype(self.rows[names[0]], self.plan)
        made = torch.empty(self._shape(*names), dtype=dtype, device=self.device)
        self._fill_tensor(made, *names)
        return made

    def _fill_tensor(self, made: Tensor, *names: str) -> None:
        def put(rows: slice, tensor: Tensor) -> None:
            made[rows] = tensor.to(made.device, non_blocking=True)  # converted there

        if any(is_zero_here(self.rows[name], self.plan.mesh, self.rank) for name in names):
            made.zero_()
        else:
            self._fill(names, put)

    def _fill(self, names: Sequence[str], put: Callable[[slice, Tensor], None]) -> None:
        """put: called with rows of what was made, and what belongs there as it is in the file."""
        first = 0
        for row in (self.rows[name] for name in names):
            entry, (mine, *others) = self.inventory[row.published], local_slices(row, self.plan.mesh, self.rank)
            if row.by_expert and self.plan.expert_order:
                order = self._order(row)[mine]
                boxes = tuple(Box(entry, (slice(expert, expert + 1), *others)) for expert in order)
                self._add(boxes, lambda *parts: put(slice(0, None), torch.cat(parts)))
                assert len(names) == 1
                continue
            for tile in tiles_of(row, self.plan, self.rank):
                box = Box(entry, (slice(mine.start + tile.start, mine.start + tile.stop), *others))
                there = slice(first + tile.start, first + tile.stop)
                self._add((box,), lambda tensor, there=there: put(there, tensor))
            first += mine.stop - mine.start

    def _product(self, prefix: str) -> Packed:
        blocks, scales, bias = (self.rows[f"{prefix}.{part}"] for part in ("blocks", "scales", "bias"))
        dtype, is_wide = _kept_dtype(bias, self.plan), blocks.published not in self.inventory
        if self.experts == "file":
            if is_wide:
                raise UserError(
                    f"{wide_name(blocks)} is bf16: experts can be read from the file as they are only in MXFP4",
                    "more --host-memory keeps them in memory",
                )
            assert self.plan.mesh.ranks == 1 and not self.plan.expert_order
            there = {row: mapped(self.inventory[row.published]) for row in (blocks, scales, bias)}
            self._add((), lambda: None, sum(row.nbytes for row in there))
            return self.layout.pack(there[blocks], there[scales], there[bias].to(dtype, copy=True))
        where = self.device if self.experts == "device" else torch.device("cpu")
        experts, *within = local_slices(blocks, self.plan.mesh, self.rank)
        count, out, row_blocks = self._shape(scales.name)
        packed = self.layout.room((count, out, row_blocks), dtype, where)
        self._fill_tensor(packed.bias, bias.name)
        counted_bytes = sum(prod(self._shape(row.name)[1:]) for row in (blocks, scales))  # of one
        for place, expert in enumerate(self._order(blocks)[experts]):
            one = slice(expert, expert + 1)
            if is_wide:
                entry = self.inventory[wide_name(blocks)]
                boxes = (Box(entry, (one, *(slice(0, size) for size in entry.shape[1:]))),)
                put = partial(_put_quantized, self.layout, packed, place, within, where)
            else:
                parts = (self.inventory[row.published] for row in (blocks, scales))
                boxes = tuple(Box(entry, (one, *cut)) for entry, cut in zip(parts, (within, within[:2]), strict=True))
                put = partial(_put, self.layout, packed, place)
            self._add(boxes, put, counted_bytes)
        return packed

    def _order(self, row: Row) -> Sequence[int]:
        """Of experts, of which a rank has a slice."""
        order = self.plan.expert_order
        return order[int(row.name.split(".")[1])] if order else range(row.shape[0])

    def _shape(self, *names: str) -> tuple[int, ...]:
        """Of this rank's rows of all of them."""
        shapes = [local_shape(self.rows[name], self.plan.mesh, self.rank) for name in names]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _add(self, boxes: tuple[Box, ...], put: Callable[..., None], counted_bytes: int | None = None) -> None:
        counted_bytes = sum(box.nbytes for box in boxes) if counted_bytes is None else counted_bytes
        self.pieces.append(_Piece(boxes, put, counted_bytes))


def _put(layout: Layout, packed: Packed, place: int, blocks: Tensor, scales: Tensor) -> None:
    layout.put(packed, place, blocks[0], scales[0])


def _put_quantized(
    layout: Layout, packed: Packed, place: int, within: Sequence[slice], where: torch.device, values: Tensor
) -> None:
    """values: an expert as the file has it in bf16, [1, in, out]. within: the part of its blocks that belongs here."""
    blocks, scales = quantize(values[0].to(where).T)
    layout.put(packed, place, blocks[tuple(within)].contiguous(), scales[tuple(within[:2])].contiguous())


def _kept_dtype(row: Row, plan: Placed) -> torch.dtype:
    kept = stored_dtype(row, plan.dtype)
    assert kept is not None, "packed experts are never whole"
    return TORCH_DTYPE[kept]


def read_rows(
    inventory: Mapping[str, Entry], row: Row, plan: Placed, rank: int, device: torch.device, some: slice
) -> Tensor:
    """Some of the rows that this rank has of a matrix that is no expert's, counted from its first one."""
    assert not row.by_expert
    mine, *others = local_slices(row, plan.mesh, rank)
    tensor = mapped(inventory[row.published])[(slice(mine.start + some.start, mine.start + some.stop), *others)]
    return tensor.to(device=device, dtype=_kept_dtype(row, plan), copy=True).contiguous()


def tiles_of(row: Row, plan: Placed, rank: int) -> Iterator[slice]:
    """This rank's rows of a tensor, so many at a time that they take DENSE_TILE_BYTES in fp32."""
    rows, *others = local_shape(row, plan.mesh, rank)
    step = max(1, DENSE_TILE_BYTES // (WIDE_BYTES * prod(others)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

"""safetensors files -> this rank's tensors, through the shard table and nothing else.

Each rank asks for its own slices only; at any time the host holds one tensor more than what has been placed. The files
were checked before (`planning.headers`), so a mismatch here is our own mistake.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.experts import Packed
from ..kernels.quantize import quantize
from ..kernels.weight_only import CODES, Quantized, Weight, joined, quantized
from ..planning.headers import Entry, wide_name
from ..planning.memory import DENSE_TILE_BYTES, WIDE_BYTES, is_rest, stored_dtype
from ..planning.plan import DType, Rest
from ..planning.shards import Mesh, Row, is_zero_here, local_bytes, local_shape, local_slices, table
from ..planning.spec import Spec
from .dtypes import TORCH_DTYPE
from .files import open_files
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
    pack: Callable[[Tensor, Tensor, Tensor], Packed] = Packed,
    experts: Literal["device", "memory", "file"] = "device",
    rest: Rest = "bf16",
    embedding_device: torch.device | None = None,
) -> Weights:
    """The share of `rank`; experts that the files have in bf16 are quantized as they come. Calls progress(done_bytes,
    total_bytes) after each tensor, in bytes of MXFP4 files.

    pack: `Operations.pack`, of blocks, scales and bias of one product. It is called layer by layer, for gate_up and
    then for down. experts: where it gets them: on the device, in host memory, or as views into the mapped file (of
    blocks and scales; a replica of one rank). rest: what attention, embedding and head are kept in. embedding_device:
    of a bf16 embedding, if not on the device.
    """
    rows = {row.name: row for row in table(plan.spec)}
    total_bytes = sum(_read_bytes(row, plan, rank) for row in rows.values())
    done_bytes = 0
    experts_device = device if experts == "device" else torch.device("cpu")
    with open_files(inventory) as file_of:

        def done(row: Row) -> None:
            nonlocal done_bytes
            done_bytes += _read_bytes(row, plan, rank)
            progress(done_bytes, total_bytes)

        def read(name: str) -> Tensor:
            row = rows[name]
            is_expert = any(cut.axis == "ep" for cut in row.cuts)
            if is_expert and experts == "file" and row.dtype == "U8":
                assert plan.mesh.ranks == 1 and not plan.expert_order
                tensor = file_of(row.published).get_tensor(row.published)
            else:
                there = experts_device if is_expert else device
                if name == "embed" and embedding_device is not None:
                    there = embedding_device
                tensor = _place(file_of(row.published), row, plan, rank, there)
            done(row)
            return tensor

        def read_weight(name: str) -> Weight:
            row = rows[name]
            if rest == "bf16":
                return read(name)
            assert is_rest(row)
            weight = _quantized_rows(file_of(row.published), row, plan, rank, device, CODES[rest])
            done(row)
            return weight

        def read_packed(prefix: str) -> Packed:
            blocks, scales = rows[f"{prefix}.blocks"], rows[f"{prefix}.scales"]
            if blocks.published in inventory:
                return pack(read(blocks.name), read(scales.name), read(f"{prefix}.bias"))
            if experts == "file":
                raise UserError(
                    f"{wide_name(blocks)} is bf16: experts can be read from the file as they are only in MXFP4",
                    "more --host-memory keeps them in memory",
                )
            packed = _quantized(file_of(wide_name(blocks)), blocks, plan, rank, experts_device)
            done(blocks)
            done(scales)
            return pack(*packed, read(f"{prefix}.bias"))

        def read_layer(prefix: str) -> Layer:
            return Layer(
                attn_norm_H=read(f"{prefix}.attn_norm"),
                qkv_QH=joined([read_weight(f"{prefix}.{letter}.weight") for letter in "qkv"]),
                qkv_bias_Q=torch.cat([read(f"{prefix}.{letter}.bias") for letter in "qkv"]),
                sinks_N=read(f"{prefix}.sinks"),
                out_HQ=read_weight(f"{prefix}.o.weight"),
                out_bias_H=read(f"{prefix}.o.bias"),
                mlp_norm_H=read(f"{prefix}.mlp_norm"),
                router_EH=read(f"{prefix}.router.weight"),
                router_bias_E=read(f"{prefix}.router.bias"),
                gate_up=read_packed(f"{prefix}.gate_up"),
                down=read_packed(f"{prefix}.down"),
            )

        return Weights(
            embed_VH=read_weight("embed"),
            layers=tuple(read_layer(f"layers.{layer}") for layer in range(plan.spec.layers)),
            norm_H=read("norm"),
            head_VH=read_weight("head"),
            first_token=local_slices(rows["embed"], plan.mesh, rank)[0].start,
            first_expert=local_slices(rows["layers.0.gate_up.bias"], plan.mesh, rank)[0].start,
        )


def _place(file: Any, row: Row, plan: Placed, rank: int, device: torch.device) -> Tensor:
    """This rank's slice of one tensor, on the device, in the dtype that the forward pass reads."""
    kept = stored_dtype(row, plan.dtype)
    dtype = torch.uint8 if kept is None else TORCH_DTYPE[kept]
    if is_zero_here(row, plan.mesh, rank):
        return torch.zeros(local_shape(row, plan.mesh, rank), dtype=dtype, device=device)
    tensor = _read(file, row, plan, rank)
    # a tensor that needs no conversion would still be a view into the mapped file: own memory is what was planned for
    return tensor.to(device=device, dtype=dtype, copy=True).contiguous()


def read_rows(file: Any, row: Row, plan: Placed, rank: int, device: torch.device, some: slice | None = None) -> Tensor:
    """Some of the rows that this rank has of a matrix that is no expert's, counted from its first one; or all."""
    (mine, *rest), kept = local_slices(row, plan.mesh, rank), stored_dtype(row, plan.dtype)
    assert kept is not None and not row.by_expert
    if some is not None:
        mine = slice(mine.start + some.start, mine.start + some.stop)
    tensor = file.get_slice(row.published)[(mine, *rest)]
    return tensor.to(device=device, dtype=TORCH_DTYPE[kept], copy=True).contiguous()


def tiles_of(row: Row, plan: Placed, rank: int) -> Iterator[slice]:
    """This rank's rows of a matrix, so many at a time that they take DENSE_TILE_BYTES in fp32."""
    rows, columns = local_shape(row, plan.mesh, rank)
    step = max(1, DENSE_TILE_BYTES // (WIDE_BYTES * columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _quantized_rows(
    file: Any, row: Row, plan: Placed, rank: int, device: torch.device, codes: torch.dtype
) -> Quantized:
    """This rank's slice of a matrix in 8 bits. On the device it is never whole as it was."""
    shape, dtype = local_shape(row, plan.mesh, rank), TORCH_DTYPE[plan.dtype]
    scales = torch.empty(shape[:1], dtype=torch.float32, device=device)
    made = Quantized(torch.empty(shape, dtype=codes, device=device), scales, dtype)
    for tile in tiles_of(row, plan, rank):
        some = quantized(read_rows(file, row, plan, rank, device, tile), codes, dtype)
        made.codes_OI[tile], made.scale_O[tile] = some.codes_OI, some.scale_O
    return made


def _read(file: Any, row: Row, plan: Placed, rank: int) -> Tensor:
    """This rank's slice as it is in the file; experts in the plan's order, one by one, where it has one."""
    stored, slices = file.get_slice(row.published), local_slices(row, plan.mesh, rank)
    if not (plan.expert_order and row.by_expert):
        return stored[slices]
    order = plan.expert_order[int(row.name.split(".")[1])]
    return torch.cat([stored[(slice(expert, expert + 1), *slices[1:])] for expert in order[slices[0]]])


def _quantized(file: Any, row: Row, plan: Placed, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks and scales of this rank's slice of a product that the file has in bf16, [experts, in, out]: an expert at
    a time, on the device. row: that of the blocks."""
    stored, (experts, *rest) = file.get_slice(wide_name(row)), local_slices(row, plan.mesh, rank)
    order = plan.expert_order[int(row.name.split(".")[1])] if plan.expert_order else range(row.shape[0])
    made = []
    for expert in order[experts]:
        blocks, scales = quantize(stored[expert : expert + 1][0].to(device).T)
        made.append((blocks[tuple(rest)].contiguous(), scales[tuple(rest[:2])].contiguous()))
    blocks, scales = zip(*made, strict=True)
    return torch.stack(blocks), torch.stack(scales)


def _read_bytes(row: Row, plan: Placed, rank: int) -> int:
    """What this rank asks the file for."""
    return 0 if is_zero_here(row, plan.mesh, rank) else local_bytes(row, plan.mesh, rank)

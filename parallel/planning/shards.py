"""The shard table: every checkpoint tensor, its shape, and how it is cut over a mesh.

Three readers and no fourth: the loader (which slice), the modules (which shape), the planner (how many bytes a rank).
Knows nothing of files or devices.

A cut names a mesh axis, a tensor dim and a unit that is never split. `tp` cuts attention in KV groups and the
vocabulary in rows; `ep` places whole experts; `etp` cuts an expert's width between MXFP4 blocks. Cuts are as even as
whole units allow, the larger parts first: 8 KV groups over 3 ranks are 3/3/2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal

from ..errors import UserError
from .spec import MXFP4_BLOCK, Spec

Axis = Literal["tp", "ep", "etp"]

BYTES_PER_ELEMENT = {"BF16": 2, "U8": 1}  # by the dtype names of the safetensors format


@dataclass(frozen=True)
class Cut:
    axis: Axis
    dim: int
    unit: int = 1  # elements along dim that stay together


@dataclass(frozen=True)
class Row:
    """One tensor of the checkpoint.

    name: ours. published: its name in the published checkpoint. dtype: of the safetensors format.
    once: the axis over which partial results are summed after this bias is added; all but the first position along it
    hold zeros instead, so that the bias counts once.
    """

    name: str
    published: str
    shape: tuple[int, ...]
    dtype: str = "BF16"
    cuts: tuple[Cut, ...] = ()
    once: Axis | None = None

    @property
    def by_expert(self) -> bool:
        """Whether dim 0 counts experts, and so stands in the plan's order of experts."""
        return ".router." in self.name or any(cut.axis == "ep" for cut in self.cuts)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BYTES_PER_ELEMENT[self.dtype]


@dataclass(frozen=True)
class Mesh:
    """How the ranks of one replica share the model: attention `ranks` ways, experts `ep` x (ranks / ep) ways."""

    ranks: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.ep < 1 or self.ranks % self.ep:
            raise UserError(
                f"ep {self.ep} does not divide {self.ranks} ranks",
                f"ep is one of {', '.join(str(n) for n in range(1, self.ranks + 1) if self.ranks % n == 0)}",
            )

    @property
    def tp(self) -> int:
        return self.ranks

    @property
    def etp(self) -> int:
        return self.ranks // self.ep

    def place(self, rank: int) -> dict[Axis, tuple[int, int]]:
        """(index, size) of `rank` along each axis; neighbours share an expert group, so etp stays on near links."""
        assert 0 <= rank < self.ranks, f"{rank = } of {self.ranks}"
        return {"tp": (rank, self.tp), "ep": (rank // self.etp, self.ep), "etp": (rank % self.etp, self.etp)}


@cache
def table(spec: Spec) -> tuple[Row, ...]:
    """All rows of `spec`, in the order in which a forward pass needs them."""
    rows = [Row("embed", "model.embed_tokens.weight", (spec.vocab, spec.hidden), cuts=(Cut("tp", 0),))]
    for layer in range(spec.layers):
        rows += _layer_rows(spec, layer)
    rows += [
        Row("norm", "model.norm.weight", (spec.hidden,)),
        Row("head", "lm_head.weight", (spec.vocab, spec.hidden), cuts=(Cut("tp", 0),)),
    ]
    return tuple(rows)


def _layer_rows(spec: Spec, layer: int) -> Iterator[Row]:
    hidden, experts = spec.hidden, spec.experts
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    group = spec.heads_per_group * spec.head_dim  # query columns that read one KV head
    # gate and up rows alternate, so a block of 32 inner columns is 64 rows of gate_up and one block of down's input
    gate_up_rows, gate_up_unit = 2 * spec.intermediate, 2 * MXFP4_BLOCK
    ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."

    def row(name: str, published: str, *shape: int, dtype: str = "BF16", cuts: tuple[Cut, ...] = (), once=None) -> Row:
        return Row(ours + name, theirs + published, shape, dtype, cuts, once)

    yield row("attn_norm", "input_layernorm.weight", hidden)
    for letter, width, unit in (
        ("q", q_width, group),
        ("k", kv_width, spec.head_dim),
        ("v", kv_width, spec.head_dim),
    ):
        cut = (Cut("tp", 0, unit),)
        yield row(f"{letter}.weight", f"self_attn.{letter}_proj.weight", width, hidden, cuts=cut)
        yield row(f"{letter}.bias", f"self_attn.{letter}_proj.bias", width, cuts=cut)
    yield row("sinks", "self_attn.sinks", spec.heads, cuts=(Cut("tp", 0, spec.heads_per_group),))
    yield row("o.weight", "self_attn.o_proj.weight", hidden, q_width, cuts=(Cut("tp", 1, group),))
    yield row("o.bias", "self_attn.o_proj.bias", hidden, once="tp")
    yield row("mlp_norm", "post_attention_layernorm.weight", hidden)
    yield row("router.weight", "mlp.router.weight", experts, hidden)
    yield row("router.bias", "mlp.router.bias", experts)
    packed = MXFP4_BLOCK // 2  # two FP4 values a byte
    whole = Cut("ep", 0)
    rows_cut = (whole, Cut("etp", 1, gate_up_unit))
    blocks_cut = (whole, Cut("etp", 2))
    up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    shape = (experts, gate_up_rows, spec.hidden_blocks)
    yield row("gate_up.blocks", f"{up}_blocks", *shape, packed, dtype="U8", cuts=rows_cut)
    yield row("gate_up.scales", f"{up}_scales", *shape, dtype="U8", cuts=rows_cut)
    yield row("gate_up.bias", f"{up}_bias", experts, gate_up_rows, cuts=rows_cut)
    shape = (experts, hidden, spec.intermediate_blocks)
    yield row("down.blocks", f"{down}_blocks", *shape, packed, dtype="U8", cuts=blocks_cut)
    yield row("down.scales", f"{down}_scales", *shape, dtype="U8", cuts=blocks_cut)
    yield row("down.bias", f"{down}_bias", experts, hidden, cuts=(whole,), once="etp")


def part(total: int, unit: int, index: int, size: int) -> slice:
    """Elements of `total` that position `index` of `size` holds: whole units, as even as they go, larger parts first.

    Raises UserError if there are fewer units than positions.
    """
    assert total % unit == 0, f"{total = } is no multiple of {unit = }"
    units = total // unit
    if units < size:
        raise UserError(f"{units} units of {unit} cannot be cut {size} ways", f"use at most {units} ranks")
    small, larger = divmod(units, size)
    start = index * small + min(index, larger)
    stop = start + small + (index < larger)
    return slice(start * unit, stop * unit)


def local_slices(row: Row, mesh: Mesh, rank: int) -> tuple[slice, ...]:
    """The slice along each dim of `row` that `rank` holds."""
    place = mesh.place(rank)
    slices = [slice(0, size) for size in row.shape]
    for cut in row.cuts:
        try:
            slices[cut.dim] = part(row.shape[cut.dim], cut.unit, *place[cut.axis])
        except UserError as error:
            raise UserError(
                f"{row.published} {list(row.shape)} along {cut.axis}: {error.message}", error.hint
            ) from None
    return tuple(slices)


def local_shape(row: Row, mesh: Mesh, rank: int) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in local_slices(row, mesh, rank))


def is_zero_here(row: Row, mesh: Mesh, rank: int) -> bool:
    """True where `rank` holds zeros in place of a bias that another rank adds (see Row.once)."""
    return row.once is not None and mesh.place(rank)[row.once][0] > 0


def local_bytes(row: Row, mesh: Mesh, rank: int) -> int:
    """Bytes of `row` on `rank` in the checkpoint's own dtype."""
    return prod(local_shape(row, mesh, rank)) * BYTES_PER_ELEMENT[row.dtype]


def checkpoint_bytes(spec: Spec) -> int:
    """All tensors: 13,761,264,768 for gpt-oss-20b and 65,248,815,744 for 120b."""
    return sum(row.nbytes for row in table(spec))

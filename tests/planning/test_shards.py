"""The shard table: totals as published, and every cut covers every tensor exactly once in whole units."""

import math

import pytest
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning.shards import (
    Mesh,
    Row,
    checkpoint_bytes,
    is_zero_here,
    local_bytes,
    local_shape,
    local_slices,
    part,
    table,
)
from gptoss_launch.parallel.planning.spec import PUBLISHED

SINGLE = Mesh()

MESHES = [Mesh(ranks, ep) for ranks in range(1, 9) for ep in range(1, ranks + 1) if ranks % ep == 0]


@pytest.mark.parametrize(
    ("model", "total_bytes"), [("openai/gpt-oss-20b", 13_761_264_768), ("openai/gpt-oss-120b", 65_248_815_744)]
)
def test_totals_are_the_published_ones(model: str, total_bytes: int) -> None:
    spec = PUBLISHED[model]
    assert checkpoint_bytes(spec) == total_bytes
    assert sum(local_bytes(row, SINGLE, 0) for row in table(spec)) == total_bytes


def rows_of_each_kind(model: str) -> tuple[Row, ...]:
    """Layers have equal rows, so the first one stands for all."""
    return tuple(row for row in table(PUBLISHED[model]) if not row.name.startswith("layers.") or ".0." in row.name)


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh.ranks}x{mesh.ep}")
def test_union_of_slices_is_the_tensor(model: str, mesh: Mesh) -> None:
    for row in rows_of_each_kind(model):
        boxes = {tuple((s.start, s.stop) for s in local_slices(row, mesh, rank)) for rank in range(mesh.ranks)}
        intervals = [sorted({box[dim] for box in boxes}) for dim in range(len(row.shape))]
        for dim, size in enumerate(row.shape):  # along each dim: from 0 to size, each begins where the last one ended
            edges = [0, *(stop for _, stop in intervals[dim])]
            assert [start for start, _ in intervals[dim]] == edges[:-1] and edges[-1] == size, row.name
        assert len(boxes) == math.prod(len(found) for found in intervals), row.name  # and all their combinations
        for cut in row.cuts:
            assert all(start % cut.unit == 0 for start, _ in intervals[cut.dim]), row.name
        # a bias that is summed over an axis is held once along it
        holders = [
            tuple((s.start, s.stop) for s in local_slices(row, mesh, rank))
            for rank in range(mesh.ranks)
            if not is_zero_here(row, mesh, rank)
        ]
        assert set(holders) == boxes, row.name
        if row.once is not None:
            assert len(holders) == len(boxes), row.name


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh.ranks}x{mesh.ep}")
def test_parts_of_one_rank_belong_together(mesh: Mesh) -> None:
    rows = {row.name: row for row in rows_of_each_kind("openai/gpt-oss-20b")}
    for rank in range(mesh.ranks):
        q, k, v, sinks, out = (
            local_shape(rows[f"layers.0.{name}"], mesh, rank)
            for name in ("q.weight", "k.weight", "v.weight", "sinks", "o.weight")
        )
        assert q[0] == 64 * sinks[0] == 8 * k[0] == 8 * v[0] == out[1]
        up, down = (local_slices(rows[f"layers.0.{name}.blocks"], mesh, rank) for name in ("gate_up", "down"))
        assert up[0] == down[0]  # the same experts
        assert (up[1].start, up[1].stop) == (64 * down[2].start, 64 * down[2].stop)  # the same inner columns


def test_uneven_parts_put_the_larger_first() -> None:
    assert [part(8, 1, index, 3) for index in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 8)]
    assert [part(90 * 32, 32, i, 4).stop // 32 for i in range(4)] == [23, 46, 68, 90]


def test_refusals_have_the_numbers() -> None:
    row = next(row for row in table(PUBLISHED["openai/gpt-oss-20b"]) if row.name == "layers.0.k.weight")
    with pytest.raises(UserError) as caught:
        local_slices(row, Mesh(9), 0)
    assert "model.layers.0.self_attn.k_proj.weight [512, 2880]" in caught.value.message
    assert "8 units of 64 cannot be cut 9 ways" in caught.value.message
    with pytest.raises(UserError, match="ep 3 does not divide 4 ranks") as caught:
        Mesh(4, 3)
    assert caught.value.hint == "ep is one of 1, 2, 4"

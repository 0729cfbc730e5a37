"""Damaged checkpoints are named by file and tensor before anything is started."""

import dataclasses
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning.headers import INDEX, SINGLE_FILE, check_inventory, read_inventory
from gptoss_launch.parallel.planning.shards import BYTES_PER_ELEMENT, table
from gptoss_launch.parallel.planning.spec import PUBLISHED, alternating_kinds

SPEC = dataclasses.replace(
    PUBLISHED["openai/gpt-oss-20b"],
    layers=2,
    layer_kinds=alternating_kinds(2),
    hidden=64,
    intermediate=64,
    experts=4,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=32,
)
Tensors = dict[str, tuple[str, list[int]]]  # published name: dtype, shape
DAMAGED = "model.layers.1.mlp.experts.down_proj_blocks"


def wanted_tensors() -> Tensors:
    return {row.published: (row.dtype, list(row.shape)) for row in table(SPEC)}


def write_file(path: Path, tensors: Tensors) -> None:
    """A safetensors file of zeros, written without the library."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BYTES_PER_ELEMENT.get(dtype, 4)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))


def write_two_files(folder: Path) -> None:
    tensors = list(wanted_tensors().items())
    halves = {"a.safetensors": tensors[:20], "b.safetensors": tensors[20:]}
    for file, members in halves.items():
        write_file(folder / file, dict(members))
    weight_map = {name: file for file, members in halves.items() for name, _ in members}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def check(folder: Path) -> None:
    check_inventory(SPEC, read_inventory(folder), folder)


def test_whole_checkpoints_pass(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_file(tmp_path / "one" / SINGLE_FILE, wanted_tensors())
    check(tmp_path / "one")
    (tmp_path / "two").mkdir()
    write_two_files(tmp_path / "two")
    check(tmp_path / "two")
    assert {entry.path.name for entry in read_inventory(tmp_path / "two").values()} == {
        "a.safetensors",
        "b.safetensors",
    }


def remove_tensor(tensors: Tensors) -> None:
    del tensors[DAMAGED]


def change_dtype(tensors: Tensors) -> None:
    tensors[DAMAGED] = ("F32", tensors[DAMAGED][1])


def transpose(tensors: Tensors) -> None:
    tensors[DAMAGED] = (tensors[DAMAGED][0], [4, 2, 64, 16])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove_tensor, f"no tensor {DAMAGED}"),
        (change_dtype, f"{DAMAGED} is F32, wanted U8"),
        (transpose, f"{DAMAGED} is [4, 2, 64, 16], wanted [4, 64, 2, 16]"),
    ],
)
def test_wrong_tensors(damage: Callable[[Tensors], None], named: str, tmp_path: Path) -> None:
    tensors = wanted_tensors()
    damage(tensors)
    write_file(tmp_path / SINGLE_FILE, tensors)
    with pytest.raises(UserError) as caught:
        check(tmp_path)
    assert named in caught.value.message and str(tmp_path) in caught.value.message
    assert f"{DAMAGED} U8 [4, 64, 2, 16]" in caught.value.hint


def test_offsets_that_hold_another_number_of_bytes(tmp_path: Path) -> None:
    write_file(tmp_path / SINGLE_FILE, wanted_tensors())
    raw = (tmp_path / SINGLE_FILE).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    start, stop = header[DAMAGED]["data_offsets"]
    for offsets, named in (([start, stop - 1], f"{DAMAGED} has 8191 bytes, wanted 8192"), ([stop, start], "header")):
        header[DAMAGED]["data_offsets"] = offsets
        changed = json.dumps(header).encode()
        (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])
        with pytest.raises(UserError, match=named):
            check(tmp_path)


def test_truncated_file_names_the_first_tensor_that_is_missing(tmp_path: Path) -> None:
    write_two_files(tmp_path)
    path = tmp_path / "b.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    last = list(wanted_tensors())[-1]
    with pytest.raises(UserError) as caught:
        check(tmp_path)
    assert f"{path}: truncated, {len(whole) - 1} bytes of {len(whole)}" in caught.value.message
    assert last in caught.value.message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 12) + b'{"a": {"x"}}',
        struct.pack("<Q", 9) + b'{"a": 12}',
    ],
)
def test_broken_headers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(UserError) as caught:
        check(tmp_path)
    assert str(tmp_path / SINGLE_FILE) in caught.value.message and "header" in caught.value.message


def test_index_that_names_a_missing_file(tmp_path: Path) -> None:
    write_two_files(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        check(tmp_path)
    first = list(wanted_tensors())[20]
    assert f"names b.safetensors for {first}, and there is no such file" in caught.value.message


def test_index_that_names_the_wrong_file(tmp_path: Path) -> None:
    write_two_files(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"][DAMAGED] = "a.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"a.safetensors: no tensor {DAMAGED}"):
        check(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match="no readable weight_map"):
        check(tmp_path)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither"):
        check(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        check(tmp_path / "nowhere")

"""What a checkpoint folder holds, from the headers of its files alone, checked against the shard table.

Runs in milliseconds before anything is started, so that a damaged download is named by file and tensor instead of
failing in a rank. Reads no tensor data and needs no torch.

Format: 8 bytes of little-endian header length, a JSON header, the data (https://github.com/huggingface/safetensors).
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import UserError
from .shards import BYTES_PER_ELEMENT, Row, table
from .spec import MXFP4_BLOCK, Spec

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library
_FETCH_AGAIN = "the download is incomplete or damaged: fetch the file again"


@dataclass(frozen=True)
class Entry:
    """Where one tensor is: its file, its dtype and shape as the header declares them, and its bytes in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start_bytes: int
    size_bytes: int


def read_inventory(folder: Path) -> dict[str, Entry]:
    """Published tensor name -> Entry for every tensor of the checkpoint in `folder`.

    Raises UserError, with file and tensor named, for a missing or truncated file or a broken index or header.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", "MODEL is a checkpoint folder, a hub id, or tiny")
    index = folder / INDEX
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            named = {str(tensor): str(file) for tensor, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: no readable weight_map", _FETCH_AGAIN) from None
    elif (folder / SINGLE_FILE).exists():
        named = {tensor: SINGLE_FILE for tensor in _read_header(folder / SINGLE_FILE)[0]}
    else:
        raise UserError(f"{folder} holds neither {INDEX} nor {SINGLE_FILE}", "name the folder of a checkpoint")
    inventory: dict[str, Entry] = {}
    for file in sorted(set(named.values())):
        path = folder / file
        if not path.exists():
            tensor = next(tensor for tensor, where in named.items() if where == file)
            raise UserError(f"{index} names {file} for {tensor}, and there is no such file", _FETCH_AGAIN)
        header, after = _read_header(path)
        for tensor, where in named.items():
            if where == file:
                if tensor not in header:
                    raise UserError(f"{path}: no tensor {tensor}, though {INDEX} says so", _FETCH_AGAIN)
                one = header[tensor]
                start, stop = one["data_offsets"]
                inventory[tensor] = Entry(path, one["dtype"], tuple(one["shape"]), after + start, stop - start)
    return inventory


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Tensor name -> {dtype, shape, data_offsets}, and where in the file the data begins, from which offsets count; the
    file's size is checked against them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(size - 8, _HEADER_LIMIT_BYTES):
            raise UserError(f"{path}: {size} bytes with a header of {length}", _FETCH_AGAIN)
        raw = file.read(length)
    try:
        header = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        for entry in header.values():
            _ = entry["dtype"], list(entry["shape"])
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop:
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path}: the header is no safetensors header", _FETCH_AGAIN) from None
    if size < 8 + length + end:
        short = next(name for name, entry in header.items() if 8 + length + entry["data_offsets"][1] > size)
        raise UserError(f"{path}: truncated, {size} bytes of {8 + length + end}; first missing: {short}", _FETCH_AGAIN)
    return header, 8 + length


def check_inventory(spec: Spec, inventory: dict[str, Entry], folder: Path, *, quantizes: bool = False) -> None:
    """Raise UserError unless `inventory` has every row of the shard table with its dtype and shape.

    quantizes: whoever loads it can make packed experts of bf16 ones, as Hugging Face saves those (`wide_name`).
    """
    for row in table(spec):
        entry = inventory.get(row.published)
        if entry is None and quantizes and row.dtype == "U8" and wide_name(row) in inventory:
            _check_wide(row, inventory[wide_name(row)])
            continue
        if entry is None:
            raise UserError(f"{folder}: no tensor {row.published}", _wanted(row))
        if entry.dtype != row.dtype:
            raise UserError(f"{entry.path}: {row.published} is {entry.dtype}, wanted {row.dtype}", _wanted(row))
        if entry.shape != row.shape:
            found, wanted = list(entry.shape), list(row.shape)
            raise UserError(f"{entry.path}: {row.published} is {found}, wanted {wanted}", _wanted(row))
        _check_size(entry, row.published, row.nbytes)


def wide_name(row: Row) -> str:
    """Of the bf16 tensor [experts, in, out] that some checkpoints have for a packed product's blocks and scales."""
    return row.published.removesuffix("_blocks").removesuffix("_scales")


def _check_wide(row: Row, entry: Entry) -> None:
    shape = (row.shape[0], row.shape[2] * MXFP4_BLOCK, row.shape[1])
    if (entry.dtype, entry.shape) != ("BF16", shape):
        found = f"{wide_name(row)} is {entry.dtype} {list(entry.shape)}"
        raise UserError(f"{entry.path}: {found}, wanted BF16 {list(shape)}", _wanted(row))
    _check_size(entry, wide_name(row), prod(shape) * BYTES_PER_ELEMENT["BF16"])


def _check_size(entry: Entry, published: str, size_bytes: int) -> None:
    if entry.size_bytes != size_bytes:
        raise UserError(f"{entry.path}: {published} has {entry.size_bytes} bytes, wanted {size_bytes}", _FETCH_AGAIN)


def _wanted(row: Row) -> str:
    return f"config.json asks for {row.published} {row.dtype} {list(row.shape)} in the published MXFP4 layout"

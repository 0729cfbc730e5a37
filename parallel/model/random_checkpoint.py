"""Random checkpoints in the published layout, for speed, for tests and for the embedded tiny model.

Every value is a pure function of (seed, tensor name, index) in integer arithmetic and one fp32 product, so that the
same seed gives the same bytes on any device and with any version of torch. Speed on such weights is real; text is
not.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..kernels.hash import mix
from ..planning.headers import INDEX, SINGLE_FILE
from ..planning.shards import Row, table
from ..planning.spec import Spec, config_from_spec

SINGLE_FILE_LIMIT_BYTES = 1 << 30
_CHUNK = 1 << 24  # hashes at a time: 128 MiB and a few temporaries
_FP4_RMS = 2.93  # of a uniformly random FP4 code
_INT16_RMS = 32768 / math.sqrt(3)
_NORMS = ("norm", "attn_norm", "mlp_norm")


def _words(seed: int, row: Row, count: int, device: torch.device) -> Iterator[Tensor]:
    """`count` random int64, in chunks; the stream belongs to (seed, tensor name)."""
    stream = mix(mix(torch.tensor([seed], device=device)) + zlib.crc32(row.published.encode()))
    for start in range(0, count, _CHUNK):
        yield mix(stream + torch.arange(start, min(start + _CHUNK, count), device=device))


def random_tensor(seed: int, row: Row, device: torch.device) -> Tensor:
    """The tensor of one table row, on the device: uniform values of standard deviation 1 / sqrt(fan in)."""
    kind = row.name.split(".")[-1]
    elements = math.prod(row.shape)
    if kind in _NORMS:
        return torch.ones(row.shape, dtype=torch.bfloat16, device=device)
    if row.dtype == "U8":
        octets = torch.cat([words.view(torch.uint8) for words in _words(seed, row, -(-elements // 8), device)])
        octets = octets[:elements].view(row.shape)
        if kind == "blocks":
            return octets
        fan_in = row.shape[-1] * 32
        middle = 127 + round(math.log2(1 / (math.sqrt(fan_in) * _FP4_RMS)))
        return octets % 4 + (middle - 2)  # four neighbouring exponents
    # embeddings and sinks are read one by one; biases are small; matrices keep the size of what they multiply
    deviation = {"embed": 1.0, "sinks": 1.0, "bias": 0.02}.get(kind) or 1 / math.sqrt(row.shape[-1])
    scale = torch.tensor(deviation / _INT16_RMS, dtype=torch.float32, device=device)
    parts = [
        (words.view(torch.int16).float() * scale).to(torch.bfloat16)
        for words in _words(seed, row, -(-elements // 4), device)
    ]
    return torch.cat(parts)[:elements].view(row.shape)


def write_checkpoint(
    folder: Path,
    spec: Spec,
    tokenizer: Path,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> None:
    """Write a whole checkpoint of `spec` into the empty or new `folder`: weights, config.json, tokenizer.json.

    tokenizer: a tokenizer.json with every harmony token; its ids must lie within the vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = {row["content"]: row["id"] for row in json.loads(tokenizer.read_text("utf-8"))["added_tokens"]}
    eos, pad = special["<|return|>"], special["<|endoftext|>"]
    config = config_from_spec(spec, eos_token_id=eos, pad_token_id=pad)
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": special["<|startoftext|>"], "do_sample": True, "pad_token_id": pad}
    _write_json(folder / "generation_config.json", generation | {"eos_token_id": [eos, pad, special["<|call|>"]]})
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())

    rows = table(spec)
    total_bytes, done_bytes = sum(row.nbytes for row in rows), 0
    by_file: dict[str, list[Row]] = {}
    for row in rows:
        by_file.setdefault(_file_of(row) if total_bytes > SINGLE_FILE_LIMIT_BYTES else SINGLE_FILE, []).append(row)
    for file, members in by_file.items():
        tensors = {row.published: random_tensor(seed, row, device).cpu() for row in members}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors leaves it readable by the owner alone
        done_bytes += sum(row.nbytes for row in members)
        progress(done_bytes, total_bytes)
    if list(by_file) != [SINGLE_FILE]:
        weight_map = {row.published: file for file, members in by_file.items() for row in members}
        _write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _file_of(row: Row) -> str:
    prefix, _, rest = row.name.partition(".")
    return f"model-layer-{int(rest.split('.')[0]):05d}.safetensors" if prefix == "layers" else "model-rest.safetensors"


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")

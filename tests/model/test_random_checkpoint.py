"""Checkpoints made of a seed: what tiny began its training with, and what `checkpoint random` writes; and tiny as it
ships."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from forced import answers
from gptoss_launch.configs import make_tiny
from gptoss_launch.launch.cli import run
from gptoss_launch.launch.tokenizer import REQUIRED_SPECIAL, load_tokenizer
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.model import random_checkpoint
from gptoss_launch.parallel.planning.headers import INDEX, check_inventory, read_inventory
from gptoss_launch.parallel.planning.shards import checkpoint_bytes
from gptoss_launch.parallel.planning.spec import MXFP4_BLOCK, config_from_spec, read_config
from small_models import SPECS, TINY, checkpoint, plain_engine, plain_plan, prompt

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
TINY_LIMIT_BYTES = 8_000_000
BEGAN_WITH = "148ce45253ec69799146a1e7b5b1ff3f4670ac6c85122e45aa358c663468e59c"  # sha256
# https://github.com/openai/harmony/blob/main/docs/format.md, "Special Tokens", and the ends of a text and of a prompt
HARMONY = "start end message channel constrain return call startoftext endoftext endofprompt".split()


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """A config.json of one layer, smaller than tiny."""
    spec = dataclasses.replace(SPECS["three_blocks"], layers=1, layer_kinds=("window",))
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(config_from_spec(spec, eos_token_id=1, pad_token_id=2)))
    return path


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_what_tiny_began_with_is_made_bit_for_bit(tmp_path: Path) -> None:
    make_tiny.main(tmp_path / "tiny")
    assert hashes(tmp_path / "tiny") == hashes(TINY) | {"model.safetensors": BEGAN_WITH}


def test_tiny_is_small_and_has_all_that_the_published_models_have() -> None:
    assert {path.name for path in TINY.iterdir()} == FILES
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= TINY_LIMIT_BYTES
    spec = read_config(TINY / "config.json")
    assert spec == make_tiny.SPEC
    assert spec.kv_heads == 8 and spec.experts >= 8
    assert min(spec.hidden, spec.intermediate) // MXFP4_BLOCK >= 8
    assert {*spec.layer_kinds} == {"window", "full"} and spec.window_tokens == 128
    assert json.loads((TINY / "config.json").read_text())["rope_scaling"]["rope_type"] == "yarn"
    inventory = read_inventory(TINY)
    check_inventory(spec, inventory, TINY)
    packed = [entry for name, entry in inventory.items() if re.search(r"_(blocks|scales)$", name)]
    assert len(packed) == 4 * spec.layers and {entry.dtype for entry in packed} == {"U8"}


def test_tiny_has_every_harmony_token() -> None:
    special = load_tokenizer(TINY).special
    assert {f"<|{name}|>" for name in HARMONY} | {*REQUIRED_SPECIAL} <= special.keys()
    first = make_tiny.VOCAB - len(make_tiny.SPECIAL)
    published = {"<|startoftext|>": 199998, "<|return|>": 200002, "<|call|>": 200012, "<|endofprompt|>": 200018}
    assert all(special[name] - first == number - 199998 for name, number in published.items())
    config = json.loads((TINY / "generation_config.json").read_text())
    assert config["eos_token_id"] == [special[name] for name in ("<|return|>", "<|endoftext|>", "<|call|>")]


def test_checkpoint_random_writes_one_that_runs(tmp_path: Path, spec_file: Path, capsys) -> None:
    out = tmp_path / "out"
    assert run(["checkpoint", "random", str(out), "--spec", str(spec_file), "--seed", "3"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert {path.name for path in out.iterdir()} == FILES
    spec = read_config(out / "config.json")
    assert spec == read_config(spec_file)
    engine = plain_engine(plain_plan(out))  # reads the headers and checks them
    tokens = answers(engine, [Request("a", tuple(prompt(spec, 20)), 4, Sampling(temperature=0.0))])["a"]
    assert len(tokens) == 4 and tokens[-1].finish_reason == "length"
    assert load_tokenizer(out).encode("Hello") == load_tokenizer(TINY).encode("Hello")


def test_the_seed_alone_decides(tmp_path: Path, spec_file: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(["checkpoint", "random", str(tmp_path / name), "--spec", str(spec_file), "--seed", str(seed)]) == 0
    a, b, c = (hashes(tmp_path / name) for name in "abc")
    assert a == b
    assert {name for name in FILES if a[name] != c[name]} == {"model.safetensors"}


def test_many_files_hold_the_same_tensors(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large checkpoints are written a layer a file, with an index; values do not depend on that, nor on chunks."""
    single = checkpoint("three_blocks", tmp_path_factory.mktemp("single"))
    monkeypatch.setattr(random_checkpoint, "SINGLE_FILE_LIMIT_BYTES", 0)
    monkeypatch.setattr(random_checkpoint, "_CHUNK", 1000)
    spec, folder = SPECS["three_blocks"], checkpoint("three_blocks", tmp_path)
    written = read_inventory(folder)
    assert len({entry.path for entry in written.values()}) == spec.layers + 1
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == checkpoint_bytes(spec)
    assert index["weight_map"] == {name: entry.path.name for name, entry in written.items()}
    many, one = (plain_engine(plain_plan(folder)) for folder in (folder, single))
    for theirs, ours in zip(tensors(many.weights), tensors(one.weights), strict=True):
        assert torch.equal(theirs, ours)


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors(item)]
    if dataclasses.is_dataclass(value):
        return [tensor for field in dataclasses.fields(value) for tensor in tensors(getattr(value, field.name))]
    return []


def test_layers_can_be_fewer(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert run(["checkpoint", "random", out, "--spec", str(TINY / "config.json"), "--layers", "2"]) == 0
    spec = read_config(tmp_path / "out" / "config.json")
    assert spec.layers == 2 and spec.layer_kinds == ("window", "full")
    check_inventory(spec, read_inventory(tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["OUT", "--spec", "SPEC"], "OUT exists and is not an empty folder", "name a new folder"),
        (["new"], "one of --model and --spec is wanted", "--model is 20b or 120b"),
        (["new", "--model", "20b", "--spec", "SPEC"], "one of --model and --spec is wanted", "--spec a config.json"),
        (["new", "--spec", "nowhere.json"], "--spec nowhere.json: no such file", "the config.json of a checkpoint"),
        (["new", "--model", "21b"], "--model 21b: no such size", "did you mean 20b?"),
        (["new", "--spec", "SPEC", "--sed", "1"], "no option --sed", "did you mean --seed?"),
    ],
)
def test_wrong_input_writes_nothing(
    arguments: list[str], message: str, hint: str, tmp_path: Path, spec_file: Path, capsys
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept").write_text("mine")
    paths = {"OUT": str(full), "SPEC": str(spec_file), "new": str(tmp_path / "new")}
    assert run(["checkpoint", "random", *(paths.get(argument, argument) for argument in arguments)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ") and message.replace("OUT", str(full)) in first
    assert second.startswith("hint: ") and hint in second
    assert [path.name for path in full.iterdir()] == ["kept"] and not (tmp_path / "new").exists()

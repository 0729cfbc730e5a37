"""What a run leaves, read by others: PEFT, transformers, and our own serving pass."""

import dataclasses
import json
import warnings
from pathlib import Path

import oracles
import peft
import pytest
import torch
from gptoss_launch.launch.cli import run
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.planning.headers import check_inventory, read_inventory
from gptoss_launch.parallel.training import attention, export
from gptoss_launch.parallel.training.adapters import from_peft, new_adapter, to_peft
from gptoss_launch.parallel.training.batch import make_pack
from gptoss_launch.parallel.training.checkpoints import ranks_of, write_save
from gptoss_launch.parallel.training.export import export_adapter
from gptoss_launch.parallel.training.forward import Precision, forward, inputs_of
from gptoss_launch.parallel.training.gate import serving_logits
from gptoss_launch.parallel.training.job import Job, Recipe, write_job
from gptoss_launch.parallel.training.samples import sample
from gptoss_launch.parallel.training.saves import saves
from gptoss_launch.parallel.training.start import load_frozen
from gptoss_launch.parallel.training.trainee import Trainee, load_trainee
from gptoss_launch.parallel.training.updates import Kept
from gptoss_launch.parallel.training.world import ALONE
from safetensors.torch import load_file
from small_models import SPECS, checkpoint, prompt
from torch import Tensor

CPU = torch.device("cpu")
NAME = "three_blocks"
TOKENS = prompt(SPECS[NAME], 40)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(NAME, tmp_path_factory.mktemp("checkpoints"))


def saved_run(base: Path, folder: Path, mode: str = "lora", attention_rank: int = 4, expert_rank: int = 2):
    """(job, trainee) of a run whose trained tensors have all moved, saved as its step 1."""
    recipe = Recipe(1e-3, "constant", 0, 0, 0.9, 0.95, 0, 1)
    job = Job("small", str(base), SPECS[NAME], "lora", attention_rank, 8, expert_rank, 6, "fp32", "cpu", 64, 1, 1,
              recipe, 0, "", (1.0,), 0, 1, 0, False)  # fmt: skip
    job = dataclasses.replace(job, mode=mode)
    folder.mkdir()
    trainee = load_trainee(job, ALONE, None, lambda done, total: None)
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: leaf.detach() + torch.randn(leaf.shape, generator=generator) * 0.03
        for name, leaf in trainee.leaves.items()
    }
    trainee.updates.write(lambda name: Kept(moved[name], *[torch.zeros_like(moved[name])] * 2), 1)
    write_job(folder, job)
    write_save(job, folder, 1, trainee.leaves, 0, trainee.updates, ALONE)
    return job, trainee


@torch.no_grad()
def trained_logits(trainee: Trainee) -> Tensor:
    pack = make_pack([sample(TOKENS, [0.0] * len(TOKENS))], CPU)
    inputs = inputs_of(SPECS[NAME], trainee.model, pack, attention.PLAIN)
    hidden, _ = forward(SPECS[NAME], trainee.model, inputs, attention.PLAIN, Precision(torch.float32, torch.float32))
    return hidden @ trainee.model.head_VH.T


def error(ours: Tensor, wanted: Tensor) -> float:
    return ((ours - wanted).abs().max() / wanted.abs().max()).item()


def mean_error(ours: Tensor, wanted: Tensor) -> float:
    """A rounding that changes which expert a token takes shows in one row, a tensor in the wrong place in all."""
    return ((ours - wanted).abs().mean() / wanted.abs().mean()).item()


@torch.no_grad()
def logits_of(model) -> Tensor:
    return model(torch.tensor([TOKENS]), use_cache=False).logits[0]


@pytest.mark.parametrize("ranks", [(4, 2), (4, 0), (0, 2)])
def test_adapters_load_in_peft(base: Path, ranks: tuple[int, int], tmp_path: Path) -> None:
    _, trainee = saved_run(base, tmp_path / "run", "lora", *ranks)
    assert run(["export", str(tmp_path / "run"), "--format", "adapter", "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = oracles.load_transformers(base)
    plain = logits_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    theirs, ours = logits_of(model), trained_logits(trainee)
    assert error(plain, ours) > 1e-2, "the adapter does nothing"
    assert error(theirs, ours) <= 1e-5


def test_adapters_come_back_as_they_were(base: Path, tmp_path: Path) -> None:
    job, _ = saved_run(base, tmp_path / "run")
    ranks = ranks_of(job)
    tensors = new_adapter(job.spec, ranks, 5, CPU)
    back = from_peft(to_peft(tensors), job.spec, ranks)
    assert all(torch.equal(tensors[name], back[name]) for name in tensors) and back.keys() == tensors.keys()
    stored = to_peft(tensors)
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    for wrong in (
        {key: value for key, value in stored.items() if key != name},
        stored | {name: stored[name][:-1]},
        stored | {"base_model.model.more": stored[name]},
    ):
        with pytest.raises(UserError, match="adapter: "):
            from_peft(wrong, job.spec, ranks)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_merged_bf16_checkpoint_loads_in_transformers(base: Path, mode: str, tmp_path: Path) -> None:
    _, trainee = saved_run(base, tmp_path / "run", mode)
    out = tmp_path / "out"
    assert run(["export", str(tmp_path / "run"), "--format", "bf16", "--out", str(out)]) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # what was fp32 is bf16 now: 2 ** -8 of each weight
    assert mean_error(logits_of(model.float()), trained_logits(trainee)) <= 2e-2


def test_a_full_run_is_served_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    """mxfp4: experts are the very values that training computed with; the rest is rounded to bf16."""
    _, trainee = saved_run(base, tmp_path / "run", "full")
    out = tmp_path / "out"
    assert run(["export", str(tmp_path / "run"), "--format", "mxfp4", "--out", str(out)]) == 0
    check_inventory(SPECS[NAME], read_inventory(out), out)
    weights = load_frozen(SPECS[NAME], out, "fp32", CPU, lambda done, total: None)
    ours = serving_logits(SPECS[NAME], weights, torch.tensor(TOKENS), torch.float32)
    assert mean_error(ours, trained_logits(trainee)) <= 2e-2


@pytest.mark.parametrize("files", [1, SPECS[NAME].layers + 1])
def test_what_was_not_trained_keeps_its_bytes(
    base: Path, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one file, or in a file a layer with an index."""
    if files > 1:
        monkeypatch.setattr(export, "SINGLE_FILE_LIMIT_BYTES", 0)
    saved_run(base, tmp_path / "run", "lora", 4, 0)
    out = tmp_path / "out"
    assert run(["export", str(tmp_path / "run"), "--format", "mxfp4", "--out", str(out)]) == 0
    assert len(list(out.glob("*.safetensors"))) == files
    check_inventory(SPECS[NAME], read_inventory(out), out)
    before = load_file(base / "model.safetensors")
    after = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 4 * SPECS[NAME].layers and all("_proj.weight" in name for name in changed)


def test_what_cannot_be_exported_is_said(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, _ = saved_run(base, tmp_path / "run", "full")
    with pytest.raises(UserError, match="there is no adapter"):
        export_adapter(job, saves(tmp_path / "run")[-1][1], tmp_path)
    assert run(["export", str(tmp_path), "--format", "bf16", "--out", str(tmp_path / "x")]) == 2
    assert "no readable job.json" in capsys.readouterr().err
    inside = tmp_path / "run" / "job.json" / "out"
    assert run(["export", str(tmp_path / "run"), "--format", "bf16", "--out", str(inside)]) == 2
    assert f"--out {inside}: Not a directory\nhint: " in capsys.readouterr().err
    assert run(["export", str(tmp_path / "run"), "--format", "bf16", "--out", str(tmp_path / "run")]) == 2
    assert "not an empty folder" in capsys.readouterr().err

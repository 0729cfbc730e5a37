"""The training forward: equal to serving's, its gradients equal to those of transformers and PEFT, packs to samples."""

import dataclasses
import warnings
from pathlib import Path

import oracles
import peft
import pytest
import torch
from gptoss_launch.parallel.planning.spec import PUBLISHED
from gptoss_launch.parallel.training import attention
from gptoss_launch.parallel.training.adapters import (
    Rank,
    Ranks,
    adapted,
    new_adapter,
    pairs,
    parameter_counts,
    peft_config,
    to_peft,
)
from gptoss_launch.parallel.training.batch import Pack, make_pack
from gptoss_launch.parallel.training.forward import Precision, forward, inputs_of, loads
from gptoss_launch.parallel.training.gate import serving_logits
from gptoss_launch.parallel.training.loss import cross_entropy
from gptoss_launch.parallel.training.model import full_model, lora_model
from gptoss_launch.parallel.training.samples import sample
from gptoss_launch.parallel.training.start import load_frozen, parameter_shapes, read_parameters
from small_models import SPECS, checkpoint, prompt
from torch import Tensor

CPU = torch.device("cpu")
FP32 = Precision(torch.float32, torch.float32)
RANKS: Ranks = {"attention": Rank(4, 8), "experts": Rank(2, 6)}
NAMES = ["tiny", "three_blocks"]


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def documents(name: str, lengths: tuple[int, ...]) -> list:
    """Random samples whose loss weights are 0, 0.5, 1 or 2."""
    spec = SPECS[name]
    made = []
    for number, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(number)
        weights = torch.tensor([0.0, 0.5, 1.0, 2.0])[torch.randint(0, 4, (length,), generator=generator)]
        weights[0] = 0
        made.append(sample(prompt(spec, length, seed=number), weights.tolist()))
    return made


def adapter(name: str) -> dict[str, Tensor]:
    """One that adds something: B is drawn, too."""
    tensors = new_adapter(SPECS[name], RANKS, seed=3, device=CPU)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key.endswith(".b"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return tensors


def loss_of(name: str, folder: Path, tensors: dict[str, Tensor], pack: Pack, recompute: bool = True) -> Tensor:
    spec = SPECS[name]
    model = lora_model(spec, load_frozen(spec, folder, "fp32", CPU, quiet), pairs(tensors, RANKS))
    hidden, _ = forward(spec, model, inputs_of(spec, model, pack, attention.PLAIN), attention.PLAIN, FP32, recompute)
    return cross_entropy(hidden[pack.learnt_R], model.head_VH, pack.targets_R, pack.weights_R)


def all_parameters(name: str, folder: Path) -> dict[str, Tensor]:
    parts = read_parameters(SPECS[name], folder, CPU, quiet)
    return {key: tensor.requires_grad_() for _, part in parts for key, tensor in part.items()}


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_give_the_logits_of_serving(name: str, checkpoints: Path) -> None:
    folder, spec = checkpoint(name, checkpoints), SPECS[name]
    tokens = prompt(spec, 180)
    assert len(tokens) > spec.window_tokens
    frozen = load_frozen(spec, folder, "fp32", CPU, quiet)
    serving = serving_logits(spec, frozen, torch.tensor(tokens), torch.float32)
    pack = make_pack([sample(tokens, [0.0] * len(tokens))], CPU)
    models = {
        "lora": lora_model(spec, frozen, {}),
        "full": full_model(spec, all_parameters(name, folder)),
    }
    for way, model in models.items():
        with torch.no_grad():
            hidden, chosen = forward(spec, model, inputs_of(spec, model, pack, attention.PLAIN), attention.PLAIN, FP32)
            logits = hidden @ model.head_VH.T
        error = ((logits - serving).abs().max() / serving.abs().max()).item()
        print(f"{name}, {way}: largest error {error:.1e} of the largest logit")
        assert error <= 1e-5 and torch.equal(logits.argmax(-1), serving.argmax(-1))
        load = loads(spec, chosen)
        assert load.shape == (spec.layers, spec.experts)
        assert all(load[layer, expert] == (chosen[layer] == expert).sum() for layer in (0, -1) for expert in (0, 5))


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_is_that_of_transformers_and_peft(name: str, checkpoints: Path) -> None:
    folder, tensors = checkpoint(name, checkpoints), adapter(name)
    samples = documents(name, (140, 40))
    loss_of(name, folder, tensors, make_pack(samples, CPU)).backward()
    ours = to_peft({key: tensor.grad for key, tensor in tensors.items() if tensor.grad is not None})
    model = peft_model(folder, to_peft(tensors))
    total = torch.zeros(())
    for one in samples:
        logits = model(torch.tensor([list(one.tokens)]), use_cache=False).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(one.tokens[1:]).long(), reduction="none")
        total = total + (nll * torch.tensor(one.weights[1:])).sum()
    total.backward()
    theirs = {
        key.replace(".default", ""): parameter.grad
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert ours.keys() == theirs.keys() and len(ours) == len(tensors) == 2 * 6 * SPECS[name].layers
    worst_cosine, worst_error = 1.0, 0.0
    for key, wanted in theirs.items():
        assert wanted is not None and wanted.abs().max() > 0
        cosine = torch.nn.functional.cosine_similarity(ours[key].flatten().double(), wanted.flatten().double(), dim=0)
        worst_cosine = min(worst_cosine, cosine.item())
        worst_error = max(worst_error, ((ours[key] - wanted).abs().max() / wanted.abs().max()).item())
    print(f"{name}: {len(ours)} gradients, cosine at least {worst_cosine:.8f}, error at most {worst_error:.1e}")
    assert worst_cosine >= 0.9999 and worst_error <= 1e-4


def peft_model(folder: Path, tensors: dict[str, Tensor]):
    """transformers' model in fp32 with PEFT's LoRA round it, its values those of `tensors`."""
    model = oracles.load_transformers(folder)
    fields = peft_config(RANKS, "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{k: v for k, v in fields.items() if k != "peft_type"}))
        done = peft.set_peft_model_state_dict(wrapped, tensors)
    assert not done.unexpected_keys and not [key for key in done.missing_keys if "lora" in key]
    for key, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in key)
    return wrapped


@pytest.mark.parametrize("name", NAMES)
def test_a_pack_loses_what_its_samples_lose_one_by_one(name: str, checkpoints: Path) -> None:
    folder, tensors = checkpoint(name, checkpoints), adapter(name)
    samples = documents(name, (150, 1, 33, 18, 60))
    packed = make_pack(samples, CPU)
    with torch.no_grad():
        for number, one in enumerate(samples):
            alone = loss_of(name, folder, tensors, make_pack([one], CPU))
            begin, end = packed.bounds[number : number + 2]
            here = (packed.learnt_R >= begin) & (packed.learnt_R < end)
            pack = dataclasses.replace(packed, weights_R=packed.weights_R * here)
            assert loss_of(name, folder, tensors, pack).item() == pytest.approx(alone.item(), rel=1e-5, abs=1e-5)


def test_recomputing_a_layer_changes_no_gradient(checkpoints: Path) -> None:
    grads = []
    for recompute in (True, False):
        tensors = adapter("three_blocks")
        pack = make_pack(documents("three_blocks", (50, 20)), CPU)
        loss_of("three_blocks", checkpoint("three_blocks", checkpoints), tensors, pack, recompute).backward()
        grads.append({key: tensor.grad for key, tensor in tensors.items()})
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


def test_full_gradients_are_those_of_transformers(checkpoints: Path) -> None:
    """All weights, the head and the embedding among them. The experts' are MXFP4 values already, so that rounding
    them again changes nothing."""
    folder, spec = checkpoint("three_blocks", checkpoints), SPECS["three_blocks"]
    parameters = all_parameters("three_blocks", folder)
    (one,) = documents("three_blocks", (70,))
    pack = make_pack([one], CPU)
    model = full_model(spec, parameters)
    hidden, _ = forward(spec, model, inputs_of(spec, model, pack, attention.PLAIN), attention.PLAIN, FP32)
    cross_entropy(hidden[pack.learnt_R], model.head_VH, pack.targets_R, pack.weights_R).backward()
    theirs = oracles.load_transformers(folder)
    logits = theirs(torch.tensor([list(one.tokens)]), use_cache=False).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(one.tokens[1:]).long(), reduction="none")
    (nll * torch.tensor(one.weights[1:])).sum().backward()
    layer = theirs.model.layers[1]
    pairs_of = {
        "embed": theirs.model.embed_tokens.weight,
        "head": theirs.lm_head.weight,
        "norm": theirs.model.norm.weight,
        "layers.1.attn_norm": layer.input_layernorm.weight,
        "layers.1.q.weight": layer.self_attn.q_proj.weight,
        "layers.1.k.bias": layer.self_attn.k_proj.bias,
        "layers.1.sinks": layer.self_attn.sinks,
        "layers.1.o.weight": layer.self_attn.o_proj.weight,
        "layers.1.router.weight": layer.mlp.router.weight,
        "layers.1.gate_up.weight": layer.mlp.experts.gate_up_proj,
        "layers.1.gate_up.bias": layer.mlp.experts.gate_up_proj_bias,
        "layers.1.down.weight": layer.mlp.experts.down_proj,
    }
    assert parameters.keys() == parameter_shapes(spec).keys()
    for key, parameter in pairs_of.items():
        ours, wanted = parameters[key].grad, parameter.grad
        assert ours is not None
        if wanted.dim() == 3:
            wanted = wanted.transpose(1, 2)
        assert ((ours - wanted).abs().max() / wanted.abs().max()).item() <= 1e-4, key


def test_parameter_counts_are_those_of_the_published_models() -> None:
    """Per unit of rank 20b trains 24 x 20,736 values of attention and 24 x 32 x 14,400 of the experts."""
    shapes = adapted(PUBLISHED["openai/gpt-oss-20b"], {"attention": Rank(1, 1), "experts": Rank(1, 1)})
    empty = {
        f"{key}.{letter}": torch.empty(shape, device="meta")
        for key, both in shapes.items()
        for letter, shape in zip("ab", both, strict=True)
    }
    assert parameter_counts(empty) == {"attention": 24 * 20_736, "experts": 24 * 32 * 14_400}


def test_the_serving_pass_of_the_gate_is_that_of_transformers(checkpoints: Path) -> None:
    folder, spec = checkpoint("three_blocks", checkpoints), SPECS["three_blocks"]
    tokens = prompt(spec, 60)
    frozen = load_frozen(spec, folder, "fp32", CPU, quiet)
    ours = serving_logits(spec, frozen, torch.tensor(tokens), torch.float32)
    exact = oracles.transformers_run(folder, tokens).logits
    assert ((ours - exact).abs().max() / exact.abs().max()).item() <= 1e-5

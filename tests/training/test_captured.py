"""Packs through CUDA graphs: losses and gradients are those of kernels launched one by one, for packs of any length."""

from pathlib import Path

import pytest
import torch
from gptoss_launch.parallel.training import attention, captured, operations
from gptoss_launch.parallel.training.adapters import Rank, Ranks, new_adapter, pairs
from gptoss_launch.parallel.training.batch import Pack, make_pack
from gptoss_launch.parallel.training.forward import Inputs, Precision, forward, inputs_of, loads, summed_loss
from gptoss_launch.parallel.training.model import lora_model
from gptoss_launch.parallel.training.samples import sample
from gptoss_launch.parallel.training.start import load_frozen
from small_models import GPU, SPECS, checkpoint, prompt
from torch import Tensor

# torch 2.11's own, while its compiler is loaded and compiles flex_attention
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

SPEC, CAPACITY = SPECS["true_width"], 300


def pack_of(*lengths: int) -> Pack:
    samples = [sample(prompt(SPEC, length, seed=length), [0.0, *[1.0] * (length - 1)]) for length in lengths]
    return make_pack(samples, torch.device("cuda"))


@pytest.mark.parametrize("host_layers", [0, 1])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_losses_loads_and_gradients_are_those_of_single_launches(device: str, host_layers: int, tmp_path: Path) -> None:
    """With experts on the device, and in host memory."""
    where, bf16 = torch.device(device), torch.bfloat16
    folder = checkpoint("true_width", tmp_path)
    frozen = load_frozen(SPEC, folder, "bf16", where, lambda done, total: None, host_layers)
    assert frozen.layers[0].gate_up.blocks.is_cuda == (host_layers == 0)
    assert frozen.norm_H.is_cuda and frozen.embed_VH.device.type == "cpu"
    ranks: Ranks = {"attention": Rank(8, 8), "experts": Rank(8, 8)}
    leaves = new_adapter(SPEC, ranks, 0, where)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.add_(torch.randn_like(leaf) * 0.02)
    model, ops, flex = lora_model(SPEC, frozen, pairs(leaves, ranks)), operations.fused(), attention.flex(CAPACITY)

    def through(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return forward(SPEC, model, inputs, flex, Precision(bf16, bf16), True, ops)

    def losses(run: captured.Run) -> list[Tensor]:
        found = []
        for pack in (pack_of(300), pack_of(7, 130, 1), pack_of(33, 200)):
            x_TH, experts_LTX = run(inputs_of(SPEC, model, pack, flex))
            loss = summed_loss(model, pack, x_TH)
            loss.backward()
            found += [loss.detach(), loads(SPEC, experts_LTX)]
        return found + [leaf.grad.clone() for leaf in leaves.values() if leaf.grad is not None]

    exact = losses(through)
    choice = captured.choose(through, inputs_of(SPEC, model, pack_of(300), flex), flex.tensors, leaves.values(), True)
    assert choice.why == "passes: two CUDA graphs"
    found = losses(choice.run)  # gradients began from zero again
    assert len(found) == len(exact) == 6 + len(leaves)
    for ours, wanted in zip(found, exact, strict=True):
        assert torch.allclose(ours, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())

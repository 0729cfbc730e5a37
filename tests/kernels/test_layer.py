"""A layer's fused operations for training, against the plain ones: results and gradients."""

import dataclasses
from typing import Any

import pytest
import torch
from gptoss_launch.parallel.kernels.triton_mixture import sort
from gptoss_launch.parallel.planning import training
from gptoss_launch.parallel.planning.spec import Spec
from gptoss_launch.parallel.training import attention, operations
from gptoss_launch.parallel.training.batch import make_pack
from gptoss_launch.parallel.training.forward import Precision, forward, inputs_of, summed_loss
from gptoss_launch.parallel.training.model import full_model
from gptoss_launch.parallel.training.products import one_by_one
from gptoss_launch.parallel.training.samples import sample
from gptoss_launch.parallel.training.start import parameter_shapes
from small_models import GPU, SPECS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("limit_bytes", [1 << 28, 1])
def test_fused_operations_are_exact(limit_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the matrices of a product whole, and a block of rows or columns at a time."""
    monkeypatch.setattr(training, "PART_LIMIT_BYTES", limit_bytes)
    monkeypatch.setattr(training, "PART_MULTIPLE", 32)
    dtype, most = (torch.float32, 1e-5) if DEVICE.type == "cpu" else (torch.bfloat16, operations.ERROR_LIMIT)
    assert operations.largest_error(operations.fused(), DEVICE, dtype) < most


def test_the_check_passes_what_is_right_and_catches_what_is_not() -> None:
    fused, plain = operations.fused(), operations.PLAIN
    assert operations.largest_error(fused, DEVICE, torch.bfloat16) < operations.ERROR_LIMIT
    wrong: dict[str, dict[str, Any]] = {
        "no adapter": {"mix": lambda a, *rest: one_by_one(dataclasses.replace(a, added=None), *rest)},
        "another expert": {"mix": lambda a, b, x, w, e, *rest: one_by_one(a, b, x, w, e.flip(1), *rest)},
        "no gradient": {"mix": lambda a, b, x, *rest: one_by_one(a, b, x.detach(), *rest) + 0 * x},
        "no gradient of weights": {
            "mix": lambda a, b, x, w, *rest: one_by_one(a, b, x, w.detach(), *rest) + 0 * w.sum()
        },
        "another norm": {"add_norm": lambda x, d, w, eps, dtype: plain.add_norm(x, d, w, eps + 0.1, dtype)},
        "no residual": {"add_norm": lambda x, *rest: plain.add_norm(x.detach() + 0 * x, *rest)},
        "no bias": {"route": lambda x, weight, bias, most: plain.route(x, weight, 0 * bias, most)},
        "another target": {"slopes": lambda x, t, w: plain.slopes(x, t + 1, w)},
        "no gradient of the router's input": {
            "route": lambda x, *rest: _plus(plain.route(x.detach(), *rest), 0 * x.sum())
        },
    }
    for name, changes in wrong.items():
        candidate = dataclasses.replace(plain, **changes)
        assert operations.largest_error(candidate, DEVICE, torch.bfloat16) > operations.ERROR_LIMIT, name


def _plus(result: tuple[torch.Tensor, torch.Tensor], nothing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return result[0] + nothing, result[1]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_fused_is_chosen_on_a_gpu(device: str) -> None:
    choice = operations.choose(torch.device(device), torch.bfloat16, (32,))
    assert choice.ops == operations.fused(), choice.why


def test_rows_are_sorted_by_expert_then_by_pair() -> None:
    chosen = torch.tensor([[3, 0], [0, 1], [3, 1]], device=DEVICE)
    order = sort(chosen, 5)
    assert order.pairs_P.tolist() == [1, 2, 3, 5, 0, 4]
    assert order.rows_P.tolist() == [4, 0, 1, 2, 5, 3]
    assert order.starts_E.tolist() == [0, 2, 4, 4, 6, 6] and order.ends_E.tolist() == [2, 4, 4, 6, 6]


@pytest.mark.slow
def test_a_layer_computed_again_has_the_same_gradients() -> None:
    """Its sum is not computed then: whoever read it would have other gradients. All weights trained, two layers."""
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    spec: Spec = SPECS["three_blocks"]
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5
        for name, shape in parameter_shapes(spec).items()
    }
    pack = make_pack([sample(range(3, 11), [0.0, *[1.0] * 7]), sample([5, 2], [0.0, 1.0])], DEVICE)

    def gradients(ops: operations.Operations, recompute: bool) -> dict[str, torch.Tensor]:
        leaves = {name: value.to(DEVICE).requires_grad_() for name, value in values.items()}
        model = full_model(spec, leaves)
        inputs = inputs_of(spec, model, pack, attention.PLAIN)
        x_TH, _ = forward(spec, model, inputs, attention.PLAIN, Precision(dtype, dtype), recompute, ops)
        loss = summed_loss(model, pack, x_TH)
        loss.backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    again, once, plain = (
        gradients(*way) for way in ((operations.fused(), True), (operations.fused(), False), (operations.PLAIN, True))
    )
    assert again.keys() == once.keys() == plain.keys() == values.keys()
    for name, exact in plain.items():
        assert torch.equal(again[name], once[name]), name
        if dtype == torch.float32:
            assert torch.allclose(again[name], exact, atol=1e-4 * exact.abs().max().item()), name

"""All experts at once, against one after the other: the products with their adapters, biases and gradients."""

import dataclasses

import pytest
import torch
from gptoss_launch.parallel.kernels.triton_mixture import sort
from gptoss_launch.parallel.planning.spec import Spec
from gptoss_launch.parallel.training import attention, experts
from gptoss_launch.parallel.training.batch import make_pack
from gptoss_launch.parallel.training.forward import Precision, summed_loss
from gptoss_launch.parallel.training.grouped import at_once
from gptoss_launch.parallel.training.model import full_model
from gptoss_launch.parallel.training.products import Mix, one_by_one
from gptoss_launch.parallel.training.samples import sample
from gptoss_launch.parallel.training.start import parameter_shapes
from small_models import GPU, SPECS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_all_at_once_is_right_and_the_check_catches_what_is_not() -> None:
    if DEVICE.type == "cpu":
        assert experts.largest_error(at_once, DEVICE, torch.float32) < 1e-5
    assert experts.largest_error(at_once, DEVICE, torch.bfloat16) < experts.ERROR_LIMIT
    without = lambda one: dataclasses.replace(one, added=None)  # noqa: E731
    wrong: dict[str, Mix] = {
        "no adapter": lambda a, b, x, w, e, *rest: one_by_one(without(a), b, x, w, e, *rest),
        "another expert": lambda a, b, x, w, e, *rest: one_by_one(a, b, x, w, e.flip(1), *rest),
        "no gradient": lambda a, b, x, w, e, *rest: _plus(one_by_one(a, b, x.detach(), w, e, *rest), 0 * x),
        "no gradient of weights": lambda a, b, x, w, e, *rest: _plus(
            one_by_one(a, b, x, w.detach(), e, *rest), 0 * w.sum()
        ),
    }
    for name, mix in wrong.items():
        assert experts.largest_error(mix, DEVICE, torch.bfloat16) > experts.ERROR_LIMIT, name


def _plus(result: tuple[torch.Tensor, torch.Tensor], nothing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return result[0] + nothing, result[1]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_all_at_once_is_chosen_on_a_gpu(device: str) -> None:
    choice = experts.choose(torch.device(device), torch.bfloat16, (32,))
    assert choice.mix is at_once, choice.why


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

    def gradients(mix: Mix, recompute: bool) -> dict[str, torch.Tensor]:
        leaves = {name: value.to(DEVICE).requires_grad_() for name, value in values.items()}
        loss, load_LE = summed_loss(
            spec, full_model(spec, leaves), pack, attention.PLAIN, Precision(dtype, dtype), recompute, mix
        )
        assert (load_LE.sum(1) == 10 * spec.experts_per_token).all()
        loss.backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    again, once, plain = gradients(at_once, True), gradients(at_once, False), gradients(one_by_one, True)
    assert again.keys() == once.keys() == plain.keys() == values.keys()
    for name, exact in plain.items():
        assert torch.equal(again[name], once[name]), name
        if dtype == torch.float32:
            assert torch.allclose(again[name], exact, atol=1e-4 * exact.abs().max().item()), name

"""Triton's SwiGLU for training and its gradient, against autograd through the plain one in fp64."""

import pytest
import torch
from gptoss_launch.parallel.kernels import experts
from gptoss_launch.parallel.kernels.triton_swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("rows", "width"), [(1, 2), (3, 200), (17, 576)])
def test_values_and_gradients_are_those_of_the_plain_one(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, width, generator=generator) * 4).to(DEVICE)  # beyond the limit, too
    grad = torch.randn(rows, width // 2, generator=generator).to(DEVICE)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out, wanted = swiglu(ours, 7.0), experts.swiglu(exact, 7.0)
    assert torch.allclose(out.double(), wanted, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(out, ours, grad)[0], torch.autograd.grad(wanted, exact, grad.double())[0]
    assert torch.allclose(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-5)
    assert (gradients[1] == 0).any() or rows == 1

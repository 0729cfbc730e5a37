"""The operations that gradients go through, each against plain autograd in fp64."""

import pytest
import torch
from gptoss_launch.parallel.kernels.experts import Packed
from gptoss_launch.parallel.kernels.mxfp4 import FP4_VALUES, dequantize
from gptoss_launch.parallel.kernels.quantize import quantize
from gptoss_launch.parallel.kernels.rope import rotate
from gptoss_launch.parallel.training import attention, loss, operations
from gptoss_launch.parallel.training.products import Experts, Linear, LowRank
from gptoss_launch.parallel.training.quantize import through_mxfp4
from small_models import GPU, SPECS
from torch import Tensor

BOUNDS = (0, 7, 8, 40)
CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def turn(tokens: int, columns: int) -> tuple[Tensor, Tensor]:
    angles = draw(tokens, columns // 2, seed=9)
    return angles.cos() * 1.3, angles.sin() * 1.3


def naive_attention(
    qkv_TQ: Tensor, sinks_N: Tensor, window: int | None, cos: Tensor, sin: Tensor, kv_heads: int = 2
) -> Tensor:
    """Every score at once, sinks as one more column (OpenAI's sdpa)."""
    heads = len(sinks_N)
    q_TND, k_TKD, v_TKD = qkv_TQ.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    q_TND, k_TKD = rotate(q_TND, cos, sin), rotate(k_TKD, cos, sin)
    group = q_TND.shape[1] // k_TKD.shape[1]
    k, v = k_TKD.repeat_interleave(group, 1), v_TKD.repeat_interleave(group, 1)
    scores = torch.einsum("tnd,jnd->ntj", q_TND, k) * q_TND.shape[2] ** -0.5
    place = torch.arange(len(q_TND))
    document = torch.bucketize(place, torch.tensor(BOUNDS[1:]), right=True)
    seen = (place <= place[:, None]) & (document == document[:, None])
    if window is not None:
        seen &= place > place[:, None] - window
    scores = scores.masked_fill(~seen, float("-inf"))
    scores = torch.cat([scores, sinks_N[:, None, None].expand(-1, len(q_TND), 1)], -1)
    return torch.einsum("ntj,jnd->tnd", scores.softmax(-1)[..., :-1], v).flatten(1)


@pytest.mark.parametrize("limit_bytes", [1 << 28, 6 * 40 * 4 * 5])
@pytest.mark.parametrize("window", [None, 9])
def test_attention_and_its_gradients(window: int | None, limit_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles of whole documents and of a few queries."""
    monkeypatch.setattr(attention, "SCORES_LIMIT_BYTES", limit_bytes)
    leaves = [draw(40, 10 * 4, seed=1), draw(6, seed=4)]
    qkv, sinks = (leaf.requires_grad_() for leaf in leaves)
    ours = attention.PLAIN.attend(qkv, turn(40, 4), sinks, attention.PLAIN.prepare(BOUNDS, window, CPU))
    exact = naive_attention(qkv, sinks, window, *turn(40, 4))
    assert torch.allclose(ours, exact, atol=1e-12)
    grad = draw(*exact.shape, seed=5)
    for got, wanted in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(exact, leaves, grad), strict=True
    ):
        assert torch.allclose(got, wanted, atol=1e-12)


def test_the_choice_is_plain_on_a_cpu_and_says_so() -> None:
    choice = attention.choose(SPECS["tiny"], torch.device("cpu"), torch.float32, 512)
    assert choice.attention is attention.PLAIN and choice.why.startswith("attention: plain")


def test_the_self_test_passes_what_is_right_and_catches_what_is_not() -> None:
    def error(candidate: attention.Attention) -> float:
        return attention.largest_error(candidate, SPECS["tiny"], torch.device("cpu"), torch.bfloat16, 120)

    plain = attention.PLAIN
    assert error(plain) < attention.ERROR_LIMIT
    wrong = {
        "no sinks": lambda x, turn, sinks, p: plain.attend(x, turn, sinks - 100, p),
        "sinks without a gradient": lambda x, turn, sinks, p: plain.attend(x, turn, sinks.detach() + 0 * sinks, p),
        "one document": lambda x, turn, sinks, p: plain.attend(x, turn, sinks, ((0, p[0][-1]), p[1])),
        "no rotation": lambda x, turn, sinks, p: plain.attend(x, (turn[0], 0 * turn[1]), sinks, p),
        "no window": lambda x, turn, sinks, p: plain.attend(x, turn, sinks, (p[0], None)),
    }
    for name, attend in wrong.items():
        assert error(attention.Attention(name, plain.prepare, attend)) > attention.ERROR_LIMIT, name


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_flex_attention_proves_right(device: str) -> None:
    choice = attention.choose(SPECS["true_width"], torch.device(device), torch.bfloat16, 1000)
    assert choice.attention.name == "flex", choice.why


def test_layers_are_plain_where_fused_ones_cannot_be() -> None:
    for device, dtype, ranks in ((CPU, torch.bfloat16, ()), (torch.device("cuda"), torch.bfloat16, (4,))):
        assert operations.choose(device, dtype, ranks).ops is operations.PLAIN


@pytest.mark.parametrize("rows_at_once", [1000, 3])
def test_cross_entropy_in_chunks(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_LIMIT_BYTES", rows_at_once * 50 * 8)
    x, head = draw(20, 8).requires_grad_(), draw(50, 8, seed=1).requires_grad_()
    targets = torch.arange(20) * 2
    weights = torch.tensor([0.0, 1.0, 0.5, 2.0] * 5)
    ours = loss.cross_entropy(x, head, targets, weights) * 3
    exact = (torch.nn.functional.cross_entropy(x @ head.T, targets, reduction="none") * weights).sum() * 3
    assert torch.allclose(ours, exact)
    for got, wanted in zip(torch.autograd.grad(ours, (x, head)), torch.autograd.grad(exact, (x, head)), strict=True):
        assert torch.allclose(got, wanted)


@pytest.mark.parametrize("rows", [(6,), (4, 1, 2)])
def test_low_rank_additions_equal_the_sum_of_weights(rows: tuple[int, ...]) -> None:
    x = draw(5, 8).requires_grad_()
    added = [
        LowRank(draw(2, 8, seed=2 * place).requires_grad_(), draw(count, 2, seed=2 * place + 1).requires_grad_(), scale)
        for place, (count, scale) in enumerate(zip(rows, (0.7, 1.0, 2.0), strict=False))
    ]
    weight, bias = draw(sum(rows), 8, seed=13), draw(sum(rows), seed=14)
    ours = Linear(weight, bias, tuple(added))(x)
    exact = x @ (weight + torch.cat([one.scale * one.b @ one.a for one in added])).T + bias
    assert torch.allclose(ours, exact)
    grad = draw(5, sum(rows), seed=15)
    leaves = [x, *(leaf for one in added for leaf in (one.a, one.b))]
    for got, wanted in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(exact, leaves, grad), strict=True
    ):
        assert torch.allclose(got, wanted)


def test_gradients_go_through_packed_experts() -> None:
    blocks, scales = quantize(draw(3, 6, 64))
    bias = draw(3, 6, seed=1)
    weight = dequantize(blocks, scales, torch.float64)
    x = draw(5, 64, seed=2).requires_grad_()
    for expert in range(3):
        ours = Experts(Packed(blocks, scales, bias)).in_dtype(torch.float64)(expert, x)
        exact = x @ weight[expert].T + bias[expert]
        assert torch.allclose(ours, exact)
        grad = draw(5, 6, seed=3)
        assert torch.allclose(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, exact)))


def test_quantizing_takes_the_nearest_value_and_keeps_what_is_one() -> None:
    every = torch.tensor(FP4_VALUES).repeat(2)
    for exponent in (-100, -3, 0, 7):
        kept = every * 2.0**exponent
        assert torch.equal(dequantize(*quantize(kept[None]), torch.float32)[0], kept)
    values = draw(40, 96).float()
    blocks, scales = quantize(values)
    assert blocks.shape == (40, 3, 16) and scales.shape == (40, 3)
    back = dequantize(blocks, scales, torch.float32)
    assert torch.equal(dequantize(*quantize(back), torch.float32), back)
    grid = torch.tensor(FP4_VALUES) * torch.exp2(scales.float() - 127)[..., None]  # [40, 3, 16]
    distance = (values.view(40, 3, 32, 1) - grid[:, :, None]).abs().amin(-1)
    assert torch.allclose((values - back).abs().view(40, 3, 32), distance, atol=1e-7)
    assert ((values - back).square().mean() / values.square().mean()).sqrt() < 0.125
    assert torch.equal(dequantize(*quantize(torch.zeros(1, 32)), torch.float32), torch.zeros(1, 32))


def test_training_through_mxfp4_passes_gradients_straight() -> None:
    weight = draw(4, 32).float().requires_grad_()
    out = through_mxfp4(weight)
    assert torch.equal(out, dequantize(*quantize(weight.detach()), torch.float32))
    (grad,) = torch.autograd.grad(out, weight, torch.ones(4, 32) * 3)
    assert torch.equal(grad, torch.ones(4, 32) * 3)

"""What goes into flex_attention and what comes out of it, as training calls it: RoPE, layout, masks, sinks."""

import warnings

import pytest
import torch
from gptoss_launch.parallel.kernels.rope import rotate
from gptoss_launch.parallel.kernels.triton_layer import sunk, turned
from gptoss_launch.parallel.training import attention
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, SIZE, HEADS, KV_HEADS, COLUMNS = 5, 8, 6, 2, 16


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def turn(tokens: int) -> tuple[Tensor, Tensor]:
    angles = draw(tokens, COLUMNS // 2, seed=9)
    return angles.cos() * 1.3, angles.sin() * 1.3


def test_heads_are_rotated_and_laid_out() -> None:
    qkv = draw(TOKENS, (HEADS + 2 * KV_HEADS) * COLUMNS, seed=0).requires_grad_()
    parts = qkv.unflatten(1, (-1, COLUMNS)).split((HEADS, KV_HEADS, KV_HEADS), 1)
    exact = (rotate(parts[0], *turn(TOKENS)), rotate(parts[1], *turn(TOKENS)), parts[2])
    ours = turned(qkv, turn(TOKENS), HEADS, KV_HEADS, SIZE)
    for found, wanted in zip(ours, exact, strict=True):
        assert torch.allclose(found[:, :TOKENS].transpose(0, 1), wanted, atol=1e-6)
        assert not found[:, TOKENS:].any()
    grads = [draw(len(part), SIZE, COLUMNS, seed=place) for place, part in enumerate(ours)]
    (found,) = torch.autograd.grad(ours, qkv, grads, retain_graph=True)
    (wanted,) = torch.autograd.grad(exact, qkv, [grad[:, :TOKENS].transpose(0, 1) for grad in grads])
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_sinks_take_their_share(transposed: bool) -> None:
    y, lse, sinks = draw(HEADS, SIZE, COLUMNS, seed=1), draw(HEADS, SIZE, seed=2), draw(HEADS, seed=3)
    if transposed:
        y = y.transpose(0, 1).contiguous().transpose(0, 1)
    leaves = [one.requires_grad_() for one in (y, lse, sinks)]
    ours = sunk(leaves[0], leaves[1], leaves[2], TOKENS)
    share = torch.sigmoid(lse - sinks[:, None])
    exact = (y * share[..., None])[:, :TOKENS].transpose(0, 1).flatten(1)
    assert torch.allclose(ours, exact, atol=1e-6)
    grad = draw(TOKENS, HEADS * COLUMNS, seed=4)
    for found, wanted in zip(
        torch.autograd.grad(ours, leaves, grad, retain_graph=True),
        torch.autograd.grad(exact, leaves, grad),
        strict=True,
    ):
        assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="it has gradients there, which the check at the start compares")
@pytest.mark.parametrize("window", [None, 9])
def test_flex_attention_masks_documents_and_adds_sinks(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pass, not compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    candidate, bounds = attention.flex(100), (0, 7, 8, 40)
    qkv, sinks = draw(40, (HEADS + 2 * KV_HEADS) * COLUMNS, seed=1), draw(HEADS, seed=4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        ours, exact = (
            way.attend(qkv, turn(40), sinks, way.prepare(bounds, window, qkv.device))
            for way in (candidate, attention.PLAIN)
        )
    assert torch.allclose(ours, exact, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
def test_blocks_leave_out_nothing_that_is_seen(window: int | None) -> None:
    lengths = torch.tensor([130, 1, 125, 384, 127, 1])
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    place = torch.arange(len(document))
    seen = (place <= place[:, None]) & (document == document[:, None])
    if window is not None:
        seen &= place > place[:, None] - window
    tiles = seen.view(6, 128, 6, 128).transpose(1, 2)
    some, every = attention.blocks(document, window)
    assert torch.equal(every, tiles.all(3).all(2)) and (some | ~tiles.any(3).any(2)).all()
    assert torch.equal(some & ~every, some ^ every)  # what is seen wholly is seen
    if window is None:
        assert torch.equal(some, tiles.any(3).any(2))

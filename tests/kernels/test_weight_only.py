"""Weights of fewer bits than the compute dtype: how near their codes come, and every operation that reads them against
the same operation in fp32 on dequantized weights; plain torch, and Triton."""

import pytest
import torch
from gptoss_launch.parallel.kernels import attention, begin, linear, norm, triton_begin, triton_linear, triton_qkv
from gptoss_launch.parallel.kernels.weight_only import CODES, Narrow, narrowed
from small_models import GPU
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}
# the interpreter cuts to bf16 instead of rounding, and its products of bf16 are wrong
TRITON = [torch.float16, pytest.param(torch.bfloat16, marks=GPU)]
BITS = pytest.mark.parametrize("bits", ("int8", "fp8"))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def weight(rows: int, columns: int, bits: str, dtype: torch.dtype) -> tuple[Narrow, Tensor]:
    """Rows of very different sizes, one of zeros; and what they stand for."""
    sizes = torch.logspace(-3, 1, rows, device=DEVICE)[:, None]
    sizes[rows // 2] = 0
    made = narrowed(random(rows, columns, seed=5) * sizes, CODES[bits], dtype)
    return made, made.codes_OI.double() * made.scale_O.double()[:, None]


def near(got: Tensor, want: Tensor, size: Tensor) -> bool:
    """size: of the sums' terms, added up. Each of a sum's terms, and the sum, may be rounded."""
    least = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    return bool(((got.double() - want).abs() <= 1.5 * ULP[got.dtype] * (size + want.abs()) + least).all())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@BITS
def test_codes_are_the_nearest(bits: str, dtype: torch.dtype) -> None:
    given = random(50, 96) * torch.logspace(-3, 1, 50, device=DEVICE)[:, None]
    given[7] = 0
    made = narrowed(given, CODES[bits], dtype)
    assert made.shape == given.shape and made.dtype == dtype and made.codes_OI.element_size() == 1
    found = made.codes_OI.double() * made.scale_O.double()[:, None]
    largest = given.abs().amax(1, keepdim=True).double()
    # int8: half a code, 127 of which are the largest; e4m3: 4 bits, of which the last is rounded. Rounding the scale
    # itself may cut the largest ones a little
    off = largest / 254 if bits == "int8" else given.double().abs() / 16 + largest / 448 / 1024
    assert ((found - given.double()).abs() <= off * 1.01 + largest * ULP[torch.bfloat16]).all()
    assert torch.equal(found[7], torch.zeros_like(found[7]))
    assert torch.equal(made.dense(slice(3, 9)).double(), found[3:9].to(dtype).double())


def test_bf16_stays_as_it_is() -> None:
    given = random(50, 96, dtype=torch.bfloat16)
    made = narrowed(given.float(), torch.bfloat16, torch.float32)
    assert torch.equal(made.codes_OI, given) and bool((made.scale_O == 1).all())
    assert torch.equal(made.dense(slice(3, 9)), given[3:9].float())
    x_TI = random(3, 96)
    torch.testing.assert_close(linear.linear(x_TI, made), torch.nn.functional.linear(x_TI, given.float()))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("tokens", (0, 1, 16, 17))
@BITS
def test_plain_linear(bits: str, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in tiles that do not come out even."""
    monkeypatch.setattr("gptoss_launch.parallel.kernels.weight_only.DENSE_TILE_BYTES", 3 * 96 * dtype.itemsize)
    x_TI, (weight_OI, dense_OI) = random(tokens, 96, dtype=dtype), weight(64, 96, bits, dtype)
    for bias_O in (None, random(64, dtype=dtype, seed=2)):
        added = 0 if bias_O is None else bias_O.double()
        got = linear.linear(x_TI, weight_OI, bias_O)
        assert got.dtype == dtype
        assert near(got, x_TI.double() @ dense_OI.T + added, x_TI.double().abs() @ dense_OI.abs().T)


@pytest.mark.parametrize("dtype", TRITON)
@pytest.mark.parametrize("tokens", (0, 1, 2, 16, 17))
@BITS
def test_triton_linear(bits: str, tokens: int, dtype: torch.dtype) -> None:
    for rows, columns, has_bias in ((7, 96, True), (65, 264, False)):
        x_TI, (weight_OI, dense_OI) = random(tokens, columns, dtype=dtype), weight(rows, columns, bits, dtype)
        bias_O = random(rows, dtype=dtype, seed=2) if has_bias else None
        got = triton_linear.linear(x_TI, weight_OI, bias_O)
        want = x_TI.double() @ dense_OI.T + (0 if bias_O is None else bias_O.double())
        assert got.dtype == dtype and near(got, want, x_TI.double().abs() @ dense_OI.abs().T)


@pytest.mark.parametrize("tokens", (1, 3, 20))
@pytest.mark.parametrize(("version", "dtype"), [(attention, torch.float32), (triton_qkv, torch.float16)])
@BITS
def test_qkv_write(bits: str, version, dtype: torch.dtype, tokens: int) -> None:
    """Against the plain one, in fp32 and on dequantized weights."""
    heads, kv_heads, head_dim, hidden = 6, 2, 16, 32
    rows = (heads + 2 * kv_heads) * head_dim
    weight_QH = narrowed(random(rows, hidden, seed=3), CODES[bits], dtype)
    dense_QH = weight_QH.codes_OI.float() * weight_QH.scale_O.float()[:, None]
    before = random(tokens, hidden, dtype=dtype), random(tokens, hidden, dtype=dtype, seed=7), random(hidden, seed=8)
    bias_Q = random(rows, dtype=dtype, seed=4)
    angles = random(tokens, head_dim // 2, seed=6)
    turn = angles.cos(), angles.sin()
    slots_T = torch.arange(tokens, device=DEVICE) * 3 + 1
    pages = [torch.zeros((8, 2, 16, kv_heads, head_dim), dtype=one, device=DEVICE) for one in (dtype, torch.float32)]
    _, got = version.norm_qkv_write(*before, 1e-5, dtype, weight_QH, bias_Q, turn, pages[0], slots_T)
    _, x_TH = norm.add_norm(*before, 1e-5, dtype)
    want = attention.qkv_write(x_TH.float(), dense_QH, bias_Q.float(), turn, pages[1], slots_T)
    for one, other in ((got, want), (pages[0], pages[1])):
        torch.testing.assert_close(one.float(), other, rtol=2 * ULP[dtype], atol=64 * ULP[dtype])


@pytest.mark.parametrize("dtype", TRITON)
@pytest.mark.parametrize("version", (begin, triton_begin))
@BITS
def test_embed(bits: str, version, dtype: torch.dtype) -> None:
    embed_VH, dense_VH = weight(40, 96, bits, dtype)
    tokens_T = torch.arange(80, device=DEVICE)
    positions_T = torch.arange(80, device=DEVICE)
    got, _ = version.embed(tokens_T, positions_T, embed_VH, 30, random(24).abs(), 1.3)
    want = torch.zeros((80, 96), dtype=torch.float64, device=DEVICE)
    want[30:70] = dense_VH
    assert got.dtype == dtype and near(got, want, want * 0)

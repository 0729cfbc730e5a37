"""The small operations in Triton against the plain versions: q,k,v with RoPE and the write; add and norm; linear."""

import pytest
import torch
from gptoss_launch.parallel.kernels import attention, begin, norm, triton_begin, triton_linear, triton_norm, triton_qkv
from small_models import GPU

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = torch.float8_e4m3fn
# the interpreter cuts to bf16 instead of rounding, and its products of bf16 are wrong
LOW = [torch.float16, pytest.param(torch.bfloat16, marks=GPU)]
ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("residual_is_wide", (True, False))
@pytest.mark.parametrize("delta_dtype", (*LOW, torch.float32, None))
def test_add_norm(dtype: torch.dtype, residual_is_wide: bool, delta_dtype: torch.dtype | None) -> None:
    residual_dtype = torch.float32 if residual_is_wide else dtype
    for tokens, hidden in ((1, 64), (3, 96)):
        residual_TH = random(tokens, hidden, dtype=residual_dtype)
        delta_TH = None if delta_dtype is None else random(tokens, hidden, dtype=delta_dtype, seed=1)
        weight_H = random(hidden, seed=2)
        got = triton_norm.add_norm(residual_TH, delta_TH, weight_H, 1e-5, dtype)
        want = norm.add_norm(residual_TH, delta_TH, weight_H, 1e-5, dtype)
        assert torch.equal(got[0], want[0]) and got[0].dtype == residual_dtype
        assert got[1].dtype == dtype
        torch.testing.assert_close(got[1], want[1], rtol=ULP[dtype], atol=1e-6)


def integers(high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high), dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("count", (1, 37, 1024, 2500))
def test_upload(count: int) -> None:
    """No word more than there are."""
    words_W, to_W = integers(99, 3000).cpu(), torch.full((3000,), -1, dtype=torch.int32, device=DEVICE)
    pinned_W = words_W.pin_memory() if DEVICE == "cuda" else words_W
    triton_begin.upload(pinned_W[:count], to_W[:count])
    assert torch.equal(to_W[:count].cpu(), words_W[:count]) and (to_W[count:] == -1).all()


@pytest.mark.parametrize("tokens", (1, 5, 129))
def test_locate(tokens: int) -> None:
    rows, pages = 7, 11
    words_W = integers(rows, 3 * tokens + 1)[1:]  # a view that is aligned to nothing
    row_T, token_T, position_T = words_W.view(3, tokens)
    token_T[::2] = -1
    position_T += integers(pages * 16 - rows, tokens)
    given = row_T, token_T, position_T, integers(99, rows, dtype=torch.int64), integers(1000, 2, rows, pages), 16
    for got, want in zip(triton_begin.locate(*given), begin.locate(*given), strict=True):
        assert torch.equal(got, want) and got.dtype == torch.int64


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("first", (0, 30))
def test_embed(dtype: torch.dtype, first: int) -> None:
    embed_VH, frequencies = random(40, 96, dtype=dtype), random(24).abs()
    tokens_T, positions_T = integers(80, 33, dtype=torch.int64), integers(131072, 33, dtype=torch.int64)
    given = tokens_T, positions_T, embed_VH, first, frequencies, 1.3466
    (got, turn), (want, wanted_turn) = triton_begin.embed(*given), begin.embed(*given)
    assert torch.equal(got, want)
    torch.testing.assert_close(turn, wanted_turn, rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tokens", (0, 1, 2, 5, 16, 17))
def test_linear(tokens: int, dtype: torch.dtype) -> None:
    for rows, columns, has_bias in ((7, 96, True), (65, 264, False), (35, 2880, True), (48, 512, False)):
        if tokens > triton_linear.FEW_TOKENS and columns > 512:
            continue  # torch's, which adds up parts in bf16
        x_TI, weight_OI = random(tokens, columns, dtype=dtype), random(rows, columns, dtype=dtype, seed=1)
        bias_O = random(rows, dtype=dtype, seed=2) if has_bias else None
        got = triton_linear.linear(x_TI, weight_OI, bias_O)
        want = torch.nn.functional.linear(
            x_TI.double(), weight_OI.double(), None if bias_O is None else bias_O.double()
        )
        assert got.shape == want.shape and got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=ULP[dtype], atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, *LOW))
@pytest.mark.parametrize("kv_dtype", (None, E4M3))
def test_norm_qkv_write(dtype: torch.dtype, kv_dtype: torch.dtype | None) -> None:
    heads, kv_heads, head_dim, hidden = 6, 2, 16, 96
    width = (heads + 2 * kv_heads) * head_dim
    for tokens, is_first in ((1, True), (1, False), (5, True), (9, False), (17, False)):
        residual_TH, weight_QH = random(tokens, hidden, dtype=dtype), random(width, hidden, dtype=dtype, seed=1)
        before = residual_TH, None if is_first else random(tokens, hidden, dtype=dtype, seed=5), random(hidden, seed=6)
        bias_Q = random(width, dtype=dtype, seed=2)
        angles = random(tokens, head_dim // 2, seed=3)
        rotation = angles.cos() * 1.3, angles.sin() * 1.3
        slots_T = torch.tensor([37, 0, 15, 16, 79, *range(40, 52)][:tokens], device=DEVICE)
        kv_PCSKD = random(5, 2, 16, kv_heads, head_dim, seed=4).to(kv_dtype or dtype)
        want_kv = kv_PCSKD.clone()
        after = weight_QH, bias_Q, rotation
        got_sum, got_q = triton_qkv.norm_qkv_write(*before, 1e-5, dtype, *after, kv_PCSKD, slots_T)
        want_sum, want_q = attention.norm_qkv_write(*before, 1e-5, dtype, *after, want_kv, slots_T)
        assert torch.equal(got_sum, want_sum) and got_q.is_contiguous() and got_q.dtype == dtype
        tolerance = {"rtol": 2 * ULP[dtype], "atol": 64 * ULP[dtype]}
        torch.testing.assert_close(got_q, want_q, **tolerance)
        if kv_dtype is not None:  # one step of e4m3 is an eighth
            tolerance = {"rtol": 2.0**-3, "atol": 32 * ULP[dtype]}
        torch.testing.assert_close(kv_PCSKD.float(), want_kv.float(), **tolerance)
        written = torch.zeros(80, dtype=torch.bool, device=DEVICE)
        written[slots_T] = True
        kept_got, kept_want = (kv.float().transpose(1, 2).flatten(0, 1)[~written] for kv in (kv_PCSKD, want_kv))
        assert torch.equal(kept_got, kept_want)


@pytest.mark.parametrize("tokens", (1, 2))
def test_fp8_is_rounded_as_torch_does(tokens: int) -> None:
    """Every number of e4m3, and those between two of them, as the bias of v, which nothing turns."""
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    every = every[every.isfinite()].sort().values
    between = torch.cat([every, (every[:-1] + every[1:]) / 2, every[:-1] * 0.3 + every[1:] * 0.7, torch.tensor([1e-5])])
    head_dim = 64
    residual_TH, norm_H = torch.zeros((tokens, 32), device=DEVICE), torch.ones(32, device=DEVICE)
    qkv_weight = torch.zeros((3 * head_dim, 32), device=DEVICE)
    rotation = (torch.ones(tokens, head_dim // 2, device=DEVICE), torch.zeros(tokens, head_dim // 2, device=DEVICE))
    slots_T = torch.arange(tokens, device=DEVICE)
    for values in between.split(head_dim):
        v_D = torch.nn.functional.pad(values, (0, head_dim - len(values))).to(DEVICE)
        kv_PCSKD = torch.zeros((2, 2, 16, 1, head_dim), device=DEVICE).to(E4M3)
        bias_Q = torch.cat([torch.zeros(2 * head_dim, device=DEVICE), v_D])
        before = residual_TH, None, norm_H, 1e-5, torch.float32
        triton_qkv.norm_qkv_write(*before, qkv_weight, bias_Q, rotation, kv_PCSKD, slots_T)
        stored = kv_PCSKD.view(torch.uint8)[:, 1].flatten(0, 1)[:tokens, 0].view(E4M3)
        assert torch.equal(stored.float(), v_D.to(E4M3).float().expand(tokens, -1))


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=GPU) for dtype in (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("tokens", (1, 2, 7, 16, 17, 300))
def test_published_shapes(dtype: torch.dtype, tokens: int) -> None:
    """Each operation at the published width, from inside a CUDA graph, twice with the same bits."""
    width, hidden = (64 + 2 * 8) * 64, 2880
    weight_QH, bias_Q = random(width, hidden, dtype=dtype, seed=1) / 54, random(width, dtype=dtype, seed=2)
    norm_H = random(hidden, seed=3)
    residual_TH, delta_TH = random(tokens, hidden, dtype=dtype), random(tokens, hidden, dtype=dtype, seed=4)
    angles = random(tokens, 32, seed=5)
    rotation = angles.cos(), angles.sin()
    slots_T = torch.arange(tokens, device=DEVICE)
    kv_PCSKD = torch.zeros((20, 2, 16, 8, 64), dtype=dtype, device=DEVICE)

    before, after = (residual_TH, delta_TH, norm_H, 1e-5, dtype), (weight_QH, bias_Q, rotation)

    def step() -> tuple[torch.Tensor, ...]:
        sum_TH, x_TH = triton_norm.add_norm(*before)
        return sum_TH, x_TH, *triton_qkv.norm_qkv_write(*before, *after, kv_PCSKD, slots_T)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sum_TH, x_TH, same_sum_TH, q_TND = step()
    graph.replay()
    want_sum_TH, want_x_TH = norm.add_norm(residual_TH, delta_TH, norm_H, 1e-5, dtype)
    assert torch.equal(sum_TH, want_sum_TH) and torch.equal(same_sum_TH, want_sum_TH)
    torch.testing.assert_close(x_TH, want_x_TH, rtol=ULP[dtype], atol=1e-6)
    want_kv = torch.zeros(kv_PCSKD.shape, device=DEVICE)
    # in fp32, of the same input
    want_q = attention.qkv_write(x_TH.float(), weight_QH.float(), bias_Q.float(), rotation, want_kv, slots_T)
    for got, want in ((q_TND, want_q), (kv_PCSKD, want_kv)):
        torch.testing.assert_close(got.float(), want, rtol=0, atol=2 * ULP[dtype] * float(want.abs().max()))
    first = q_TND.clone(), kv_PCSKD.clone()
    graph.replay()
    assert torch.equal(first[0], q_TND) and torch.equal(first[1], kv_PCSKD)

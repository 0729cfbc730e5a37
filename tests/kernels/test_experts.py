"""The Triton experts and router against the plain ones, under Triton's interpreter and, in true sizes, on a GPU.

Under the interpreter all arithmetic is fp32, so results agree to fp32; the bf16 kernels run on GPUs alone.
"""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import lines_of
from gptoss_launch.parallel.kernels import experts as plain
from gptoss_launch.parallel.kernels import norm, triton_route
from gptoss_launch.parallel.kernels.choose import triton_operations
from gptoss_launch.parallel.kernels.mxfp4 import dequantize
from gptoss_launch.parallel.kernels.triton_decode import MAX_PAIRS, Cut, decode, decode_parts
from gptoss_launch.parallel.kernels.triton_experts import experts, experts_unsummed
from gptoss_launch.parallel.kernels.triton_grouped import _SHAPES, Shape, grouped
from gptoss_launch.parallel.kernels.triton_mxfp4 import pack
from gptoss_launch.parallel.kernels.triton_norm import add_norm
from gptoss_launch.parallel.kernels.triton_parts import Parts
from gptoss_launch.parallel.kernels.triton_route import Fused, norm_route, room, route
from gptoss_launch.parallel.model.comm import Alone, Comm
from small_models import GPU
from torch import Tensor

LIMIT = 7.0
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")


@dataclass(frozen=True)
class Case:
    """inner: intermediate units here. held experts of `experts` are here, from `first` on."""

    tokens: int
    hidden: int
    inner: int
    held: int
    first: int = 0
    experts: int | None = None
    per_token: int = 2
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Inputs:
    x_TH: Tensor
    weights_TX: Tensor
    experts_TX: Tensor
    gate_up: plain.Packed
    down: plain.Packed
    first: int


def inputs(case: Case, seed: int = 0, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def product(outputs: int, columns: int) -> plain.Packed:
        size = (case.held, outputs, columns // 32)
        blocks = torch.randint(0, 256, (*size, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(117, 123, size, generator=generator, dtype=torch.uint8)
        bias = torch.randn(size[:2], generator=generator).to(case.dtype)
        return plain.Packed(blocks.to(device), scales.to(device), bias.to(device))

    x_TH = torch.randn((case.tokens, case.hidden), generator=generator).to(case.dtype)
    score = torch.rand((case.tokens, case.experts or case.held), generator=generator)
    weights_TX = torch.rand((case.tokens, case.per_token), generator=generator).softmax(-1)
    experts_TX = score.topk(case.per_token).indices
    gate_up, down = product(2 * case.inner, case.hidden), product(case.hidden, case.inner)
    return Inputs(x_TH.to(device), weights_TX.to(device), experts_TX.to(device), gate_up, down, case.first)


def arguments(given: Inputs) -> tuple:
    """Of `decode`, `grouped` and `experts`."""
    packs = [pack(packed.blocks, packed.scales, packed.bias) for packed in (given.gate_up, given.down)]
    return given.x_TH, given.weights_TX, given.experts_TX, *packs, given.first, LIMIT


def expected(given: Inputs) -> Tensor:
    """In fp32, whatever the dtype of x."""
    gate_up, down = (plain.Packed(p.blocks, p.scales, p.bias.float()) for p in (given.gate_up, given.down))
    return plain.experts(given.x_TH.float(), given.weights_TX, given.experts_TX, gate_up, down, given.first, LIMIT)


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.float() - wanted).norm() / wanted.norm())


def test_pack_keeps_each_weight_and_the_number_of_bytes() -> None:
    given = inputs(Case(1, 128, 48 * 2, 3)).gate_up
    packed = pack(given.blocks, given.scales, given.bias)
    assert packed.blocks.nbytes == given.blocks.nbytes and packed.scales.nbytes == given.scales.nbytes
    weight = dequantize(given.blocks, given.scales, torch.float32)
    row, column = torch.meshgrid(torch.arange(weight.shape[1]), torch.arange(weight.shape[2]), indexing="ij")
    g, rh = row % 16 // 2, row % 2
    b, t, q, kh, h = column % 64 // 32, column % 32 // 8, column % 8 // 4, column % 4 // 2, column % 2
    half = packed.blocks[:, row // 16, column // 64, 4 * g + t, 4 * kh + 2 * rh + h].int() & 0xFFFF
    plane = 2 * b + q
    sign = half >> torch.tensor([15, 12, 13, 14])[plane] & 1
    magnitude = half >> torch.tensor([6, 3, 0, 9])[plane] & 7
    scale = packed.scales[:, row // 16, column // 64, g, 2 * rh + b].float()
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    assert torch.equal(values[magnitude] * (1 - 2 * sign) * torch.exp2(scale - 127), weight)


@pytest.mark.parametrize("outputs", [2, 30, 48])
@pytest.mark.parametrize("blocks", [1, 23, 4])
def test_pack_fills_up_with_zeros(outputs: int, blocks: int) -> None:
    given = inputs(Case(1, blocks * 32, outputs // 2, 2)).gate_up
    packed = pack(given.blocks, given.scales, given.bias)
    steps, tiles = (blocks + 1) // 2, (outputs + 15) // 16
    assert packed.blocks.shape == (2, tiles, steps, 32, 8) and packed.scales.shape == (2, tiles, steps, 8, 4)
    assert int(packed.scales.count_nonzero()) == given.scales.numel()


def test_pack_refuses_scales_that_the_kernels_cannot_hold() -> None:
    given = inputs(Case(1, 32, 1, 2)).gate_up
    with pytest.raises(ValueError, match="scale is 255"):
        pack(given.blocks, torch.full_like(given.scales, 255), given.bias)


FEW = {
    "one token, K in parts": (Case(1, 128, 32, 4), (Cut(2, 1), Cut(1, 2))),
    "odd K, parts without work": (Case(1, 32, 96, 2), (Cut(2, 1), Cut(2, 1))),
    "a slot a pair, others' experts": (Case(2, 64, 32, 6, 2, 10), (Cut(1, 1), Cut(1, 1))),
    "a slot an expert, more tokens than columns": (Case(11, 64, 32, 2, 1, 3), (Cut(2, 1), Cut(1, 3))),
    "one token, others' experts": (Case(1, 64, 32, 2, 1, 4), (Cut(2, 1), Cut(2, 1))),
    "no expert is here": (Case(2, 64, 32, 2, 8, 10), (Cut(1, 1), Cut(1, 1))),
    "no expert is here, of one token": (Case(1, 64, 32, 2), (Cut(2, 1), Cut(2, 1))),
    "two rounds of columns, odd K": (Case(12, 96, 96, 2), (Cut(1, 2), Cut(2, 1))),
    "a column a token, a slot an expert": (Case(8, 96, 96, 6, 1, 9, 3), (Cut(1, 2, by_token=True),) * 2),
    "a column a token, a slot a pair": (Case(3, 64, 96, 30, 2, 34, 4), (Cut(2, 1, by_token=True),) * 2),
    "too many tokens for a column each": (Case(9, 64, 32, 3), (Cut(1, 1, by_token=True),) * 2),
}


@NO_GPU
@pytest.mark.parametrize("name", FEW)
def test_few_tokens(name: str) -> None:
    case, cuts = FEW[name]
    given = inputs(case)
    if name.startswith("no expert is here"):
        given.experts_TX.clamp_(max=case.first - 1)
    call = arguments(given)
    found, wanted = decode(*call, cuts=cuts), expected(given)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    assert not call[3].arrivals.any() and not call[4].arrivals.any()


@NO_GPU
@pytest.mark.parametrize("tokens", (3, 8, 16, 32))
def test_parts_are_summed_by_the_next_norm(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bits of two kernels, but for those that are summed over a split too. What is not here is never used."""
    given = inputs(Case(tokens, 96, 32, 3, 2, 7, 3))
    here_P = ((given.experts_TX >= 2) & (given.experts_TX < 5)).flatten()
    assert here_P.any() and not here_P.all()
    alone: list[Parts] = []
    summed = Parts.summed
    monkeypatch.setattr(Parts, "summed", lambda parts: (alone.append(parts), summed(parts))[1])
    for split in (1, 2) if tokens == 3 else (1,):
        wide = decode_parts(*arguments(given), cuts=(Cut(1, 1), Cut(split, 1)))
        wide.partial[:, ~here_P] = NAN
        assert error(wide.summed(), expected(given)) < 1e-6
        for dtype, is_wide in itertools.product((torch.bfloat16, torch.float16, torch.float32), (False, True)):
            parts = dataclasses.replace(wide, dtype=dtype, bias_ER=wide.bias_ER.to(dtype))
            residual_TH, _, *after, _ = before_route(tokens, 96, torch.float32 if is_wide else dtype)
            wanted = add_norm(residual_TH, parts.summed(), *after, dtype)
            alone.clear()
            found = add_norm(residual_TH, parts, *after, dtype)
            assert len(alone) == (split > 1)
            assert [one.dtype for one in found] == [residual_TH.dtype, dtype] and not found[0].isnan().any()
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


MANY = {
    "one block an expert, four tiles": (Case(20, 64, 64, 3), Shape(16, 16, 4, 4, 3)),
    "others' experts, odd K": (Case(35, 96, 96, 4, 2, 8), Shape(16, 16, 8, 4, 3)),
    "an expert without tokens": (Case(33, 64, 32, 3, 0, 2), Shape(16, 16, 8, 4, 3)),
    "wide": (Case(40, 96, 160, 2, 0, 3, 1), Shape(32, 32, 16, 4, 3)),
    "no expert is here": (Case(20, 64, 32, 2), Shape(16, 16, 4, 4, 3)),
}


@NO_GPU
@pytest.mark.parametrize("name", MANY)
def test_many_tokens(name: str) -> None:
    case, shape = MANY[name]
    given = inputs(case)
    if name == "no expert is here":
        given.experts_TX.clamp_(max=case.first - 1)
    found, wanted = grouped(*arguments(given), shapes=(shape, shape)), expected(given)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@NO_GPU
def test_the_last_pairs_of_an_expert_take_as_few_rows_as_they_need() -> None:
    """Blocks of 64, last ones of 16, 32 and 64: each size at its least and its most, alone and after a whole block."""
    counts = torch.tensor([1, 16, 17, 32, 33, 64, 65, 80, 81, 96, 97, 128])
    given = inputs(Case(int(counts.sum()), 64, 32, len(counts), per_token=1))
    order = torch.randperm(int(counts.sum()), generator=torch.Generator().manual_seed(0))
    given.experts_TX.copy_(torch.arange(len(counts)).repeat_interleave(counts)[order][:, None])
    shape = Shape(64, 16, 4, 4, 3)
    found, wanted = grouped(*arguments(given), shapes=(shape, shape)), expected(given)
    assert (found - wanted).norm(dim=1).max() <= 1e-6 * wanted.norm(dim=1).max()


@NO_GPU
@pytest.mark.parametrize("tokens", [2, MAX_PAIRS // 8 + 1])
def test_bf16(tokens: int) -> None:
    given = inputs(Case(tokens, 64, 32, 8, per_token=2 if tokens == 2 else 8, dtype=torch.bfloat16))
    found = experts(*arguments(given))
    assert found.dtype == torch.bfloat16
    assert error(found, expected(given)) < 1e-2  # three roundings to 8 bits, which the interpreter does by truncation


@NO_GPU
@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 3])
def test_published_widths(tokens: int) -> None:
    given = inputs(Case(tokens, 2880, 96, 2, 1, 4))  # few units, as the interpreter is slow; all on a GPU below
    assert error(experts(*arguments(given)), expected(given)) < 1e-6


def routed(tokens: int, hidden: int, count: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x_TH = torch.randn((tokens, hidden), generator=generator)
    weight_EH, bias_E = torch.randn((count, hidden), generator=generator), torch.randn(count, generator=generator)
    return x_TH.to(device, dtype), weight_EH.to(device, dtype), bias_E.to(device, dtype)


@NO_GPU
@pytest.mark.parametrize(
    ("tokens", "hidden", "count", "chosen"), [(1, 96, 32, 4), (17, 64, 5, 1), (3, 160, 100, 8), (2, 64, 4, 4)]
)
def test_route(tokens: int, hidden: int, count: int, chosen: int) -> None:
    given = routed(tokens, hidden, count, torch.float32, "cpu")
    weights_TX, experts_TX = route(*given, chosen)
    wanted = plain.route(*given, chosen)
    assert weights_TX.dtype == torch.float32 and torch.equal(experts_TX, wanted[1])
    assert torch.allclose(weights_TX, wanted[0], rtol=1e-5)


@NO_GPU
def test_route_gives_equal_logits_to_the_lower_expert() -> None:
    x_TH = torch.ones((2, 64))
    weights_TX, experts_TX = route(x_TH, torch.zeros((6, 64)), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0]), 4)
    assert experts_TX.tolist() == [[1, 3, 4, 0]] * 2
    _, experts_TX = route(x_TH, torch.zeros((6, 64)), torch.full((6,), float("nan")), 4)
    assert experts_TX.tolist() == [[0, 1, 2, 3]] * 2  # valid whatever the logits


@NO_GPU
def test_route_of_more_tokens_than_a_launch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    given = routed(65, 64, 8, torch.float32, "cpu")
    wanted = route(*given, 4)
    monkeypatch.setattr(triton_route, "MOST_TOKENS", 32)
    assert all(torch.equal(*pair) for pair in zip(route(*given, 4), wanted, strict=True))


TRUE = {
    "20b": Case(0, 2880, 2880, 32, 0, 32, 4, torch.bfloat16),
    "20b, half of the experts": Case(0, 2880, 2880, 16, 16, 32, 4, torch.bfloat16),
    "120b, a quarter of each expert": Case(0, 2880, 736, 128, 0, 128, 4, torch.bfloat16),
}


@pytest.mark.parametrize("size", [pytest.param(name, marks=GPU) for name in TRUE])
def test_true_sizes(size: str) -> None:
    for tokens in (1, 2, 7, 8, 16, 33, 64, 65, 257, 2048):
        case = Case(tokens, *(getattr(TRUE[size], name) for name in list(Case.__dataclass_fields__)[1:]))
        given = inputs(case, device="cuda")
        call = arguments(given)
        found = experts(*call)
        assert error(found, expected(given)) < 4e-3, tokens
        assert torch.equal(found, experts(*call)), tokens


@pytest.mark.parametrize("tokens", [pytest.param(count, marks=GPU) for count in (1, 8, 100)])
def test_captured_in_a_graph(tokens: int) -> None:
    """Replayed with routes other than those at capture, so that nothing about them was fixed on the host."""
    case = Case(tokens, 2880, 2880, 8, 4, 16, 4, torch.bfloat16)
    given = inputs(case, device="cuda")
    call = arguments(given)
    experts(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = experts(*call)
    for seed in (1, 2):
        other = inputs(case, seed, "cuda")
        for mine, new in zip(call[:3], (other.x_TH, other.weights_TX, other.experts_TX), strict=True):
            mine.copy_(new)
        graph.replay()
        assert error(found, expected(given)) < 4e-3


@pytest.mark.parametrize("inner", [pytest.param(inner, marks=GPU) for inner in (736, 704, 384, 352, 2880)])
def test_one_token_again_and_again(inner: int) -> None:
    """A part of each expert, as 4 or 8 ranks have it, where some parts of K are empty. Calls follow each other without
    a pause and with the memory of the one before: each gives what it gives alone, so that no program has stored before
    those that read what was there have done so, nor read what was not yet there."""
    case = Case(1, 2880, inner, 32, 0, 32, 4, torch.bfloat16)
    first = inputs(case, 0, "cuda")
    call, given = arguments(first), [first]
    for seed in range(1, 8):  # other tokens and routes, the same weights
        other = inputs(dataclasses.replace(case, inner=32), seed, "cuda")
        given.append(dataclasses.replace(other, gate_up=first.gate_up, down=first.down))
    calls = [(one.x_TH, one.weights_TX, one.experts_TX, *call[3:]) for one in given]
    alone = []
    for one, each in zip(given, calls, strict=True):
        torch.cuda.synchronize()
        alone.append(experts(*each))
        torch.cuda.synchronize()
        assert error(alone[-1], expected(one)) < 4e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [experts(*each) for each in calls * 5]
    eager = [experts(*each) for each in calls * 25]
    for place, found in enumerate(eager):
        assert torch.equal(found, alone[place % len(calls)]), place
    for _ in range(5):
        graph.replay()
        for place, found in enumerate(captured):
            assert torch.equal(found, alone[place % len(calls)]), place


@pytest.mark.parametrize("tokens", [pytest.param(count, marks=GPU) for count in (1, 2, 17, 64, 3000)])
@pytest.mark.parametrize("count", [32, 128])
def test_route_true_sizes(tokens: int, count: int) -> None:
    given = routed(tokens, 2880, count, torch.bfloat16, "cuda")
    weights_TX, experts_TX = route(*given, 4)
    logits_TE = given[0].double() @ given[1].double().T + given[2].double()
    best_TX = logits_TE.topk(4).values
    assert torch.allclose(logits_TE.gather(1, experts_TX), best_TX, rtol=1e-4, atol=1e-3)
    assert torch.allclose(weights_TX.double(), best_TX.softmax(-1), rtol=1e-3, atol=1e-4)
    assert torch.equal(route(*given, 4)[0], weights_TX)


NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # which the interpreter rounds as torch does


def before_route(
    tokens: int, hidden: int, residual_dtype: torch.dtype = NARROW, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, float, torch.dtype]:
    generator = torch.Generator().manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    residual_TH, delta_TH = (torch.randn((tokens, hidden), generator=generator).to(device) for _ in range(2))
    norm_H = torch.randn(hidden, generator=generator).to(device)
    return residual_TH.to(residual_dtype), delta_TH.to(NARROW), norm_H, 1e-5, NARROW


@pytest.mark.parametrize(
    ("tokens", "count", "residual_dtype"),
    [
        (1, 5, NARROW),
        (3, 5, NARROW),
        (1, 32, torch.float32),
        (2, 32, NARROW),
        (16, 32, torch.float32),
        (17, 32, NARROW),
        (33, 32, NARROW),  # two kernels
        (1, 128, NARROW),
        (3, 100, torch.float32),
        (8, 128, NARROW),
        (17, 128, torch.float32),
    ],
)
def test_norm_route_is_norm_and_then_route(tokens: int, count: int, residual_dtype: torch.dtype) -> None:
    before = before_route(tokens, 96, residual_dtype)
    router = routed(tokens, 96, count, NARROW, str(before[0].device))[1:]
    found, wanted = norm_route(*before, *router, 4), plain.norm_route(*before, *router, 4)
    assert torch.equal(found[0], wanted[0]) and found[0].dtype == residual_dtype
    torch.testing.assert_close(found[1], wanted[1], rtol=2.0**-7, atol=1e-6)
    weights_TX, experts_TX = plain.route(found[1], *router, 4)
    assert torch.equal(found[3], experts_TX)
    torch.testing.assert_close(found[2], weights_TX, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(found, norm_route(*before, *router, 4), strict=True))


def test_norm_route_is_one_kernel_for_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[int] = []

    def add_norm(residual_TH: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        alone.append(len(residual_TH))
        return norm.add_norm(residual_TH, *others)

    monkeypatch.setattr(triton_route, "add_norm", add_norm)
    limits = Fused(tokens=3, programs=4, of_token=2)
    for tokens in (1, 2, 3, 4):
        before = before_route(tokens, 64)
        for count in (1, 5):
            router = routed(tokens, 64, count, NARROW, str(before[0].device))[1:]
            norm_route(*before, *router, 1, limits)
    assert alone == [3, 4, 4]  # too many programs; too many tokens, twice


class Two(Comm):
    """Ranks that have the same."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return 2 * x


@NO_GPU
@pytest.mark.parametrize(("tokens", "few"), ((1, False), (2, True), (4, True), (5, False)))
def test_a_sum_is_left_to_the_next_norm(tokens: int, few: bool) -> None:
    """Of several tokens, but few; where there is none over ranks after it; and where the operations stand as they are,
    so that nobody else wants it."""
    ops, packed = triton_operations(), arguments(inputs(Case(tokens, 96, 32, 2)))[3:]
    replaced = dataclasses.replace(ops, experts=lambda *given: ops.experts(*given))
    residual_TH, _, norm_H, eps, _ = before_route(tokens, 96, torch.float32)
    before = residual_TH, residual_TH, norm_H, eps, torch.float32
    given = *before, *routed(tokens, 96, 4, torch.float32, "cpu")[1:], 2, *packed
    sum_TH, wanted_TH = replaced.norm_experts(*given, Alone())
    assert isinstance(wanted_TH, Tensor)
    for ranks in (None, Alone()):
        same_TH, delta_TH = ops.norm_experts(*given, ranks)
        assert torch.equal(same_TH, sum_TH) and isinstance(delta_TH, Tensor if not few else Parts)
        found, wanted = (ops.add_norm(sum_TH, one, *before[2:]) for one in (delta_TH, wanted_TH))
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    _, twice_TH = ops.norm_experts(*given, Two())
    assert isinstance(twice_TH, Tensor) and torch.equal(twice_TH, 2 * wanted_TH)


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=GPU) for tokens in (1, 2, 3, 4, 8, 16, 17, 32)])
@pytest.mark.parametrize("residual_dtype", (NARROW, torch.float32))
@pytest.mark.parametrize("run", (experts, experts_unsummed))
def test_half_layers_again_and_again(tokens: int, residual_dtype: torch.dtype, run: Callable[..., Any]) -> None:
    """Without a pause and with the memory of the one before: each gives what it gives alone, so that no kernel has read
    routes, a residual, or a counter, that were those of another. Alone the sum and the norm after it are two kernels,
    whose bits those of one are."""
    case = Case(tokens, 2880, 2880, 32, 0, 32, 4, torch.bfloat16)
    packed, router = arguments(inputs(case, 0, "cuda"))[3:], routed(1, 2880, 32, torch.bfloat16, "cuda")[1:]
    befores = [before_route(tokens, 2880, residual_dtype, seed) for seed in range(8)]

    def half_layer(before: tuple[Tensor, Tensor, Tensor, float, torch.dtype], run: Callable[..., Any]) -> list[Tensor]:
        sum_TH, x_TH, weights_TX, experts_TX = norm_route(*before, *router, 4)
        delta_TH = run(x_TH, weights_TX, experts_TX, *packed)
        assert isinstance(delta_TH, Parts) == (run is experts_unsummed and tokens > 1)
        return [sum_TH, weights_TX, experts_TX, *add_norm(sum_TH, delta_TH, *before[2:])]

    alone = []
    for before in befores:
        torch.cuda.synchronize()
        alone.append(half_layer(before, experts))
        torch.cuda.synchronize()
    half_layer(befores[0], run)  # what a graph captures has to be compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [half_layer(before, run) for before in befores * 5]
    for _ in range(5):
        graph.replay()
        eager = [half_layer(before, run) for before in befores * 5]
        for found in (captured, eager):
            for place, tensors in enumerate(found):
                wanted = alone[place % len(befores)]
                assert all(torch.equal(*pair) for pair in zip(tensors, wanted, strict=True)), place


NAN, INFINITY = float("nan"), float("inf")
ODD_LOGITS = {  # of the first experts, all others have -1
    "equal": ([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], [1, 3, 4, 0]),
    "all equal": ([-1.0], [0, 1, 2, 3]),
    "equal, far from each other": ([0.0] + 29 * [-2.0] + [5.0, 5.0], [30, 31, 0, 32]),
    "some not numbers": ([NAN, 2.0, NAN, 3.0, NAN, -5.0], [3, 1, 6, 7]),
    "infinite": ([-INFINITY, 2.0, INFINITY, 3.0, INFINITY], [2, 4, 3, 1]),
    "nothing but numbers below": (128 * [-INFINITY], [0, 1, 2, 3]),
    "no number": (128 * [NAN], [0, 1, 2, 3]),  # valid whatever the logits
    "two numbers": ([NAN, NAN, -7.0, NAN, 7.0] + 123 * [NAN], [4, 2, 0, 1]),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", ODD_LOGITS)
@pytest.mark.parametrize("fused", (Fused(), Fused(tokens=0)))
def test_choice_among_odd_logits(name: str, fused: Fused) -> None:
    """And weights as the plain softmax of them, where these are numbers."""
    first, chosen = ODD_LOGITS[name]
    before = before_route(2, 64)
    logits_E = torch.tensor((first + 128 * [-1.0])[:128], dtype=NARROW, device=before[0].device)
    weight_EH = torch.zeros((128, 64), dtype=NARROW, device=before[0].device)
    *_, weights_TX, experts_TX = norm_route(*before, weight_EH, logits_E, 4, fused)
    assert experts_TX.tolist() == [chosen] * 2
    wanted_X = logits_E.float().nan_to_num(-3.4e38, INFINITY, -INFINITY)[chosen].softmax(-1)
    torch.testing.assert_close(weights_TX, wanted_X.expand(2, 4), equal_nan=True)


@dataclass(frozen=True)
class Mixed:
    """One token through half a layer: experts of `experts`, `held` of which are here."""

    experts: int
    hidden: int
    inner: int
    held: int
    first: int
    dtype: torch.dtype = torch.float32


@pytest.mark.parametrize(
    "mixed",
    [
        pytest.param(Mixed(12, 96, 32, 6, 3), marks=NO_GPU),
        pytest.param(Mixed(128, 64, 32, 128, 0), marks=NO_GPU),
        pytest.param(Mixed(8, 64, 32, 2, 6), marks=NO_GPU),
        pytest.param(Mixed(32, 2880, 2880, 32, 0, torch.bfloat16), marks=GPU),
        pytest.param(Mixed(32, 2880, 1440, 32, 0, torch.bfloat16), marks=GPU),
        pytest.param(Mixed(128, 2880, 2880, 32, 32, torch.bfloat16), marks=GPU),
        pytest.param(Mixed(128, 2880, 720, 128, 0, torch.bfloat16), marks=GPU),
    ],
)
def test_mixture_is_norm_route_and_then_experts(mixed: Mixed) -> None:
    """With the bits of the two, one after the other without a pause."""
    device = "cpu" if mixed.dtype == torch.float32 else "cuda"
    case = Case(1, mixed.hidden, mixed.inner, mixed.held, mixed.first, mixed.experts, 4, mixed.dtype)
    packed = arguments(inputs(case, 0, device))[3:]
    router = routed(1, mixed.hidden, mixed.experts, mixed.dtype, device)[1:]
    together = triton_operations()
    assert together.mixture is not None
    separate = dataclasses.replace(together, norm_route=lambda *given: norm_route(*given))
    givens = []
    for seed in range(2 if device == "cpu" else 8):
        residual_1H, delta_1H, norm_H, eps, _ = before_route(1, mixed.hidden, torch.float32, seed)
        before = residual_1H, delta_1H.to(mixed.dtype), norm_H, eps, mixed.dtype
        givens.append((*before, *router, 4, *packed))
    found, wanted = ([ops.norm_experts(*given) for given in givens] for ops in (together, separate))
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@NO_GPU
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", ("equal, far from each other", "some not numbers"))
def test_experts_choose_among_odd_logits(name: str) -> None:
    """As the router does, and leave weights and numbers behind."""
    first, chosen = ODD_LOGITS[name]
    logits_E = torch.tensor((first + 128 * [-1.0])[:128])
    weights_1X, experts_1X = room(1, 4, logits_E.device)
    packed = arguments(inputs(Case(1, 64, 32, 128, 0, 128, 4)))[3:]
    given = torch.ones((1, 64)), weights_1X, experts_1X, *packed
    found = decode(*given, logits_1E=logits_E[None])
    assert experts_1X.tolist() == [chosen]
    wanted_X = logits_E.nan_to_num(-3.4e38, INFINITY, -INFINITY)[chosen].softmax(-1)
    torch.testing.assert_close(weights_1X[0], wanted_X, equal_nan=True)
    torch.testing.assert_close(found, decode(*given), equal_nan=True, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_token_that_is_not_a_number_leaves_others_alone() -> None:
    before = before_route(3, 96)
    router = routed(3, 96, 32, NARROW, str(before[0].device))[1:]
    wanted = norm_route(*before, *router, 4)
    before[0][1, 17] = NAN
    found = norm_route(*before, *router, 4)
    assert all(torch.equal(one[::2], other[::2]) for one, other in zip(found, wanted, strict=True))
    assert found[3][1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("hidden", [pytest.param(64, marks=GPU)])
def test_zeros_of_either_sign_are_equal(hidden: int) -> None:
    """A power of two, so that a program adds no other zero. By the interpreter no sum is -0.0."""
    residual_TH, delta_TH, norm_H, eps, dtype = before_route(2, hidden)
    zeros_TH = torch.zeros_like(delta_TH)
    weight_EH = torch.zeros((8, hidden), dtype=dtype, device=zeros_TH.device)
    weight_EH[1::2] = -0.0
    before = -residual_TH.abs(), zeros_TH, norm_H.abs(), eps, dtype
    *_, experts_TX = norm_route(*before, weight_EH, -zeros_TH[0, :8], 4)
    assert experts_TX.tolist() == [[0, 1, 2, 3]] * 2


COMPILE = """
import triton
from gptoss_launch.parallel.kernels.triton_grouped import _SHAPES, _grouped
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {"x": "*bf16", "blocks": "*i16", "scales": "*i32", "bias": "*bf16", "order": "*i32", "starts": "*i32"}
WORDS = {name: "i32" for name in ("held", "tiles", "steps", "rows", "out_width")} | {"limit": "fp32"}
types = POINTERS | {"out": "*bf16"} | WORDS
names = _grouped.arg_names
aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*POINTERS, "out", "out_width")}
for gate_up in (True, False):
    for _, shape in _SHAPES:
        fixed = dict(ALPHA=1.702, GATE_UP=gate_up, EXPERTS_PER_TOKEN=4, EXPERTS=128, PLAIN=False)
        fixed |= dict(ROWS=shape.rows, LEAST_ROWS=shape.least_rows, SIZES=shape.sizes, TILES=shape.tiles)
        constants = {(names.index(name),): value for name, value in fixed.items()}
        source = ASTSource(_grouped, {name: types.get(name, "constexpr") for name in names}, constants, aligned)
        how = {"num_warps": shape.warps, "num_stages": shape.stages}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=how).asm["ptx"]
        waits = {line.split()[-1] for line in ptx.splitlines() if "wgmma.wait" in line}
        print(ptx.count("wgmma.mma_async"), *sorted(waits))
"""


@pytest.mark.slow
def test_no_product_is_pending_when_its_weights_registers_are_written(tmp_path: Path) -> None:
    """PTX: registers of a wgmma must not be written before it has been waited for. Seen as nan on an H200, where
    ptxas wrote the weights of the next step into the registers of three products that were still under way."""
    lines = lines_of(COMPILE, tmp_path)
    assert len(lines) == 2 * len(_SHAPES)
    for line in lines:
        products, waits = line.split(maxsplit=1)
        assert int(products) >= 4 and waits == "0;", line


COMPILE_SUM = """
import re
import triton
import triton.language as tl
from gptoss_launch.parallel.kernels.triton_norm import WARPS, _sum_add_norm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

fixed = {"HIDDEN": 2880, "BLOCK": 4096, "EXPERTS_PER_TOKEN": 4, "DTYPE": tl.bfloat16, "EARLY": True}
types = dict.fromkeys(("bias", "normed"), "*bf16") | dict.fromkeys(("weights", "partial", "norm"), "*fp32")
types |= {"experts": "*i64", "eps": "fp32"}
names = _sum_add_norm.arg_names
for residual in ("*bf16", "*fp32"):
    pointers = types | {"residual": residual, "summed": residual}
    given = {name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in names}
    aligned = [name for name in names if given[name].startswith("*")] + ["tile_rows"]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source, target = ASTSource(_sum_add_norm, given, fixed, aligned), GPUTarget("cuda", 90, 32)
    sass = triton.compile(source, target=target, options={"num_warps": WARPS}).asm["sass"]
    before, after = sass.split("ACQBULK")
    print(len(re.findall("LDG", before)), len(re.findall("LDG", after[: after.index("BAR.SYNC")])),
          len(re.findall("FADD|FFMA|FMUL", after[: after.index("BAR.SYNC")])), len(re.findall("LDL|STL", sass)))
"""


@pytest.mark.slow
def test_all_parts_are_asked_for_before_any_is_used(tmp_path: Path) -> None:
    """In machine code, as it is ptxas that moves loads: ahead of the wait all but the parts, whose four rows are 16
    loads of a lane, and the weights of the experts; then these 16 at once. Nothing is spilled."""
    lines = [[int(count) for count in line.split()] for line in lines_of(COMPILE_SUM, tmp_path)]
    assert len(lines) == 2
    for ahead, of_parts, used, spilled in lines:
        assert ahead >= 4 + 4 * 2 + 2 * 2 + 2 and (of_parts, used, spilled) == (16, 0, 0)

"""What lies between the products of a mixture of experts that is trained: rows brought into the order of their experts
and back, SwiGLU, and the gradients of both. Each is one pass over memory, in fp32 inside.

A product of an expert is one matrix [O, W]: its weights [O, I], then R columns of what is added to them, a column of
bias and zeros up to W = I + R + SPARE. Rows that are multiplied by it are as wide: x [I], then A x [R], then a one.

T tokens, X experts a token, P = T X pairs (token, expert); pair = token * X + place; row: place of a pair in the order
of experts; E experts, I columns in, O rows out, R rank.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .experts import SWIGLU_ALPHA
from .triton_grouped import SORT_PAIRS, _sort
from .triton_mxfp4 import swiglu as swiglu_of

SPARE = 8  # columns of a product besides weights and adapter: bias, and zeros up to 16 bytes
_SPARE = tl.constexpr(SPARE)
COLUMNS = 1024  # of a program
FILL_ROWS = 64


@dataclass(frozen=True)
class Order:
    """pairs_P: the pair in each row. rows_P: the row of each pair. starts_E: first row of each expert, and the end.
    All int32."""

    pairs_P: Tensor
    rows_P: Tensor
    starts_E: Tensor

    @property
    def ends_E(self) -> Tensor:
        return self.starts_E[1:]


def sort(experts_TX: Tensor, experts: int) -> Order:
    """By expert, then by pair. The host does not wait for how many rows each has."""
    pairs, device = experts_TX.numel(), experts_TX.device
    order = Order(
        torch.empty(pairs, dtype=torch.int32, device=device),
        torch.empty(pairs, dtype=torch.int32, device=device),
        torch.empty(experts + 1, dtype=torch.int32, device=device),
    )
    _sort[experts,](experts_TX, order.pairs_P, order.starts_E, 0, experts, pairs, BLOCK=SORT_PAIRS, num_warps=8)
    _invert[triton.cdiv(pairs, COLUMNS),](order.pairs_P, order.rows_P, pairs, BLOCK=COLUMNS)
    return order


@triton.jit
def _invert(pairs, rows, count, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < count
    tl.store(rows + tl.load(pairs + row, mask=here, other=0), row, mask=here)


@triton.jit
def _fill(b, bias, out, count, all_rows, scale, IN: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
          ROWS: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < count
    column = tl.arange(0, REST)
    source = expert * all_rows + row
    value = tl.load(b + source[:, None] * R + column[None, :], mask=here[:, None] & (column < R)[None, :], other=0.0)
    value = value.to(tl.float32) * scale
    last = tl.load(bias + source, mask=here, other=0.0).to(tl.float32)
    value = tl.where((column == R)[None, :], last[:, None], value)
    to = out + (expert * count + row)[:, None] * W + IN + column[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=here[:, None] & (column < W - IN)[None, :])


def fill(matrix_EOW: Tensor, b_EOR: Tensor | None, bias_EO: Tensor, scale: float) -> None:
    """Writes the columns of a product that come after its weights; of all rows, or of some, which `b` and `bias` are
    then views of."""
    experts, rows, width = matrix_EOW.shape
    rank, all_rows = 0 if b_EOR is None else b_EOR.shape[2], bias_EO.stride(0)
    assert b_EOR is None or b_EOR.stride() == (all_rows * rank, rank, 1)
    rest = rank + SPARE
    _fill[triton.cdiv(rows, FILL_ROWS), experts](
        bias_EO if b_EOR is None else b_EOR,
        bias_EO,
        matrix_EOW,
        rows,
        all_rows,
        scale,
        IN=width - rest,
        R=rank,
        W=width,
        ROWS=FILL_ROWS,
        REST=triton.next_power_of_2(rest),
    )


@triton.jit
def _gather(x, pairs, out, X: tl.constexpr, IN: tl.constexpr, ONE: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = (tl.load(pairs + row) // X).to(tl.int64)
    value = tl.load(x + token * IN + column, mask=column < IN, other=0.0)
    value = tl.where(column == ONE, 1.0, value.to(tl.float32)).to(value.dtype)
    tl.store(out + row * W + column, value, mask=column < W)


def gather(x_TI: Tensor, order: Order, rank: int | None) -> Tensor:
    """A token's row for each of its experts: [P, I], or, with the rank of a product, [P, W] as wide as that is, with a
    one and without A x."""
    tokens, width = x_TI.shape
    pairs = len(order.pairs_P)
    wide = width if rank is None else width + rank + SPARE
    out = torch.empty((pairs, wide), dtype=x_TI.dtype, device=x_TI.device)
    one = -1 if rank is None else width + rank
    _gather[pairs, triton.cdiv(wide, COLUMNS)](
        x_TI, order.pairs_P, out, X=pairs // tokens, IN=width, ONE=one, W=wide, BLOCK=COLUMNS
    )
    return out


@triton.jit
def _pair(h, row, IN, BLOCK: tl.constexpr):
    """(gate, up) of BLOCK columns of a row, fp32."""
    place = 2 * tl.program_id(1) * BLOCK + tl.arange(0, 2 * BLOCK)
    both = tl.load(h + row * 2 * IN + place, mask=place < 2 * IN, other=0.0).to(tl.float32)
    return both.reshape(BLOCK, 2).split()


@triton.jit
def _swiglu(h, out, limit, ALPHA: tl.constexpr, IN: tl.constexpr, ONE: tl.constexpr, W: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gate, up = _pair(h, row, IN, BLOCK)
    value = swiglu_of(gate, up, limit, ALPHA)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.where(column < IN, value, tl.where(column == ONE, 1.0, 0.0))
    tl.store(out + row * W + column, value.to(out.dtype.element_ty), mask=column < W)


def swiglu(h_PO: Tensor, rank: int, limit: float) -> Tensor:
    """`experts.swiglu`, as wide as a product of this rank is."""
    pairs, width = len(h_PO), h_PO.shape[1] // 2
    wide = width + rank + SPARE
    out = torch.empty((pairs, wide), dtype=h_PO.dtype, device=h_PO.device)
    _swiglu[pairs, triton.cdiv(wide, COLUMNS)](
        h_PO, out, limit, ALPHA=SWIGLU_ALPHA, IN=width, ONE=width + rank, W=wide, BLOCK=COLUMNS
    )
    return out


@triton.jit
def _swiglu_backward(h, grad, added, weights, pairs, dh, limit, ALPHA: tl.constexpr, IN: tl.constexpr, W: tl.constexpr,
                     ADDED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gate, up = _pair(h, row, IN, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad + row * W + column, mask=column < IN, other=0.0).to(tl.float32)
    g *= tl.load(weights + tl.load(pairs + row)).to(tl.float32)
    if ADDED:
        g += tl.load(added + row * IN + column, mask=column < IN, other=0.0).to(tl.float32)
    # a NaN passes as the product that it makes of all
    free_gate, free_up = ~(gate > limit), ~((up > limit) | (up < -limit))
    gate = tl.where(free_gate, gate, limit)
    up = tl.where(free_up, up, tl.where(up > limit, limit, -limit))
    sigmoid = 1.0 / (1.0 + tl.exp(-ALPHA * gate))
    dgate = tl.where(free_gate, g * (up + 1.0) * sigmoid * (1.0 + ALPHA * gate * (1.0 - sigmoid)), 0.0)
    dup = tl.where(free_up, g * gate * sigmoid, 0.0)
    place = 2 * tl.program_id(1) * BLOCK + tl.arange(0, 2 * BLOCK)
    both = tl.join(dgate, dup).reshape(2 * BLOCK)
    tl.store(dh + row * 2 * IN + place, both.to(dh.dtype.element_ty), mask=place < 2 * IN)


def swiglu_backward(
    h_PO: Tensor, grad_PW: Tensor, added_PI: Tensor | None, weights_TX: Tensor, order: Order, limit: float
) -> Tensor:
    """Gradient of h, where that of SwiGLU's result is a row's weight times `grad`, and `added` besides."""
    pairs, width = len(h_PO), h_PO.shape[1] // 2
    dh_PO = torch.empty_like(h_PO)
    _swiglu_backward[pairs, triton.cdiv(width, COLUMNS)](
        h_PO,
        grad_PW,
        grad_PW if added_PI is None else added_PI,
        weights_TX,
        order.pairs_P,
        dh_PO,
        limit,
        ALPHA=SWIGLU_ALPHA,
        IN=width,
        W=grad_PW.shape[1],
        ADDED=added_PI is not None,
        BLOCK=COLUMNS,
    )
    return dh_PO


@triton.jit
def _weigh(inner, grad, weights, pairs, dweights, dlow, low, R: tl.constexpr, W: tl.constexpr, LOW: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(pairs + row)
    weight = tl.load(weights + pair).to(tl.float32)
    column = tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, W, BLOCK):
        here = begin + column < W
        value = tl.load(inner + row * W + begin + column, mask=here, other=0.0).to(tl.float32)
        product += value * tl.load(grad + row * W + begin + column, mask=here, other=0.0).to(tl.float32)
    tl.store(dweights + pair, tl.sum(product, 0))
    if R > 0:
        rank = tl.arange(0, LOW)
        at = row * W + W - (R + _SPARE) + rank
        value = tl.load(grad + at, mask=rank < R, other=0.0).to(tl.float32) * weight
        tl.store(dlow + row * R + rank, value.to(dlow.dtype.element_ty), mask=rank < R)
        value = tl.load(inner + at, mask=rank < R, other=0.0).to(tl.float32) * weight
        tl.store(low + row * R + rank, value.to(low.dtype.element_ty), mask=rank < R)


def weigh(
    inner_PW: Tensor, grad_PW: Tensor, weights_TX: Tensor, order: Order, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of weights_TX [T, X], gradient of A x [P, R], A x times a row's weight [P, R]) of the last product, for
    `grad`, the gradient of what it multiplied as if every weight were one. What a weight is worth is what its row came
    to, and that is a sum over the columns in as well as over the rows out."""
    pairs, width = inner_PW.shape
    dweights_TX = torch.empty_like(weights_TX)
    dlow_PR, low_PR = (inner_PW.new_empty((pairs, rank)) for _ in range(2))
    _weigh[pairs,](
        inner_PW,
        grad_PW,
        weights_TX,
        order.pairs_P,
        dweights_TX,
        dlow_PR,
        low_PR,
        R=rank,
        W=width,
        LOW=triton.next_power_of_2(max(1, rank)),
        BLOCK=COLUMNS,
    )
    return dweights_TX, dlow_PR, low_PR


@triton.jit
def _gather_back(y, added, weights, rows, out, X: tl.constexpr, IN: tl.constexpr, W: tl.constexpr,
                 WEIGHTS: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(X):
        row = tl.load(rows + token * X + place).to(tl.int64)
        value = tl.load(y + row * W + column, mask=column < IN, other=0.0).to(tl.float32)
        if WEIGHTS:
            value *= tl.load(weights + token * X + place).to(tl.float32)
        if ADDED:
            value += tl.load(added + row * IN + column, mask=column < IN, other=0.0).to(tl.float32)
        total += value
    tl.store(out + token * IN + column, total.to(out.dtype.element_ty), mask=column < IN)


def gather_back(
    y_PW: Tensor,
    width: int,
    order: Order,
    tokens: int,
    weights_TX: Tensor | None = None,
    added_PI: Tensor | None = None,
) -> Tensor:
    """[T, width]: the sum of a token's rows in the order of its experts, each times its weight or plus its `added`."""
    pairs, wide = y_PW.shape
    out_TI = y_PW.new_empty((tokens, width))
    _gather_back[tokens, triton.cdiv(width, COLUMNS)](
        y_PW,
        y_PW if added_PI is None else added_PI,
        y_PW if weights_TX is None else weights_TX,
        order.rows_P,
        out_TI,
        X=pairs // tokens,
        IN=width,
        W=wide,
        WEIGHTS=weights_TX is not None,
        ADDED=added_PI is not None,
        BLOCK=COLUMNS,
    )
    return out_TI


@triton.jit
def _settle(grad, starts, out, count, scale, BLOCK: tl.constexpr):
    expert = tl.program_id(1)
    idle = tl.load(starts + expert) == tl.load(starts + expert + 1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = place < count
    at = expert.to(tl.int64) * count + place
    value = tl.load(grad + at, mask=here & ~idle, other=0.0).to(tl.float32) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=here)


def settle(grad: Tensor, order: Order, scale: float, dtype: torch.dtype) -> Tensor:
    """A product over rows [E, ...] as a gradient: scaled, in `dtype`, and zero for an expert without rows, for which
    grouped_mm writes nothing."""
    grad = grad.contiguous()  # where a width is no multiple of 16 bytes, grouped_mm leaves room after each row
    experts = len(grad)
    out, count = torch.empty_like(grad, dtype=dtype), grad[0].numel()
    _settle[triton.cdiv(count, COLUMNS), experts](grad, order.starts_E, out, count, scale, BLOCK=COLUMNS)
    return out

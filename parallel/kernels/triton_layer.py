"""What lies between the products of a layer that is trained, on the way there and back: norm, router, RoPE with the
layout that attention wants, and sinks. Each is one pass over memory, in fp32 inside, and differentiable.

T tokens, S tokens that attention is laid out for, H hidden, N query heads, K KV heads, D head_dim, E experts, X experts
a token.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_norm, triton_route

HEADS = 8  # of a program
COLUMNS = 1024


# --- add and norm


@triton.jit(do_not_specialize=["eps"])
def _norm_backward(x, grad, passed, weight, dx, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PASSED: tl.constexpr):
    column = tl.arange(0, BLOCK)
    here = column < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + column
    value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    slope = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
    slope *= tl.load(weight + column, mask=here, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, 0) / HIDDEN + eps)
    share = tl.sum(slope * value, 0) / HIDDEN * factor * factor
    slope = (slope - value * share) * factor
    if PASSED:
        slope += tl.load(passed + at, mask=here, other=0.0).to(tl.float32)
    tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=here)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual_TH: Tensor, delta_TH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        sum_TH, normed_TH = triton_norm.add_norm(residual_TH, delta_TH.contiguous(), weight_H, eps, dtype)
        ctx.save_for_backward(sum_TH, weight_H)
        ctx.eps, ctx.deltas = eps, delta_TH.dtype
        return sum_TH, normed_TH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_TH, dweight_H = _norm_gradients(ctx, grads[1], grads[0])
        return dx_TH, dx_TH.to(ctx.deltas), dweight_H, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TH, weight_H)
        ctx.eps = eps
        return triton_norm.add_norm(x_TH, None, weight_H, eps, dtype)[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_norm_gradients(ctx, grads[0], None), None, None


def _norm_gradients(ctx: Any, grad_TH: Tensor, passed_TH: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of what is normalised, `passed` included, and of the weight where it is trained."""
    x_TH, weight_H = ctx.saved_tensors
    tokens, hidden = x_TH.shape
    grad_TH, dx_TH = grad_TH.contiguous(), torch.empty_like(x_TH)
    _norm_backward[tokens,](
        x_TH,
        grad_TH,
        grad_TH if passed_TH is None else passed_TH.contiguous(),
        weight_H,
        dx_TH,
        ctx.eps,
        HIDDEN=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        PASSED=passed_TH is not None,
        num_warps=8,
    )
    if not weight_H.requires_grad:
        return dx_TH, None
    wide_TH = x_TH.float()
    wide_TH = wide_TH * torch.rsqrt(wide_TH.square().mean(-1, keepdim=True) + ctx.eps)
    return dx_TH, (wide_TH * grad_TH).sum(0).to(weight_H.dtype)


def add_norm(
    residual_TH: Tensor, delta_TH: Tensor | None, weight_H: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `norm.add_norm`."""
    out: Any
    if delta_TH is None:
        out = _Norm.apply(residual_TH, weight_H, eps, dtype)
        return residual_TH, out
    out = _AddNorm.apply(residual_TH, delta_TH, weight_H, eps, dtype)
    return out


# --- router


@triton.jit
def _route_backward(weights, experts, grad, router, dx, X: tl.constexpr, LANES: tl.constexpr, HIDDEN: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """Softmax of the chosen logits, then their rows of the router."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    weight = tl.load(weights + token * X + lane, mask=lane < X, other=0.0)
    mean = tl.sum(weight * tl.load(grad + token * X + lane, mask=lane < X, other=0.0), 0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(X):
        at = token * X + place
        slope = tl.load(weights + at) * (tl.load(grad + at) - mean)
        row = tl.load(experts + at) * HIDDEN
        total += slope * tl.load(router + row + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    tl.store(dx + token * HIDDEN + column, total.to(dx.dtype.element_ty), mask=column < HIDDEN)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, experts_per_token: int
    ) -> tuple[Tensor, Tensor]:
        weights_TX, experts_TX = triton_route.route(x_TH, weight_EH, bias_E, experts_per_token)
        ctx.save_for_backward(x_TH if weight_EH.requires_grad else None, weight_EH, bias_E, weights_TX, experts_TX)
        ctx.mark_non_differentiable(experts_TX)
        ctx.dtype = x_TH.dtype
        return weights_TX, experts_TX

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, weight_EH, bias_E, weights_TX, experts_TX = ctx.saved_tensors
        grad_TX = grads[0].contiguous()
        tokens, chosen = weights_TX.shape
        experts, hidden = weight_EH.shape
        dx_TH = torch.empty((tokens, hidden), dtype=ctx.dtype, device=weight_EH.device)
        _route_backward[tokens, triton.cdiv(hidden, COLUMNS)](
            weights_TX,
            experts_TX,
            grad_TX,
            weight_EH,
            dx_TH,
            X=chosen,
            LANES=triton.next_power_of_2(chosen),
            HIDDEN=hidden,
            BLOCK=COLUMNS,
        )
        if x_TH is None:
            return dx_TH, None, None, None
        slopes_TX = weights_TX * (grad_TX - (weights_TX * grad_TX).sum(-1, keepdim=True))
        slopes_TE = slopes_TX.new_zeros((tokens, experts)).scatter_(1, experts_TX, slopes_TX)
        dweight_EH = (slopes_TE.T @ x_TH.float()).to(weight_EH.dtype)
        return dx_TH, dweight_EH, slopes_TE.sum(0).to(bias_E.dtype), None


def route(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """As `experts.route`. weight, bias: contiguous, in the dtype of x."""
    out: Any = _Route.apply(x_TH, weight_EH.to(x_TH.dtype), bias_E.to(x_TH.dtype), experts_per_token)
    return out


# --- RoPE, into the layout of attention


@triton.jit
def _turn(qkv, q, k, v, cos, sin, tokens, size, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
          HEADS: tl.constexpr):  # fmt: skip
    """[T, N + 2 K, D] -> [N, S, D], [K, S, D], [K, S, D], zeros from T on."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, HALF)[None, :]
    is_q, is_k, is_v = head < N, (head >= N) & (head < N + K), (head >= N + K) & (head < N + 2 * K)
    live = (head < N + 2 * K) & (token < tokens)
    at = (token * (N + 2 * K) + head) * 2 * HALF + column
    left = tl.load(qkv + at, mask=live, other=0.0).to(tl.float32)
    right = tl.load(qkv + at + HALF, mask=live, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + column, mask=live & (head < N + K), other=1.0)
    s = tl.load(sin + token * HALF + column, mask=live & (head < N + K), other=0.0)
    left, right = (left * c - right * s).to(q.dtype.element_ty), (right * c + left * s).to(q.dtype.element_ty)
    to_q = (head * size + token) * 2 * HALF + column
    to_k, to_v = to_q - N * size * 2 * HALF, to_q - (N + K) * size * 2 * HALF
    tl.store(q + to_q, left, mask=is_q)
    tl.store(q + to_q + HALF, right, mask=is_q)
    tl.store(k + to_k, left, mask=is_k)
    tl.store(k + to_k + HALF, right, mask=is_k)
    tl.store(v + to_v, left, mask=is_v)
    tl.store(v + to_v + HALF, right, mask=is_v)


@triton.jit
def _turn_back(dq, dk, dv, out, cos, sin, size, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
               HEADS: tl.constexpr):  # fmt: skip
    """[N, S, D], [K, S, D], [K, S, D] -> [T, N + 2 K, D]."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, HALF)[None, :]
    is_q, is_k, is_v = head < N, (head >= N) & (head < N + K), (head >= N + K) & (head < N + 2 * K)
    from_q = (head * size + token) * 2 * HALF + column
    from_k, from_v = from_q - N * size * 2 * HALF, from_q - (N + K) * size * 2 * HALF
    left = tl.load(dq + from_q, mask=is_q, other=0.0).to(tl.float32)
    left += tl.load(dk + from_k, mask=is_k, other=0.0).to(tl.float32)
    left += tl.load(dv + from_v, mask=is_v, other=0.0).to(tl.float32)
    right = tl.load(dq + from_q + HALF, mask=is_q, other=0.0).to(tl.float32)
    right += tl.load(dk + from_k + HALF, mask=is_k, other=0.0).to(tl.float32)
    right += tl.load(dv + from_v + HALF, mask=is_v, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + column, mask=head < N + K, other=1.0)
    s = tl.load(sin + token * HALF + column, mask=head < N + K, other=0.0)
    at = (token * (N + 2 * K) + head) * 2 * HALF + column
    there = head < N + 2 * K
    tl.store(out + at, (left * c + right * s).to(out.dtype.element_ty), mask=there)
    tl.store(out + at + HALF, (right * c - left * s).to(out.dtype.element_ty), mask=there)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_TQ: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv_TQ = qkv_TQ.contiguous()
        tokens, count = len(qkv_TQ), heads + 2 * kv_heads
        half = cos.shape[1]
        q, k, v = (qkv_TQ.new_empty((part, size, 2 * half)) for part in (heads, kv_heads, kv_heads))
        _turn[size, triton.cdiv(count, HEADS)](
            qkv_TQ, q, k, v, cos, sin, tokens, size, N=heads, K=kv_heads, HALF=half, HEADS=HEADS
        )
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads, kv_heads
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        heads, kv_heads = ctx.heads
        dq, dk, dv = (grad.contiguous() for grad in grads)
        tokens, half = cos.shape
        count = heads + 2 * kv_heads
        out = dq.new_empty((tokens, count * 2 * half))
        _turn_back[tokens, triton.cdiv(count, HEADS)](
            dq, dk, dv, out, cos, sin, dq.shape[1], N=heads, K=kv_heads, HALF=half, HEADS=HEADS
        )
        return out, None, None, None, None, None


def turned(
    qkv_TQ: Tensor, turn: tuple[Tensor, Tensor], heads: int, kv_heads: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, S, D] and k [K, S, D], rotated as `rope.rotate` does, and v [K, S, D], zeros after the last token; from
    q, k, v side by side. turn: cos and sin, [T, D / 2] fp32."""
    out: Any = _Turned.apply(qkv_TQ, *turn, heads, kv_heads, size)
    return out


# --- sinks


@triton.jit
def _sink(y, lse, sinks, out, head_stride, token_stride, size, HEADS_ALL: tl.constexpr, D: tl.constexpr,
          HEADS: tl.constexpr):  # fmt: skip
    """y [N, S, D] -> out [T, N, D]: a sink takes its share of the weight and brings no value."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    here = head < HEADS_ALL
    column = tl.arange(0, D)[None, :]
    left = tl.load(lse + head * size + token, mask=here, other=0.0) - tl.load(sinks + head, mask=here, other=0.0)
    left = 1.0 / (1.0 + tl.exp(-left))
    at = head.to(tl.int64)[:, None] * head_stride + token * token_stride + column
    value = tl.load(y + at, mask=here[:, None], other=0.0).to(tl.float32) * left[:, None]
    to = (token * HEADS_ALL + head)[:, None] * D + column
    tl.store(out + to, value.to(out.dtype.element_ty), mask=here[:, None])


@triton.jit
def _sink_backward(y, lse, sinks, grad, dy, dlse, head_stride, token_stride, tokens, size, HEADS_ALL: tl.constexpr,
                   D: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """dy [N, S, D], dlse [N, S]; zeros from T on."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    here = head < HEADS_ALL
    live = here & (token < tokens)
    column = tl.arange(0, D)[None, :]
    left = tl.load(lse + head * size + token, mask=live, other=0.0) - tl.load(sinks + head, mask=here, other=0.0)
    left = 1.0 / (1.0 + tl.exp(-left))
    at = head.to(tl.int64)[:, None] * head_stride + token * token_stride + column
    value = tl.load(y + at, mask=live[:, None], other=0.0).to(tl.float32)
    slope = tl.load(grad + (token * HEADS_ALL + head)[:, None] * D + column, mask=live[:, None], other=0.0)
    slope = slope.to(tl.float32)
    to = (head.to(tl.int64) * size + token)[:, None] * D + column
    tl.store(dy + to, (slope * left[:, None]).to(dy.dtype.element_ty), mask=here[:, None])
    of_lse = tl.sum(slope * value, 1) * left * (1.0 - left)
    tl.store(dlse + head.to(tl.int64) * size + token, tl.where(live, of_lse, 0.0), mask=here)


class _Sunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, lse: Tensor, sinks_N: Tensor, tokens: int) -> Tensor:
        heads, size, columns = y.shape
        assert y.stride(2) == 1
        lse = lse.contiguous()
        out = y.new_empty((tokens, heads * columns))
        _sink[tokens, triton.cdiv(heads, HEADS)](
            y, lse, sinks_N, out, y.stride(0), y.stride(1), size, HEADS_ALL=heads, D=columns, HEADS=HEADS
        )
        ctx.save_for_backward(y, lse, sinks_N)
        ctx.tokens = tokens
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, lse, sinks_N = ctx.saved_tensors
        heads, size, columns = y.shape
        dy = torch.empty((heads, size, columns), dtype=y.dtype, device=y.device)
        dlse = torch.empty_like(lse)
        _sink_backward[size, triton.cdiv(heads, HEADS)](
            y, lse, sinks_N, grads[0].contiguous(), dy, dlse, y.stride(0), y.stride(1), ctx.tokens, size,
            HEADS_ALL=heads, D=columns, HEADS=HEADS,
        )  # fmt: skip
        dsinks_N = -dlse.sum(1).to(sinks_N.dtype) if sinks_N.requires_grad else None
        return dy, dlse, dsinks_N, None


def sunk(y: Tensor, lse: Tensor, sinks_N: Tensor, tokens: int) -> Tensor:
    """[T, N * D]: attention's result y [N, S, D] without sinks, and its log-sum-exp [N, S] -> with sinks."""
    out: Any = _Sunk.apply(y, lse, sinks_N, tokens)
    return out

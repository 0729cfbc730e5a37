"""Attention over packed documents, with sinks, and its gradient: in tiles of queries, scores never kept.

The plain version is exact and runs anywhere. On CUDA torch's flex_attention may take its place, once it has shown
on a small case that it computes the same, gradients included. Nothing here knows layers or pages.

T tokens of all documents, N query heads, K KV heads, G = N / K, D head_dim, J keys.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.precision import wide
from ..kernels.rope import concentration, inverse_frequencies, rotate, rotation
from ..planning.memory import SCORES_LIMIT_BYTES
from ..planning.spec import Spec

Bounds = tuple[int, ...]
Turn = tuple[Tensor, Tensor]  # as `rope.rotation` gives it


@dataclass(frozen=True)
class Attention:
    """A way to compute attention.

    prepare: (bounds, window tokens or None, device) -> whatever `attend` wants to know of a pack, once for all layers
    of a kind. attend: (q, k and v side by side [T, (N + 2 K) D], cos and sin to rotate q and k with, sinks_N, prepared)
    -> [T, N * D], differentiable in the first and in sinks. tensors: prepared -> all by which it differs from that of
    another pack, in shapes that do not; None where there are other differences.
    """

    name: str
    prepare: Callable[[Bounds, int | None, torch.device], Any]
    attend: Callable[[Tensor, Turn, Tensor, Any], Tensor]
    tensors: Callable[[Any], list[Tensor]] | None = None


# --- plain


@dataclass(frozen=True)
class _Tile:
    queries: slice
    keys: slice
    hidden: Tensor  # [queries, keys]


def _tiles(bounds: Bounds, window_tokens: int | None, heads: int, device: torch.device) -> Iterator[_Tile]:
    """Queries of one document that go together, and the keys that some of them see; scores stay under the limit."""
    for begin, end in zip(bounds, bounds[1:], strict=False):
        columns = end - begin if window_tokens is None else min(end - begin, 2 * window_tokens)
        most = max(1, SCORES_LIMIT_BYTES // (heads * columns * 4))
        step = most if window_tokens is None else min(most, window_tokens)
        for low in range(begin, end, step):
            high = min(low + step, end)
            first = begin if window_tokens is None else max(begin, low - window_tokens + 1)
            query = torch.arange(low, high, device=device)[:, None]
            key = torch.arange(first, high, device=device)
            hidden = key > query
            if window_tokens is not None:
                hidden |= key <= query - window_tokens
            yield _Tile(slice(low, high), slice(first, high), hidden)


def _by_group(x_TND: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[T, N, D] -> [K, G, T, D]."""
    return x_TND.to(dtype).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


class _Plain(torch.autograd.Function):
    """With p the weights of the keys, o the output, g its gradient: ds = p (g v - g o), and a sink, whose value is
    zero, gets -p_sink (g o). (FlashAttention-2, https://arxiv.org/abs/2307.08691, section 3.1.2.)"""

    @staticmethod
    def forward(
        ctx: Any, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, sinks_N: Tensor, bounds: Bounds, window: int | None
    ) -> Tensor:
        heads, kv_heads, precision = q_TND.shape[1], k_TKD.shape[1], wide(q_TND.dtype)
        out_TND = torch.empty_like(q_TND)
        lse_KGT = torch.empty(kv_heads, heads // kv_heads, len(q_TND), dtype=precision, device=q_TND.device)
        sinks_KG1 = sinks_N.to(precision).view(kv_heads, -1, 1)
        for tile in _tiles(bounds, window, heads, q_TND.device):
            scores = _scores(q_TND, k_TKD, tile, precision)
            top = torch.maximum(scores.amax(-1), sinks_KG1)
            lse = top + torch.log((scores - top[..., None]).exp_().sum(-1) + torch.exp(sinks_KG1 - top))
            weights = scores.sub_(lse[..., None]).exp_()
            mixed = torch.einsum("kgtj,jkd->tkgd", weights, v_TKD[tile.keys].to(precision))
            out_TND[tile.queries] = mixed.flatten(1, 2).to(out_TND.dtype)
            lse_KGT[..., tile.queries] = lse
        ctx.save_for_backward(q_TND, k_TKD, v_TKD, sinks_N, out_TND, lse_KGT)
        ctx.bounds, ctx.window = bounds, window
        return out_TND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_TND, k_TKD, v_TKD, sinks_N, out_TND, lse_KGT = ctx.saved_tensors
        grad_TND, heads, kv_heads = grads[0], q_TND.shape[1], k_TKD.shape[1]
        precision = lse_KGT.dtype
        scale = q_TND.shape[2] ** -0.5
        dq_TND = torch.empty_like(q_TND)
        dk_TKD, dv_TKD = (torch.zeros(x.shape, dtype=precision, device=x.device) for x in (k_TKD, v_TKD))
        # g o for every query and head
        inner_KGT = _by_group(grad_TND, kv_heads, precision).mul(_by_group(out_TND, kv_heads, precision)).sum(-1)
        for tile in _tiles(ctx.bounds, ctx.window, heads, q_TND.device):
            keys, values = k_TKD[tile.keys].to(precision), v_TKD[tile.keys].to(precision)
            query = _by_group(q_TND[tile.queries], kv_heads, precision)
            grad = _by_group(grad_TND[tile.queries], kv_heads, precision)
            weights = _scores(q_TND, k_TKD, tile, precision).sub_(lse_KGT[..., tile.queries, None]).exp_()
            dv_TKD[tile.keys] += torch.einsum("kgtj,kgtd->jkd", weights, grad)
            slopes = torch.einsum("kgtd,jkd->kgtj", grad, values).sub_(inner_KGT[..., tile.queries, None])
            slopes = slopes.mul_(weights).mul_(scale)
            dk_TKD[tile.keys] += torch.einsum("kgtj,kgtd->jkd", slopes, query)
            dq = torch.einsum("kgtj,jkd->tkgd", slopes, keys)
            dq_TND[tile.queries] = dq.flatten(1, 2).to(dq_TND.dtype)
        weights_KGT = torch.exp(sinks_N.to(precision).view(kv_heads, -1, 1) - lse_KGT)
        dsinks_N = -(weights_KGT * inner_KGT).sum(-1).flatten().to(sinks_N.dtype)
        return dq_TND, dk_TKD.to(k_TKD.dtype), dv_TKD.to(v_TKD.dtype), dsinks_N, None, None


def _scores(q_TND: Tensor, k_TKD: Tensor, tile: _Tile, precision: torch.dtype) -> Tensor:
    query = _by_group(q_TND[tile.queries], k_TKD.shape[1], precision) * q_TND.shape[2] ** -0.5
    scores = torch.einsum("kgtd,jkd->kgtj", query, k_TKD[tile.keys].to(precision))
    return scores.masked_fill_(tile.hidden, float("-inf"))


def _attend_plain(qkv_TQ: Tensor, turn: Turn, sinks_N: Tensor, prepared: tuple[Bounds, int | None]) -> Tensor:
    q_TND, k_TKD, v_TKD = _heads(qkv_TQ, turn, len(sinks_N))
    out: Any = _Plain.apply(rotate(q_TND, *turn), rotate(k_TKD, *turn), v_TKD, sinks_N, *prepared)
    return out.flatten(1)


def _heads(qkv_TQ: Tensor, turn: Turn, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[T, N, D], [T, K, D], [T, K, D]."""
    all_TAD = qkv_TQ.unflatten(1, (-1, 2 * turn[0].shape[1]))
    kv_heads = (all_TAD.shape[1] - heads) // 2
    q_TND, k_TKD, v_TKD = all_TAD.split((heads, kv_heads, kv_heads), 1)
    return q_TND, k_TKD, v_TKD


PLAIN = Attention("plain", lambda bounds, window_tokens, device: (bounds, window_tokens), _attend_plain)


# --- flex_attention (https://arxiv.org/abs/2412.05496)


BLOCK = 128  # tokens of which flex_attention leaves out what nobody sees


_LISTS = ("num_blocks", "indices")  # of a BlockMask, for keys of queries and for queries of keys


def blocks(document_T: Tensor, window_tokens: int | None) -> tuple[Tensor, Tensor]:
    """[blocks of queries, blocks of keys] bool: those in which some query may see some key, and those in which every
    query sees every key. document_T: of each token, ascending; on the host, as all of this is."""
    of_block = document_T.view(-1, BLOCK)
    first, last = of_block[:, 0], of_block[:, -1]
    place = torch.arange(len(first))
    behind = place[:, None] - place  # blocks of keys before that of queries
    some = (behind >= 0) & (last >= first[:, None])
    every = (behind > 0) & (first == last[:, None])
    if window_tokens is not None:
        some &= (behind - 1) * BLOCK + 1 < window_tokens
        every &= (behind + 1) * BLOCK - 1 < window_tokens
    return some, every


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which: those first that it has."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def flex(capacity_tokens: int) -> Attention:
    """Compiled once for packs of up to `capacity_tokens`, which are filled up to that."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    from ..kernels.triton_layer import sunk, turned

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    size = -(-capacity_tokens // BLOCK) * BLOCK

    def prepare(bounds: Bounds, window_tokens: int | None, device: torch.device) -> Any:
        lengths = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
        lengths.append(size - bounds[-1])  # what fills up is a document of its own
        host = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        document = host.to(device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            near = (key <= query) & (document[query] == document[key])
            return near if window_tokens is None else near & (key > query - window_tokens)

        some, every = blocks(host, window_tokens)
        ordered = (part[None, None] for blocks in (some & ~every, every) for part in _ordered(blocks))
        mask = BlockMask.from_kv_blocks(*ordered, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(size, size))
        return mask.to(str(device)), document

    def tensors(prepared: Any) -> list[Tensor]:
        mask, document = prepared
        names = [f"{full}{side}_{what}" for full in ("", "full_") for side in "kv q".split() for what in _LISTS]
        return [document, *(getattr(mask, name) for name in names)]

    def attend(qkv_TQ: Tensor, turn: Turn, sinks_N: Tensor, prepared: Any) -> Tensor:
        mask, _ = prepared
        heads = len(sinks_N)
        kv_heads = (qkv_TQ.shape[1] // (2 * turn[0].shape[1]) - heads) // 2
        q, k, v = (part[None] for part in turned(qkv_TQ, turn, heads, kv_heads, size))
        out, aux = compiled(q, k, v, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
        return sunk(out.squeeze(0), aux.lse.squeeze(0), sinks_N, len(qkv_TQ))

    return Attention("flex", prepare, attend, tensors)


# --- the choice

ERROR_LIMIT = 2e-2  # of the largest value, in bf16, whose steps are 2 ** -8 of a value


@dataclass(frozen=True)
class Choice:
    """attention: what will be used. why: a line for the log."""

    attention: Attention
    why: str


def choose(spec: Spec, device: torch.device, dtype: torch.dtype, capacity_tokens: int) -> Choice:
    """flex_attention where it proves right on a small case with the model's heads, else the plain version."""
    if device.type != "cuda":
        return Choice(PLAIN, f"attention: plain; flex_attention has no gradient on {device.type}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a compiler's, about itself and about what would be less exact
            candidate = flex(capacity_tokens)
            error = largest_error(candidate, spec, device, dtype, min(capacity_tokens, 300))
    except Exception as error:  # whatever a compiler raises
        reason = " ".join(str(error).split())[:200]
        return Choice(PLAIN, f"attention: plain; flex_attention fails here: {type(error).__name__}: {reason}")
    if not error <= ERROR_LIMIT:
        return Choice(PLAIN, f"attention: plain; flex_attention is off by {error:.1e} (limit {ERROR_LIMIT:.0e})")
    return Choice(candidate, f"attention: flex_attention; within {error:.1e} of plain, gradients included")


def largest_error(candidate: Attention, spec: Spec, device: torch.device, dtype: torch.dtype, tokens: int) -> float:
    """Of output and gradients of q, k, v and sinks, relative to the largest value of each, against plain in fp32.

    Three documents, of which one is longer than the window; with a window and without.
    """
    generator = torch.Generator().manual_seed(0)
    qkv, grad = (
        torch.randn(tokens, count * spec.head_dim, generator=generator).to(dtype)
        for count in (spec.heads + 2 * spec.kv_heads, spec.heads)
    )
    bounds = (0, tokens // 5, tokens // 5 + 1, tokens)
    positions = torch.cat([torch.arange(end - begin) for begin, end in zip(bounds, bounds[1:], strict=False)])
    frequencies = inverse_frequencies(spec).to(device)
    turn = rotation(positions.to(device), frequencies, concentration(spec))
    sinks = torch.randn(spec.heads, generator=generator)
    worst = 0.0
    for window_tokens in (None, max(1, min(spec.window_tokens, tokens // 2))):

        def run(attention: Attention, wanted: torch.dtype, window: int | None = window_tokens) -> list[Tensor]:
            x = qkv.to(device=device, dtype=wanted, copy=True).requires_grad_()
            leaf = sinks.to(device, copy=True).requires_grad_()
            out = attention.attend(x, turn, leaf, attention.prepare(bounds, window, device))
            out.backward(grad.to(device=device, dtype=wanted))
            assert x.grad is not None and leaf.grad is not None
            return [out.detach(), *_heads(x.grad, turn, spec.heads), leaf.grad]

        for ours, exact in zip(run(candidate, dtype), run(PLAIN, torch.float32), strict=True):
            worst = max(worst, ((ours.float() - exact).abs().max() / exact.abs().max()).item())
    return worst

"""Attention over paged keys and values: q, k, v with RoPE and the write into pages; attend; the output product.

T tokens of this step, N query heads, K KV heads, G = N / K, D head_dim, J keys. All heads here are this rank's own.
Sinks: one learned logit a query head joins the softmax and takes weight away, but has no value
(OpenAI's gpt_oss/torch/model.py, sdpa).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..planning.memory import SCORES_LIMIT_BYTES
from .batch import Batch, Chunk, PageView
from .linear import linear
from .norm import add_norm
from .precision import wide
from .rope import rotate
from .weight_only import Weight


def norm_qkv_write(
    residual_TH: Tensor,
    delta_TH: Tensor | None,
    norm_H: Tensor,
    eps: float,
    dtype: torch.dtype,
    weight_QH: Weight,
    bias_Q: Tensor,
    rotation: tuple[Tensor, Tensor],
    kv_PCSKD: Tensor,
    slots_T: Tensor,
    product: Callable[..., Tensor] = linear,
) -> tuple[Tensor, Tensor]:
    """(residual_TH, q_TND): norm.add_norm, and `qkv_write` of what it gives."""
    residual_TH, x_TH = add_norm(residual_TH, delta_TH, norm_H, eps, dtype)
    return residual_TH, qkv_write(x_TH, weight_QH, bias_Q, rotation, kv_PCSKD, slots_T, product)


def qkv_write(
    x_TH: Tensor,
    weight_QH: Weight,
    bias_Q: Tensor,
    rotation: tuple[Tensor, Tensor],
    kv_PCSKD: Tensor,
    slots_T: Tensor,
    product: Callable[..., Tensor] = linear,
) -> Tensor:
    """Project by `product`, rotate q and k, write k and v to their slots. Returns q_TND.

    weight_QH: q, k and v rows, fused in this order. kv_PCSKD: one layer's pages [pages, 2, page_tokens, K, D],
    written in place. slots_T: page * page_tokens + offset for each token.
    """
    tokens = len(x_TH)
    _, _, page_tokens, kv_heads, head_dim = kv_PCSKD.shape
    qkv = product(x_TH, weight_QH, bias_Q).view(tokens, -1, head_dim)
    q_TND, k_TKD, v_TKD = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    page, offset = slots_T // page_tokens, slots_T % page_tokens
    write(kv_PCSKD, page, 0, offset, rotate(k_TKD, *rotation))
    write(kv_PCSKD, page, 1, offset, v_TKD)
    return rotate(q_TND, *rotation)


def write(kv_PCSKD: Tensor, page_T: Tensor, part: int, offset_T: Tensor, x_TKD: Tensor) -> None:
    """Keys (part 0) or values (1) to their slots, rounded to the dtype of the pages."""
    x_TKD = x_TKD.to(kv_PCSKD.dtype)
    if kv_PCSKD.dtype.itemsize == 1:  # torch indexes no fp8: the same bytes as integers
        kv_PCSKD, x_TKD = kv_PCSKD.view(torch.uint8), x_TKD.view(torch.uint8)
    kv_PCSKD[page_T, part, offset_T] = x_TKD


def attend(q_TND: Tensor, kv_PCSKD: Tensor, sinks_N: Tensor, batch: Batch, pages: PageView) -> Tensor:
    """Each token over its own sequence's keys up to itself, the last pages.window_tokens of them where that is set.

    Returns [T, N * D]. Computed in fp32 (fp64 for fp64 queries).
    """
    out_TND = torch.empty_like(q_TND)
    for chunk in (*_decodes(batch), *batch.chunks):
        tokens = chunk.stop - chunk.start
        begin = 0 if pages.window_tokens is None else max(0, chunk.length - tokens - pages.window_tokens + 1)
        table_P = pages.table_RP[chunk.row]
        keys_JKD, values_JKD = read_pages(kv_PCSKD, table_P, begin, chunk.length, wide(q_TND.dtype))
        rows = slice(chunk.start, chunk.stop)
        attend_one(q_TND[rows], keys_JKD, values_JKD, sinks_N, pages.window_tokens, out_TND[rows])
    return out_TND.flatten(1)


def _decodes(batch: Batch) -> list[Chunk]:
    """Decodes as chunks of one token; asks the device where their sequences are."""
    where = zip(batch.rows_T[: batch.decodes].tolist(), batch.positions_T[: batch.decodes].tolist(), strict=True)
    return [Chunk(index, index + 1, row, position + 1) for index, (row, position) in enumerate(where)]


def read_pages(kv_PCSKD: Tensor, table_P: Tensor, begin: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [J, K, D] of one sequence's positions begin to end."""
    page_tokens = kv_PCSKD.shape[2]
    first = begin // page_tokens
    used = table_P[first : -(-end // page_tokens)]
    rows = slice(begin - first * page_tokens, end - first * page_tokens)
    stored = kv_PCSKD.dtype
    if stored.itemsize == 1:  # as in `write`
        kv_PCSKD = kv_PCSKD.view(torch.uint8)
    keys_JKD, values_JKD = (kv_PCSKD[used, part].flatten(0, 1)[rows].view(stored).to(dtype) for part in (0, 1))
    return keys_JKD, values_JKD


def attend_one(
    q_TND: Tensor, keys_JKD: Tensor, values_JKD: Tensor, sinks_N: Tensor, window_tokens: int | None, out_TND: Tensor
) -> None:
    """The last T of J positions of one sequence, into out_TND. Queries go in tiles of one size, so that the scores of
    a tile stay under SCORES_LIMIT_BYTES and each tile can use the memory of the one before."""
    tokens, heads, head_dim = q_TND.shape
    length, kv_heads, _ = keys_JKD.shape
    precision = keys_JKD.dtype
    sinks_KG1 = sinks_N.to(precision).view(kv_heads, -1, 1)
    columns = length if window_tokens is None else min(length, window_tokens + tokens)
    tile = max(1, min(tokens, SCORES_LIMIT_BYTES // (heads * columns * precision.itemsize)))
    for low in range(0, tokens, tile):
        high = min(low + tile, tokens)
        query = torch.arange(length - tokens + low, length - tokens + high, device=q_TND.device)[:, None]
        # a window's tile sees few of the keys; without a window, all of them, those to come hidden
        seen = slice(0, length)
        if window_tokens is not None:
            seen = slice(max(0, length - tokens + low - window_tokens + 1), length - tokens + high)
        key = torch.arange(seen.start, seen.stop, device=q_TND.device)
        hidden = key > query
        if window_tokens is not None:
            hidden |= key <= query - window_tokens
        q_KGTD = q_TND[low:high].to(precision).view(high - low, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        scores = torch.einsum("kgtd,jkd->kgtj", q_KGTD * head_dim**-0.5, keys_JKD[seen])
        scores.masked_fill_(hidden, float("-inf"))
        top = torch.maximum(scores.amax(-1), sinks_KG1)
        weights = scores.sub_(top[..., None]).exp_()
        total = weights.sum(-1) + torch.exp(sinks_KG1 - top)
        mixed = torch.einsum("kgtj,jkd->tkgd", weights, values_JKD[seen])
        out_TND[low:high] = (mixed / total.permute(2, 0, 1)[..., None]).reshape(high - low, heads, head_dim)

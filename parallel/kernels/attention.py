"""Attention over paged keys and values: q, k, v with RoPE and the write into pages; attend; the output product.

T tokens of this step, N query heads, K KV heads, G = N / K, D head_dim, J keys. All heads here are this rank's own.
Sinks: one learned logit a query head joins the softmax and takes weight away, but has no value
(OpenAI's gpt_oss/torch/model.py, sdpa).
"""

import torch
from torch import Tensor

from ..planning.memory import SCORES_LIMIT_BYTES
from .batch import Batch, PageView
from .precision import wide
from .rope import rotate


def qkv_write(
    x_TH: Tensor,
    weight_QH: Tensor,
    bias_Q: Tensor,
    rotation: tuple[Tensor, Tensor],
    kv_PCSKD: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Project, rotate q and k, write k and v to their slots. Returns q_TND.

    weight_QH: q, k and v rows, fused in this order. kv_PCSKD: one layer's pages [pages, 2, page_tokens, K, D],
    written in place. slots_T: page * page_tokens + offset for each token.
    """
    tokens = len(x_TH)
    _, _, page_tokens, kv_heads, head_dim = kv_PCSKD.shape
    qkv = torch.nn.functional.linear(x_TH, weight_QH, bias_Q).view(tokens, -1, head_dim)
    q_TND, k_TKD, v_TKD = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    page, offset = slots_T // page_tokens, slots_T % page_tokens
    kv_PCSKD[page, 0, offset] = rotate(k_TKD, *rotation).to(kv_PCSKD.dtype)
    kv_PCSKD[page, 1, offset] = v_TKD.to(kv_PCSKD.dtype)
    return rotate(q_TND, *rotation)


def attend(q_TND: Tensor, kv_PCSKD: Tensor, sinks_N: Tensor, batch: Batch, pages: PageView) -> Tensor:
    """Each token over its own sequence's keys up to itself, the last pages.window_tokens of them where that is set.

    Returns [T, N * D]. Computed in fp32 (fp64 for fp64 queries).
    """
    _, _, page_tokens, kv_heads, head_dim = kv_PCSKD.shape
    tokens, heads, _ = q_TND.shape
    out_TND = torch.empty_like(q_TND)
    precision = wide(q_TND.dtype)
    sinks_KG1 = sinks_N.to(precision).view(kv_heads, -1, 1)
    for index, (start, stop, length) in enumerate(batch.spans):
        first = length - (stop - start)  # position of this sequence's first token in the step
        tile = max(1, SCORES_LIMIT_BYTES // (heads * length * precision.itemsize))
        for low in range(start, stop, tile):
            high = min(low + tile, stop)
            query = torch.arange(first + low - start, first + high - start, device=q_TND.device)
            end = first + high - start
            begin = 0 if pages.window_tokens is None else max(0, first + low - start - pages.window_tokens + 1)
            page_begin = begin // page_tokens
            used = pages.table[index, page_begin : -(-end // page_tokens)]
            keys, values = (
                kv_PCSKD[used, part].flatten(0, 1)[begin - page_begin * page_tokens : end - page_begin * page_tokens]
                for part in (0, 1)
            )  # [J, K, D]
            key = torch.arange(begin, end, device=q_TND.device)
            hidden = key > query[:, None]
            if pages.window_tokens is not None:
                hidden |= key <= query[:, None] - pages.window_tokens
            q_KGTD = q_TND[low:high].to(precision).view(high - low, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
            scores = torch.einsum("kgtd,jkd->kgtj", q_KGTD * head_dim**-0.5, keys.to(precision))
            scores.masked_fill_(hidden, float("-inf"))
            top = torch.maximum(scores.amax(-1), sinks_KG1)
            weights = torch.exp(scores - top[..., None])
            total = weights.sum(-1) + torch.exp(sinks_KG1 - top)
            out = torch.einsum("kgtj,jkd->tkgd", weights / total[..., None], values.to(precision))
            out_TND[low:high] = out.reshape(high - low, heads, head_dim)
    return out_TND.view(tokens, heads * head_dim)

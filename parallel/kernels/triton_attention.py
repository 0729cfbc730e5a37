"""Attention over paged keys and values in Triton: decodes and chunks of one step, each by its own kernel.

Signature and meaning are those of attention.attend; q in bf16, fp16 or fp32, pages in these or fp8 (e4m3fn).
"""

import torch
from torch import Tensor

from . import triton_attend_chunks as chunks
from . import triton_attend_decodes as decodes
from .batch import Batch, PageView


def attend(q_TND: Tensor, kv_PCSKD: Tensor, sinks_N: Tensor, batch: Batch, pages: PageView) -> Tensor:
    """Each token over its own sequence's keys up to itself, the last pages.window_tokens of them where that is set.

    Returns [T, N * D] in the dtype of q. Operands of products are in that dtype, all sums in fp32. Asks the device
    nothing, so a CUDA graph can hold it; the same bits at every run.
    """
    out_TND = torch.empty_like(q_TND)
    full = pages.window_tokens is None
    if batch.decodes:
        tuning = decodes.FULL if full else decodes.WINDOW
        decodes.attend_decodes(q_TND, kv_PCSKD, sinks_N, batch, pages, out_TND, tuning)
    if len(batch.tiles_X4):
        tuning = chunks.FULL if full else chunks.WINDOW
        chunks.attend_chunks(q_TND, kv_PCSKD, sinks_N, batch, pages, out_TND, tuning)
    return out_TND.flatten(1)

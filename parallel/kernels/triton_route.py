"""The router in one kernel: logits, the choice of X experts, and their softmax, as `experts.route`.

A program multiplies some tokens by some experts over a part of the hidden dim; the last of a group of tokens adds up
the parts in order and chooses. Few tokens are cut into many parts, as one program alone would wait for the router's
weights for longer than all the experts take. T tokens, H hidden, E experts, X experts a token.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_decode import arrive
from .triton_launch import constants, early

GROUP_TOKENS = 16  # tokens of a program: the least that a tensor core's product has
STEP_COLUMNS = 64
MAX_PARTS = 16
_LOWEST = tl.constexpr(-3.4e38)
MAX_GROUPS = 4096  # of tokens, in one call
FULL_GROUPS = 64  # from so many groups on the parts are few: there are programs enough


@triton.jit(do_not_specialize=["tokens"])
def _route(
    x,
    weight,
    bias,
    partial,
    chosen_weights,
    chosen_experts,
    arrivals,
    tokens,
    width,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    EXPERTS_PER_TOKEN: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    EARLY: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """partial: fp32 [parts, T, EXPERTS_2]. Equal logits go to the lower number. NaN is never chosen before a number,
    but what is chosen is always a valid expert."""
    group, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = group * TOKENS + tl.arange(0, TOKENS)
    expert = block * EXPERT_BLOCK + tl.arange(0, EXPERT_BLOCK)
    column = tl.arange(0, STEP)
    share = tl.cdiv(tl.cdiv(width, STEP), PARTS) * STEP
    x_TK = x + token.to(tl.int64)[:, None] * width
    weight_EK = weight + expert[:, None] * width
    acc = tl.zeros((TOKENS, EXPERT_BLOCK), tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    for begin in range(part * share, tl.minimum((part + 1) * share, width), STEP):
        at = begin + column[None, :]
        value = tl.load(x_TK + at, mask=(token < tokens)[:, None] & (at < width), other=0.0)
        row = tl.load(weight_EK + at, mask=(expert < EXPERTS)[:, None] & (at < width), other=0.0)
        if PLAIN:
            value, row = value.to(tl.float32), row.to(tl.float32)
        acc = tl.dot(value, tl.trans(row), acc, input_precision="ieee")
    at = (part * tokens + token)[:, None] * EXPERTS_2 + expert[None, :]
    tl.store(partial + at, acc, mask=(token < tokens)[:, None])
    if arrive(arrivals + group, PARTS * (EXPERTS_2 // EXPERT_BLOCK)):
        every = tl.arange(0, EXPERTS_2)
        real = every < EXPERTS
        logit = tl.zeros((TOKENS, EXPERTS_2), tl.float32)
        for i in tl.static_range(PARTS):  # all loads in flight together
            part_TE = partial + (i * tokens + token)[:, None] * EXPERTS_2 + every[None, :]
            logit += tl.load(part_TE, mask=(token < tokens)[:, None], other=0.0, cache_modifier=".cg")
        logit += tl.load(bias + every, mask=real, other=0.0).to(tl.float32)[None, :]
        logit = tl.where(logit == logit, logit, _LOWEST)
        place = tl.arange(0, 8)
        values = tl.full((TOKENS, 8), float("-inf"), tl.float32)
        ids = tl.zeros((TOKENS, 8), tl.int32)
        left = (token >= 0)[:, None] & real[None, :]
        for i in tl.static_range(EXPERTS_PER_TOKEN):
            best = tl.max(tl.where(left, logit, float("-inf")), 1)
            found = tl.min(tl.where(left & (logit == best[:, None]), every[None, :], EXPERTS - 1), 1)
            values = tl.where(place[None, :] == i, best[:, None], values)
            ids = tl.where(place[None, :] == i, found[:, None], ids)
            left = left & (every[None, :] != found[:, None])
        share_of = tl.exp(values - tl.max(values, 1)[:, None])
        share_of = share_of / tl.sum(share_of, 1)[:, None]
        choice = token[:, None] * EXPERTS_PER_TOKEN + place[None, :]
        there = (token < tokens)[:, None] & (place < EXPERTS_PER_TOKEN)[None, :]
        tl.store(chosen_weights + choice, share_of, mask=there)
        tl.store(chosen_experts + choice, ids.to(tl.int64), mask=there)


def route(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """As `experts.route`, for up to 8 experts a token; of equal logits the lower expert is chosen."""
    tokens, width = x_TH.shape
    count = len(weight_EH)
    device = x_TH.device
    groups = triton.cdiv(tokens, GROUP_TOKENS)
    if experts_per_token > min(8, count) or groups > MAX_GROUPS:
        raise ValueError(f"{experts_per_token} of {count} experts a token, {tokens} tokens")
    parts = min(MAX_PARTS, triton.cdiv(width, STEP_COLUMNS)) if groups < FULL_GROUPS else 1
    block = 16 if groups < FULL_GROUPS else 32
    padded = max(triton.next_power_of_2(count), block)
    partial = torch.empty((parts, tokens, padded), dtype=torch.float32, device=device)
    weights_TX = torch.empty((tokens, experts_per_token), dtype=torch.float32, device=device)
    experts_TX = torch.empty((tokens, experts_per_token), dtype=torch.int64, device=device)
    _route[groups, padded // block, parts](
        x_TH,
        weight_EH,
        bias_E,
        partial,
        weights_TX,
        experts_TX,
        _arrivals(device),
        tokens,
        width,
        **constants(
            PARTS=parts,
            EXPERTS=count,
            EXPERTS_2=padded,
            EXPERT_BLOCK=block,
            EXPERTS_PER_TOKEN=experts_per_token,
            TOKENS=GROUP_TOKENS,
            STEP=STEP_COLUMNS,
            EARLY=early(x_TH),
            PLAIN=not x_TH.is_cuda,
            num_warps=4,
        ),
    )
    return weights_TX, experts_TX


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters that each call leaves at zero. One stream a device: calls may not overlap."""
    return torch.zeros(MAX_GROUPS, dtype=torch.int32, device=device)

"""The router in one kernel: logits, the choice of X experts, and their softmax, as `experts.route`; for few tokens with
the norm before it.

A program multiplies some tokens by some experts over a part of the hidden dim; the last of a group of tokens adds up
the parts in order and chooses. Few tokens are cut into many parts, as one program alone would wait for the router's
weights for longer than all the experts take. With the norm, a program has one token and all of the hidden dim.
T tokens, H hidden, E experts, X experts a token.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_launch import ARRIVALS, arrivals, arrive, constants, early
from .triton_norm import add_norm, added, normalised, rounded

GROUP_TOKENS = 16  # tokens of a program: the least that a tensor core's product has
STEP_COLUMNS = 64
MAX_PARTS = 16
_LOWEST = tl.constexpr(-3.4e38)
_TAKEN = tl.constexpr(-(2**31))  # below the integer of any number, see `_in_order`
_PLACES = tl.constexpr(32)  # of chosen experts: one a lane, so that none is moved to be stored
MOST_TOKENS = ARRIVALS * GROUP_TOKENS  # of a launch: a counter for each group
FULL_GROUPS = 64  # from so many groups on the parts are few: there are programs enough


@dataclass(frozen=True)
class Fused:
    """When norm and router are one kernel: up to so many tokens and programs. By registers an H200 runs 528 programs of
    8 warps at once, or 264 that have four experts each."""

    tokens: int = 32
    programs: int = 512
    of_token: int = 32  # programs at most; with more experts each has several
    together: int = 4  # experts of a program where there are several tokens
    warps: int = 8  # of a program


FUSED = Fused()


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
    if EARLY:
        gdc_launch_dependents()
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
        logit = tl.zeros((TOKENS, EXPERTS_2), tl.float32)
        for i in tl.static_range(PARTS):  # all loads in flight together
            part_TE = partial + (i * tokens + token)[:, None] * EXPERTS_2 + every[None, :]
            logit += tl.load(part_TE, mask=(token < tokens)[:, None], other=0.0, cache_modifier=".cg")
        logit += tl.load(bias + every, mask=every < EXPERTS, other=0.0).to(tl.float32)[None, :]
        _choose(
            logit,
            token,
            token < tokens,
            chosen_weights,
            chosen_experts,
            EXPERTS,
            EXPERTS_2,
            EXPERTS_PER_TOKEN,
            TOKENS,
        )


@triton.jit(do_not_specialize=["eps"])
def _norm_route(
    residual,
    delta,
    norm,
    weight,
    bias,
    summed,
    normed,
    logits,
    chosen_weights,
    chosen_experts,
    arrivals,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    EXPERTS_PER_TOKEN: tl.constexpr,
    TOGETHER: tl.constexpr,
    WARPS: tl.constexpr,
    CHOOSE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program for each token and TOGETHER experts: all of them work out the token's norm, which is less than to wait
    for it. logits: fp32 [T, EXPERTS]; without CHOOSE they are left to who reads them."""
    if EARLY:
        gdc_launch_dependents()
    block, token = tl.program_id(0), tl.program_id(1)
    expert = block * TOGETHER + tl.arange(0, TOGETHER)
    real = expert < EXPERTS
    column = tl.arange(0, BLOCK)
    here = column < HIDDEN
    factor = tl.load(norm + column, mask=here, other=0.0)
    at_EK = expert[:, None] * HIDDEN + column[None, :]
    row = tl.load(weight + at_EK, mask=real[:, None] & here[None, :], other=0.0)
    more = tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
    if EARLY:
        tl.debug_barrier()  # ptxas would read the weights after the wait
        gdc_wait()
    at = token.to(tl.int64) * HIDDEN + column
    x = added(tl.load(residual + at, mask=here, other=0.0), tl.load(delta + at, mask=here, other=0.0))
    value = rounded(normalised(x, factor, eps, HIDDEN), normed.dtype.element_ty, EARLY)
    logit = tl.sum(value.to(tl.float32)[None, :] * row.to(tl.float32), 1) + more
    tl.store(logits + token * EXPERTS + expert, logit, mask=real)
    last = False
    if CHOOSE:
        last = arrive(arrivals + token, tl.cdiv(EXPERTS, TOGETHER))
    if block == 0:  # not earlier, as the last one would wait for these to be stored
        tl.store(summed + at, x, mask=here)
        tl.store(normed + at, value, mask=here)
    if CHOOSE and last:
        row_W = tl.arange(0, WARPS)  # each warp has all logits and chooses; one of them stores
        every_WE = row_W[:, None] * 0 + tl.arange(0, EXPERTS_2)[None, :]
        all_WE = tl.load(logits + token * EXPERTS + every_WE, mask=every_WE < EXPERTS, other=0.0, cache_modifier=".cg")
        _choose(
            all_WE,
            row_W * 0 + token,
            row_W == 0,
            chosen_weights,
            chosen_experts,
            EXPERTS,
            EXPERTS_2,
            EXPERTS_PER_TOKEN,
            WARPS,
        )


@triton.jit
def choice(logits, slot, EXPERTS: tl.constexpr, EXPERTS_2: tl.constexpr, EXPERTS_PER_TOKEN: tl.constexpr):
    """Which expert is one token's choice number `slot`, as `_choose` has it, from its logits [EXPERTS] in memory."""
    every = tl.arange(0, EXPERTS_2)
    key = _keys(tl.load(logits + every, mask=every < EXPERTS, other=0.0), every, EXPERTS)
    expert = 0
    for i in tl.static_range(EXPERTS_PER_TOKEN):
        found = tl.min(tl.where(key == tl.max(key, 0), every, EXPERTS_2), 0)
        key = tl.where(every == found, _TAKEN, key)
        expert = tl.where(slot == i, found, expert)
    return expert


@triton.jit
def leave_choice(
    logits,
    chosen_weights,
    chosen_experts,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    EXPERTS_PER_TOKEN: tl.constexpr,
):
    """One token's choice and its softmax, from its logits [EXPERTS] in memory, to memory."""
    token, every = tl.arange(0, 1), tl.arange(0, EXPERTS_2)[None, :]
    all_1E = tl.load(logits + every, mask=every < EXPERTS, other=0.0)
    _choose(all_1E, token, token == 0, chosen_weights, chosen_experts, EXPERTS, EXPERTS_2, EXPERTS_PER_TOKEN, 1)


@triton.jit
def _keys(logit, every, EXPERTS: tl.constexpr):
    """Integers in the order of the logits, those of what is no number below those of all numbers."""
    logit = tl.where(logit == logit, logit + 0.0, _LOWEST)  # -0.0 becomes 0.0
    return tl.where(every < EXPERTS, _in_order(logit.to(tl.int32, bitcast=True)), _TAKEN)


@triton.jit
def _choose(
    logit,
    token,
    there,
    chosen_weights,
    chosen_experts,
    EXPERTS: tl.constexpr,
    EXPERTS_2: tl.constexpr,
    EXPERTS_PER_TOKEN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The choice and its softmax from logits [TOKENS, EXPERTS_2], to the rows of those tokens that are there.

    By integers in the order of the logits: the largest, and then the lowest expert with it, are each one instruction of
    a warp that has a token's logits to itself.
    """
    every = tl.arange(0, EXPERTS_2)[None, :]
    key = _keys(logit, every, EXPERTS)
    place = tl.arange(0, _PLACES)[None, :]
    shares = tl.zeros((TOKENS, _PLACES), tl.float32)
    experts = tl.zeros((TOKENS, _PLACES), tl.int32)
    largest = tl.zeros((TOKENS,), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    for i in tl.static_range(EXPERTS_PER_TOKEN):
        best = tl.max(key, 1)
        found = tl.min(tl.where(key == best[:, None], every, EXPERTS_2), 1)
        key = tl.where(every == found[:, None], _TAKEN, key)
        value = _in_order(best).to(tl.float32, bitcast=True)
        if i == 0:
            largest = value
        share = tl.exp(value - largest)
        total += share
        shares = tl.where(place == i, share[:, None], shares)
        experts = tl.where(place == i, found[:, None], experts)
    choice = token[:, None] * EXPERTS_PER_TOKEN + place
    wanted = there[:, None] & (place < EXPERTS_PER_TOKEN)
    tl.store(chosen_weights + choice, shares / total[:, None], mask=wanted)
    tl.store(chosen_experts + choice, experts.to(tl.int64), mask=wanted)


@triton.jit
def _in_order(bits):
    """The bits of an fp32 number as an integer, so that integers are in the order of numbers; and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def norm_route(
    residual_TH: Tensor,
    delta_TH: Tensor,
    norm_H: Tensor,
    eps: float,
    dtype: torch.dtype,
    weight_EH: Tensor,
    bias_E: Tensor,
    experts_per_token: int,
    fused: Fused = FUSED,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `experts.norm_route`: one kernel for few tokens, two for more."""
    tokens = len(residual_TH)
    blocks = triton.cdiv(len(weight_EH), _together(len(weight_EH), tokens, fused))
    before = residual_TH, delta_TH, norm_H, eps, dtype
    if tokens > fused.tokens or blocks * tokens > fused.programs:
        residual_TH, x_TH = add_norm(*before)
        return residual_TH, x_TH, *route(x_TH, weight_EH, bias_E, experts_per_token)
    weights_TX, experts_TX = room(tokens, experts_per_token, residual_TH.device)
    sum_TH, x_TH, _ = _logits(*before, weight_EH, bias_E, fused, (weights_TX, experts_TX))
    return sum_TH, x_TH, weights_TX, experts_TX


def norm_logits(
    residual_1H: Tensor,
    delta_1H: Tensor,
    norm_H: Tensor,
    eps: float,
    dtype: torch.dtype,
    weight_EH: Tensor,
    bias_E: Tensor,
    fused: Fused = FUSED,
) -> tuple[Tensor, Tensor, Tensor]:
    """(residual_1H, x_1H, logits_1E fp32) of one token: `norm_route` that leaves the choice to `choice`."""
    return _logits(residual_1H, delta_1H, norm_H, eps, dtype, weight_EH, bias_E, fused, None)


def room(tokens: int, experts_per_token: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For (weights_TX, experts_TX)."""
    shape = tokens, experts_per_token
    return torch.empty(shape, dtype=torch.float32, device=device), torch.empty(shape, dtype=torch.int64, device=device)


def _together(experts: int, tokens: int, fused: Fused) -> int:
    """Experts of a program."""
    least = int(triton.next_power_of_2(triton.cdiv(experts, fused.of_token)))
    return least if tokens == 1 else max(least, fused.together)


def _logits(
    residual_TH: Tensor,
    delta_TH: Tensor,
    norm_H: Tensor,
    eps: float,
    dtype: torch.dtype,
    weight_EH: Tensor,
    bias_E: Tensor,
    fused: Fused,
    routes: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, hidden), count, device = residual_TH.shape, len(weight_EH), residual_TH.device
    together = _together(count, tokens, fused)
    sum_TH = torch.empty_like(residual_TH)
    x_TH = torch.empty((tokens, hidden), dtype=dtype, device=device)
    logits_TE = torch.empty((tokens, count), dtype=torch.float32, device=device)
    weights_TX, experts_TX = routes or (logits_TE, logits_TE)
    _norm_route[triton.cdiv(count, together), tokens](
        residual_TH,
        delta_TH,
        norm_H,
        weight_EH,
        bias_E,
        sum_TH,
        x_TH,
        logits_TE,
        weights_TX,
        experts_TX,
        arrivals(device),
        eps,
        **constants(
            HIDDEN=hidden,
            BLOCK=triton.next_power_of_2(hidden),
            EXPERTS=count,
            EXPERTS_2=triton.next_power_of_2(count),
            EXPERTS_PER_TOKEN=weights_TX.shape[1],
            TOGETHER=together,
            WARPS=fused.warps,
            CHOOSE=routes is not None,
            EARLY=early(residual_TH),
            num_warps=fused.warps,
        ),
    )
    return sum_TH, x_TH, logits_TE


def route(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """As `experts.route`, for up to 8 experts a token; of equal logits the lower expert is chosen."""
    tokens, width = x_TH.shape
    count = len(weight_EH)
    device = x_TH.device
    if experts_per_token > min(8, count):
        raise ValueError(f"{experts_per_token} of {count} experts a token")
    if tokens > MOST_TOKENS:  # of a pack to train on: a step of the engine has fewer
        several = [route(part_TH, weight_EH, bias_E, experts_per_token) for part_TH in x_TH.split(MOST_TOKENS)]
        weights, experts = zip(*several, strict=True)
        return torch.cat(weights), torch.cat(experts)
    groups = triton.cdiv(tokens, GROUP_TOKENS)
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
        arrivals(device),
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

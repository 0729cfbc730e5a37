"""Drawing the next tokens of many sequences from logits whose vocabulary is cut over ranks, without gathering them.

The draw is a race: token i finishes at time E_i / p_i with E_i exponential, and the first one wins, which is exactly a
draw from p (the Gumbel-max trick in another dress). E_i is a pure function of (seed, position, i), so each rank finds
its own winner, and the winners are compared. For top_p and top_k the ranks exchange their most likely tokens.

A row's draw is the same bit for bit in any batch and for any cut of the vocabulary: what is computed in floating point
goes element by element, and the only sums, of probabilities, are sums of whole numbers.

S sequences, V vocabulary rows of this rank, R ranks, C candidates of a rank, N = R C. Logits are raced in fp32, in fp64
where they are fp64. They may hold -inf (never drawn) as long as something else stands beside it; no nan, no +inf.
Knows nothing of requests, penalties or masks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..planning.memory import DRAW_ELEMENT_BYTES, DRAW_LIMIT_BYTES
from .hash import mix
from .precision import wide

CANDIDATES = 256  # most likely tokens of each rank, exchanged for top_p and top_k
MORE_CANDIDATES = 4  # times as many each time they do not suffice
LISTED_BYTES = 72  # of a candidate while the merged list is gone through, at most
WEIGHT_BITS = 44  # a probability is counted in 2^-44 of the largest; 2^18 of the largest still fit an int64
EXPONENTIAL_BITS = 52  # of a uniform number; one more would round to 1 in fp64
NEVER = float("-inf")
NO_TOKEN = (1 << 31) - 1  # above any id

AllGather = Callable[[Tensor], Tensor]  # x -> [R, ...], in rank order


@dataclass(frozen=True)
class Draws:
    """How each of S rows is drawn, on the device; see engine.request.Sampling for what the words mean.

    temperature, top_p, min_p, presence, frequency and repetition fp32, top_k int32, seed int64, position int32 or
    int64. position is where the drawn token will stand. The last three before top_k are for `adjust`; nothing here
    reads them. Fast versions read these before earlier kernels of the step have ended: no such kernel makes them.
    """

    temperature_S: Tensor
    top_p_S: Tensor
    min_p_S: Tensor
    presence_S: Tensor
    frequency_S: Tensor
    repetition_S: Tensor
    top_k_S: Tensor
    seed_S: Tensor
    position_S: Tensor

    def rows(self, which: Tensor | slice) -> "Draws":
        return Draws(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Wanted:
    """What some row of a step asks for; the same on every rank. What no row asks for costs nothing and is not done."""

    candidates: bool  # some row has top_p < 1 or top_k > 0
    min_p: bool  # some row has min_p > 0


EVERYTHING = Wanted(candidates=True, min_p=True)


@dataclass(frozen=True)
class Drawn:
    """tokens int64, the same on every rank. Where complete (bool) is False the exchanged candidates did not suffice,
    and the token means nothing: `sample_exact` draws it."""

    tokens_S: Tensor
    complete_S: Tensor


@dataclass(frozen=True)
class Kept:
    """Where the draws of a step are written, for the next step and for the host.

    row_S: int32, of the state. last_R: the token drawn last in each row. step_1: int32, the number of the step.
    outs_NS2: int64, of the last N steps: token and whether it is complete, in the place of this one (step modulo N),
    which the device thus finds by itself: a graph is the same for all steps.
    """

    row_S: Tensor
    last_R: Tensor
    step_1: Tensor
    outs_NS2: Tensor


@dataclass(frozen=True)
class Local:
    """What a rank does for itself: the functions of these names here, or fast ones."""

    race: Callable[[Tensor, int, Draws, Tensor | None, Tensor | None], Tensor]
    first: Callable[[Tensor, Kept | None], Drawn]
    log_times: Callable[[Draws, Tensor, torch.dtype], Tensor]
    keep: Callable[[Drawn, Kept], None]


def sample(
    logits_SV: Tensor,
    first_token: int,
    all_gather: AllGather,
    draws: Draws,
    wanted: Wanted,
    kept: Kept | None = None,
    local: Local | None = None,
) -> Drawn:
    """One token a row, without waiting for the device. Temperature 0 takes the largest logit, the lowest id of equals.

    first_token: id of this rank's first row. kept: where the draws are written besides. local: PLAIN unless given. A
    row is complete unless its top_k or its nucleus reaches down to the last of some rank's candidates.
    """
    return _draw(logits_SV, first_token, all_gather, draws, wanted, CANDIDATES, kept, local or PLAIN)


def sample_exact(
    logits_SV: Tensor,
    first_token: int,
    all_gather: AllGather,
    draws: Draws,
    kept: Kept | None = None,
    local: Local | None = None,
) -> Tensor:
    """Token ids [S] int64 of any draws; waits for the device. Equal to `sample` where that is complete."""
    local = local or PLAIN
    sizes_R1 = all_gather(torch.tensor([logits_SV.shape[1]], device=logits_SV.device))
    largest = int(sizes_R1.max())
    listed_bytes = len(sizes_R1) * largest * LISTED_BYTES  # the same on every rank, as are the tiles
    tokens = []
    for rows in tiles(len(logits_SV), listed_bytes):
        candidates, part = min(CANDIDATES, largest), (logits_SV[rows], first_token, all_gather, draws.rows(rows))
        drawn = _draw(*part, EVERYTHING, candidates, None, local)
        while not bool(drawn.complete_S.all()):
            candidates = min(MORE_CANDIDATES * candidates, largest)
            drawn = _draw(*part, EVERYTHING, candidates, None, local)
        tokens.append(drawn.tokens_S)
    tokens_S = torch.cat(tokens)
    if kept is not None:
        local.keep(Drawn(tokens_S, torch.ones_like(tokens_S, dtype=torch.bool)), kept)
    return tokens_S


def _draw(
    logits_SV: Tensor,
    first_token: int,
    all_gather: AllGather,
    draws: Draws,
    wanted: Wanted,
    candidates: int,
    kept: Kept | None,
    local: Local,
) -> Drawn:
    precision = wide(logits_SV.dtype)
    everyone_R2SC = top_S = floor_S = None
    if wanted.candidates:
        everyone_R2SC = all_gather(most_likely(logits_SV, first_token, candidates))
        top_S = everyone_R2SC[:, 0].amax((0, 2)) / divisor(draws, precision)
    elif wanted.min_p:
        top_S = all_gather(logits_SV.amax(-1).to(precision)).amax(0) / divisor(draws, precision)
    if wanted.min_p:
        assert top_S is not None
        floor_S = top_S + draws.min_p_S.to(precision).log()
    found_SPX = local.race(logits_SV, first_token, draws, floor_S, top_S if wanted.candidates else None)
    found_RSPX = all_gather(found_SPX)
    if everyone_R2SC is None or top_S is None:
        return local.first(found_RSPX, kept)
    raced = local.first(found_RSPX, None)
    filtered_S = ((draws.top_p_S < 1) | (draws.top_k_S > 0)) & (draws.temperature_S > 0)
    listed = among_candidates(everyone_R2SC, found_RSPX[..., 2].sum((0, 2)), draws, floor_S, top_S, local)
    drawn = Drawn(listed.tokens_S.where(filtered_S, raced.tokens_S), listed.complete_S | ~filtered_S)
    if kept is not None:
        local.keep(drawn, kept)
    return drawn


def race(logits_SV: Tensor, first_token: int, draws: Draws, floor_S: Tensor | None, top_S: Tensor | None) -> Tensor:
    """Winners of parts of this rank's tokens, int64 [S, P, 2 or 3]: the bits, as fp64, of when the first token finishes
    (larger is earlier), its id and, where top_S is given, the weight of all tokens in whole numbers. How many parts
    (here one) must not depend on the rank. With x = logit / temperature:

    floor_S: tokens of x below it do not take part. top_S: x of the most likely token of all ranks; where it is given,
    the weights exp(x - top) of all tokens are added up, whatever the floor.
    """
    precision, vocab = wide(logits_SV.dtype), logits_SV.shape[1]
    token_V = torch.arange(first_token, first_token + vocab, device=logits_SV.device)
    best, token, total = [], [], []
    for rows in tiles(len(logits_SV), vocab * DRAW_ELEMENT_BYTES[precision == torch.float64]):
        here = draws.rows(rows)
        race_SV = logits_SV[rows].to(precision) / divisor(here, precision)[:, None]
        if top_S is not None:
            total.append(weights(race_SV, top_S[rows]).sum(-1))
        if floor_S is not None:
            race_SV.masked_fill_(race_SV < floor_S[rows][:, None], NEVER)
        race_SV -= log_times(here, token_V, precision)
        best_S, index_S = race_SV.max(-1)
        best.append(best_S)
        token.append(token_V[index_S])
    found = [torch.cat(best).double().view(torch.int64), torch.cat(token)]
    return torch.stack(found if top_S is None else [*found, torch.cat(total)], dim=-1)[:, None]


def first(found_RSPX: Tensor, kept: Kept | None) -> Drawn:
    """The winner of all ranks and parts, as `race` found them: of equals the lowest id. No row is incomplete."""
    times_SN, tokens_SN = (found_RSPX[..., part].transpose(0, 1).flatten(1) for part in (0, 1))
    times_SN = times_SN.view(torch.float64)
    late_SN = times_SN < times_SN.amax(-1, keepdim=True)
    tokens_S = tokens_SN.masked_fill(late_SN, NO_TOKEN).amin(-1)
    drawn = Drawn(tokens_S, torch.ones_like(tokens_S, dtype=torch.bool))
    if kept is not None:
        keep(drawn, kept)
    return drawn


def keep(drawn: Drawn, kept: Kept) -> None:
    """Write the draws to where they are kept. The caller sees to it that outs_NS2 is on the same device."""
    kept.last_R.index_copy_(0, kept.row_S.long(), drawn.tokens_S)
    out_S2 = torch.stack((drawn.tokens_S, drawn.complete_S.long()), dim=1)
    place_1 = (kept.step_1 % len(kept.outs_NS2)).long()
    kept.outs_NS2[:, : len(out_S2)].index_copy_(0, place_1, out_S2[None])


def most_likely(logits_SV: Tensor, first_token: int, count: int) -> Tensor:
    """[2, S, C + 1]: logits of this rank's `count` most likely tokens, and their ids, in ascending order of id.

    Which of equals at the lower end are in is left open; the last column holds the logit above which the list has
    everything (-inf: it has all there is). In the dtype of the race, which holds ids below 2^24 exactly.
    """
    rows, vocab = logits_SV.shape
    here = min(count, vocab)
    value_SC, index_SC = logits_SV.topk(here, dim=-1, sorted=False)
    index_SC, order_SC = index_SC.sort(dim=-1)
    out = torch.full((2, rows, count + 1), NEVER, dtype=wide(logits_SV.dtype), device=logits_SV.device)
    out[0, :, :here] = value_SC.gather(1, order_SC)
    out[1, :, :here] = index_SC + first_token
    out[1, :, here:] = 0
    if here < vocab:
        out[0, :, count] = value_SC.amin(-1)
    return out


def among_candidates(
    everyone_R2SC: Tensor, total_S: Tensor, draws: Draws, floor_S: Tensor | None, top_S: Tensor, local: Local
) -> Drawn:
    """The draws of rows with top_p or top_k from what all ranks sent as `most_likely`. Every rank does the same.

    total_S: weight of all tokens. A rank's list is complete above its last column, so the merged one is complete above
    the highest of these. Equally likely tokens enter by lowest id.
    """
    precision, divisor_S1 = everyone_R2SC.dtype, divisor(draws, everyone_R2SC.dtype)[:, None]
    value_SN, token_SN = (everyone_R2SC[:, part, :, :-1].transpose(0, 1).flatten(1) for part in (0, 1))
    bound_S = everyone_R2SC[:, 0, :, -1].amax(0)
    value_SN, order_SN = value_SN.sort(dim=-1, descending=True, stable=True)  # stable: ids ascend, over the ranks too
    token_SN = token_SN.gather(1, order_SN).long()
    scaled_SN = value_SN / divisor_S1
    target_S = (draws.top_p_S.double() * total_S.double()).ceil().long()
    deepest = value_SN.shape[1] - 1
    # the place of the last one kept; deepest + 1: the list does not reach so far, or everything is kept
    last_S = (weights(scaled_SN, top_S).cumsum(-1) < target_S[:, None]).sum(-1)
    # masked_fill, as everywhere here: where() copies a number to the device and waits, which no graph can capture
    last_S = last_S.masked_fill(draws.top_p_S >= 1, deepest + 1)
    last_S = last_S.where((draws.top_k_S == 0) | (draws.top_k_S > last_S), draws.top_k_S.long() - 1)
    last_value_S = value_SN.gather(1, last_S.clamp(max=deepest)[:, None])[:, 0]
    complete_S = (last_value_S > bound_S) | (bound_S == NEVER)
    out_SN = torch.arange(deepest + 1, device=value_SN.device) > last_S[:, None]
    if floor_S is not None:
        out_SN |= scaled_SN < floor_S[:, None]
        complete_S |= floor_S > bound_S / divisor_S1[:, 0]
    race_SN = (scaled_SN - local.log_times(draws, token_SN, precision)).masked_fill_(out_SN, NEVER)
    late_SN = race_SN < race_SN.amax(-1, keepdim=True)
    return Drawn(token_SN.masked_fill(late_SN, NO_TOKEN).amin(-1), complete_S)


def weights(scaled_SX: Tensor, top_S: Tensor) -> Tensor:
    """exp(x - top) in units of 2^-WEIGHT_BITS, rounded down, int64: sums of them depend on no order."""
    return (scaled_SX - top_S[:, None]).exp_().mul_(2.0**WEIGHT_BITS).long()


def log_times(draws: Draws, token_X: Tensor, precision: torch.dtype) -> Tensor:
    """ln E [S, X] of tokens [X] or [S, X], 0 where the temperature is 0: there the largest logit wins."""
    times_SX = exponential_times(draws.seed_S, draws.position_S, token_X, precision).log_()
    return times_SX.masked_fill_((draws.temperature_S == 0)[:, None], 0.0)


def exponential_times(seed_S: Tensor, position_S: Tensor, token_X: Tensor, precision: torch.dtype) -> Tensor:
    """Exponential variates [S, X], positive and finite: -ln(1 - u), of tokens [X] or [S, X].

    u is an odd multiple of 2^-53, then rounded to `precision`: near 0, where races are won, each E is exact to a
    rounding error. The other end stops at 16.6 in fp32 (beyond which lie 6e-8 of all), at 36.7 in fp64.
    """
    bits_SX = mix(stream(seed_S, position_S)[:, None] + token_X)
    bits_SX >>= 64 - EXPONENTIAL_BITS
    bits_SX &= (1 << EXPONENTIAL_BITS) - 1
    uniform_SX = bits_SX.to(precision).add_(0.5).mul_(2.0**-EXPONENTIAL_BITS)
    uniform_SX.clamp_(max=1 - torch.finfo(precision).eps / 2)
    return uniform_SX.neg_().log1p_().neg_()


PLAIN = Local(race, first, log_times, keep)


def stream(seed_S: Tensor, position_S: Tensor) -> Tensor:
    """Where the bits of a draw start, int64: those of token i are the mix of this + i."""
    return mix(mix(seed_S) + position_S)


def divisor(draws: Draws, precision: torch.dtype) -> Tensor:
    """Temperature [S], 1 where it is 0."""
    return draws.temperature_S.to(precision).masked_fill(draws.temperature_S == 0, 1.0)


def tiles(rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices over rows, of as many as stay under DRAW_LIMIT_BYTES, but one at least."""
    step = max(1, DRAW_LIMIT_BYTES // row_bytes)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))

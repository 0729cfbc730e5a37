"""The operations of a device against their plain versions, on small examples in published widths.

Each example holds what goes wrong most easily: one token and many, an expert without tokens, sequences that end inside
a page, a prompt in the middle of its sequence. A device that computes something else is found here, and by name, before
it is given work. Knows which operations there are; chooses none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import PLAIN, Operations
from ..kernels.batch import Batch, Chunk, PageView, tiles
from ..kernels.experts import Packed
from ..kernels.sample import Draws, Kept, Wanted
from ..kernels.weight_only import Weight, narrowed
from .comm import Alone

HIDDEN, INNER, EXPERTS, EXPERTS_PER_TOKEN = 2880, 2880, 4, 2  # few experts: each is 25 MB, and one is like another
HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, WINDOW_TOKENS = 64, 8, 64, 16, 128
VOCAB, LIMIT, EPS = 201088, 7.0, 1e-5
TOKENS = (1, 40)  # what the experts do by a pair, and what they do by an expert
FEW_TOKENS = 8  # of several, these experts do by a pair
# Largest difference, in units of the largest value: some roundings to 8 bits, or sums in another order.
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
DRAWN_LIMIT = 0.02  # share of drawn tokens that may differ, as two came within rounding of each other


@dataclass(frozen=True)
class Agreement:
    """error: NaN where the operation gives numbers that are none."""

    operation: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit


def agreements(ops: Operations, device: torch.device, dtype: torch.dtype) -> list[Agreement]:
    """One for each operation of `ops` that is not the plain one."""
    found = []
    for name, examples in _EXAMPLES.items():
        if getattr(ops, name) is not getattr(PLAIN, name):
            errors = [error for tokens in TOKENS for error in examples(ops, _Random(device, dtype, tokens))]
            worst = max(errors, key=lambda error: float("inf") if error != error else error)
            limit = DRAWN_LIMIT if name in ("sample", "sample_exact") else LIMITS[dtype]
            found.append(Agreement(name, worst, limit))
    return found


class _Random:
    """Numbers that are the same on every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
        self.device, self.dtype, self.tokens = device, dtype, tokens
        self._generator = torch.Generator().manual_seed(tokens)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(self.device, dtype or self.dtype)

    def matrix(self, *shape: int, scale: float = 1.0) -> tuple[Weight, Tensor]:
        """As a plan of this dtype keeps it, bf16 where fp32 is computed in; and in fp64."""
        if self.dtype != torch.float32:
            weight_OI = self.normal(*shape, scale=scale)
            return weight_OI, weight_OI.double()
        weight_OI = self.normal(*shape, dtype=torch.bfloat16, scale=scale)
        return narrowed(weight_OI, torch.bfloat16, self.dtype), weight_OI.double()

    def whole(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(self.device, dtype)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def _upload(ops: Operations, random: _Random) -> Iterator[float]:
    """From pinned memory, which a kernel may read itself."""
    words_W = random.whole(-(2**31), 2**31, 3 * 1024 + random.tokens, dtype=torch.int32)
    to_W = torch.zeros_like(words_W)
    host_W = words_W.cpu()
    ops.upload(host_W.pin_memory() if random.device.type == "cuda" else host_W, to_W)
    yield 0.0 if torch.equal(to_W, words_W) else float("nan")


def _locate(ops: Operations, random: _Random) -> Iterator[float]:
    """Whole numbers: the same, or wrong."""
    rows, pages = 8, 20
    row_T = random.whole(0, rows, random.tokens, dtype=torch.int32)
    token_T = random.whole(-1, VOCAB, random.tokens, dtype=torch.int32)
    token_T[0] = -1
    position_T = random.whole(0, pages * PAGE_TOKENS, random.tokens, dtype=torch.int32)
    tables_KRP = random.whole(0, 1000, 2, rows, pages, dtype=torch.int32)
    given = row_T, token_T, position_T, random.whole(0, VOCAB, rows), tables_KRP, PAGE_TOKENS
    for found, wanted in zip(ops.locate(*given), PLAIN.locate(*given), strict=True):
        yield 0.0 if torch.equal(found, wanted) else float("nan")


def _embed(ops: Operations, random: _Random) -> Iterator[float]:
    """A rank's part of the vocabulary, and positions up to the longest context."""
    first, here = 500, 1000
    tokens_T = random.whole(first - 100, first + here + 100, random.tokens)
    tokens_T[0] = first
    positions_T = random.whole(0, 131072, random.tokens)
    frequencies = 150000.0 ** -(torch.arange(HEAD_DIM // 2, device=random.device) / (HEAD_DIM // 2))
    given = tokens_T, positions_T, random.normal(here, HIDDEN), first, frequencies, 1.3466
    (embedded_TH, turn), (wanted_TH, wanted_turn) = ops.embed(*given), PLAIN.embed(*given)
    yield _error(embedded_TH, wanted_TH)
    yield from map(_error, turn, wanted_turn)


def _linear(ops: Operations, random: _Random) -> Iterator[float]:
    for rows, has_bias in ((HIDDEN, True), (1001, False)):
        x_TI = random.normal(random.tokens, HEADS * HEAD_DIM)
        weight_OI, wide_OI = random.matrix(rows, HEADS * HEAD_DIM)
        bias_O = random.normal(rows) if has_bias else None
        wanted = PLAIN.linear(x_TI.double(), wide_OI, None if bias_O is None else bias_O.double())
        yield _error(ops.linear(x_TI, weight_OI, bias_O), wanted)


def _add_norm(ops: Operations, random: _Random) -> Iterator[float]:
    residual_TH, delta_TH = random.normal(random.tokens, HIDDEN), random.normal(random.tokens, HIDDEN)
    given = residual_TH, delta_TH, random.normal(HIDDEN, dtype=torch.float32), EPS, random.dtype
    wanted = PLAIN.add_norm(*given)
    yield from map(_error, ops.add_norm(*given), wanted)


def _norm_qkv_write(ops: Operations, random: _Random) -> Iterator[float]:
    rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    residual_TH, delta_TH = random.normal(random.tokens, HIDDEN), random.normal(random.tokens, HIDDEN)
    before = residual_TH, delta_TH, random.normal(HIDDEN, dtype=torch.float32), EPS
    (weight_QH, wide_QH), bias_Q = random.matrix(rows, HIDDEN, scale=HIDDEN**-0.5), random.normal(rows)
    angles = random.normal(random.tokens, HEAD_DIM // 2, dtype=torch.float32)
    rotation = angles.cos(), angles.sin()
    slots_T = torch.arange(random.tokens, device=random.device) * 3 + 1  # over pages, and not all of each
    pages = -(-3 * random.tokens // PAGE_TOKENS) + 1
    kv_PCSKD = random.normal(pages, 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM)
    wanted_kv = kv_PCSKD.double()
    wide = wide_QH, bias_Q.double()
    wanted_sum, wanted_q = PLAIN.norm_qkv_write(*before, torch.float64, *wide, rotation, wanted_kv, slots_T)
    found_sum, found_q = ops.norm_qkv_write(*before, random.dtype, weight_QH, bias_Q, rotation, kv_PCSKD, slots_T)
    yield _error(found_sum, wanted_sum)
    yield _error(found_q, wanted_q)
    yield _error(kv_PCSKD, wanted_kv)


def _attend(ops: Operations, random: _Random) -> Iterator[float]:
    """A step of decodes, of a prompt's chunk, or of both; with a window and without."""
    lengths = (1, 17, 300) if random.tokens == 1 else (129, 16)
    chunk = () if random.tokens == 1 else ((random.tokens, random.tokens + 150), (3, 3))
    for window in (None, WINDOW_TOKENS):
        q_TND, kv_PCSKD, batch, view = _sequences(random, lengths, chunk, window)
        sinks_N = random.normal(HEADS, dtype=torch.float32)
        wanted = PLAIN.attend(q_TND.double(), kv_PCSKD.double(), sinks_N, batch, view)
        yield _error(ops.attend(q_TND, kv_PCSKD, sinks_N, batch, view), wanted)


def _sequences(
    random: _Random, decodes: Sequence[int], chunks: Sequence[tuple[int, int]], window: int | None
) -> tuple[Tensor, Tensor, Batch, PageView]:
    """decodes: lengths of sequences after the step. chunks: (tokens, length) of others. Pages lie scattered."""
    lengths = [*decodes, *(length for _, length in chunks)]
    news = [1] * len(decodes) + [tokens for tokens, _ in chunks]
    counts = [-(-length // PAGE_TOKENS) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).tolist()
    table = [[order.pop() for _ in range(count)] + [0] * (max(counts) - count) for count in counts]
    starts = [sum(news[:row]) for row in range(len(news))]
    cut = tuple(
        Chunk(starts[row], starts[row] + news[row], row, lengths[row]) for row in range(len(decodes), len(news))
    )
    positions = [torch.arange(length - new, length) for length, new in zip(lengths, news, strict=True)]
    rows = torch.arange(len(news)).repeat_interleave(torch.tensor(news))
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = Batch(
        tokens_T=nothing,
        positions_T=torch.cat(positions).to(random.device),
        rows_T=rows.to(random.device),
        decodes=len(decodes),
        decodes_1=torch.tensor([len(decodes)], dtype=torch.int32, device=random.device),
        chunks=cut,
        tiles_X4=torch.tensor(tiles(cut), dtype=torch.int32).view(-1, 4).to(random.device),
        pages={},
        wanted_S=nothing,
    )
    q_TND = random.normal(sum(news), HEADS, HEAD_DIM, scale=2.0)
    kv_PCSKD = random.normal(sum(counts), 2, PAGE_TOKENS, KV_HEADS, HEAD_DIM)
    view = PageView(torch.tensor(table, dtype=torch.int32, device=random.device), nothing, window)
    return q_TND, kv_PCSKD, batch, view


def _norm_route(ops: Operations, random: _Random) -> Iterator[float]:
    """By the logits of what was chosen: two that are within rounding of each other may change places."""
    residual_TH, delta_TH = random.normal(random.tokens, HIDDEN), random.normal(random.tokens, HIDDEN)
    before = residual_TH, delta_TH, random.normal(HIDDEN, dtype=torch.float32), EPS, random.dtype
    weight_EH, bias_E = random.normal(128, HIDDEN, scale=HIDDEN**-0.5), random.normal(128)
    sum_TH, x_TH, weights_TX, experts_TX = ops.norm_route(*before, weight_EH, bias_E, 4)
    yield from map(_error, (sum_TH, x_TH), PLAIN.add_norm(*before))
    logits_TE = PLAIN.linear(x_TH.double(), weight_EH.double(), bias_E.double())
    best_TX, chosen_TX = logits_TE.topk(4).values, logits_TE.gather(1, experts_TX)
    repeated = (experts_TX.sort(-1).values.diff(dim=-1) == 0).any()
    yield float("nan") if repeated else _error(chosen_TX.sort(-1, descending=True).values, best_TX)
    yield _error(weights_TX, chosen_TX.softmax(-1))


def _product(random: _Random, outputs: int, columns: int) -> Packed:
    size = (EXPERTS, outputs, columns // 32)
    blocks = random.whole(0, 256, *size, 16, dtype=torch.uint8)
    scales = random.whole(117, 123, *size, dtype=torch.uint8)
    return Packed(blocks, scales, random.normal(EXPERTS, outputs))


def _experts(ops: Operations, random: _Random) -> Iterator[float]:
    """The last expert gets no token of several."""
    gate_up, down = _product(random, 2 * INNER, HIDDEN), _product(random, HIDDEN, INNER)
    x_TH = random.normal(random.tokens, HIDDEN)
    weights_TX = random.normal(random.tokens, EXPERTS_PER_TOKEN, dtype=torch.float32).softmax(-1)
    experts_TX = random.whole(0, EXPERTS - 1, random.tokens, 1)
    experts_TX = torch.cat([experts_TX, (experts_TX + 1) % (EXPERTS - 1)], dim=-1)
    packs = [ops.layout.pack(one.blocks, one.scales, one.bias) for one in (gate_up, down)]
    wide = [Packed(one.blocks, one.scales, one.bias.double()) for one in (gate_up, down)]
    wanted = PLAIN.experts(x_TH.double(), weights_TX, experts_TX, *wide, 0, LIMIT)
    yield _error(ops.experts(x_TH, weights_TX, experts_TX, *packs, 0, LIMIT), wanted)


def _mixture(ops: Operations, random: _Random) -> Iterator[float]:
    """Logits are far from each other. Of several tokens, few, so that the next `add_norm` may sum up."""
    if ops.mixture is None:
        return
    tokens, norm_H = min(random.tokens, FEW_TOKENS), random.normal(HIDDEN, dtype=torch.float32)
    before = random.normal(tokens, HIDDEN), random.normal(tokens, HIDDEN), norm_H, EPS, random.dtype
    bias_E = torch.arange(EXPERTS, dtype=random.dtype, device=random.device)
    router = random.normal(EXPERTS, HIDDEN, scale=0.1 * HIDDEN**-0.5), bias_E
    products = _product(random, 2 * INNER, HIDDEN), _product(random, HIDDEN, INNER)
    packs = [ops.layout.pack(one.blocks, one.scales, one.bias) for one in products]
    wide = [Packed(one.blocks, one.scales, one.bias.double()) for one in products]
    mixed = *router, EXPERTS_PER_TOKEN
    sum_TH, delta_TH = ops.mixture.run(*before, *mixed, *packs, 0, LIMIT)
    wanted_TH, x_TH, *routes = PLAIN.norm_route(*before, *mixed)
    yield _error(sum_TH, wanted_TH)
    wanted = PLAIN.experts(x_TH.double(), *routes, *wide, 0, LIMIT)
    if isinstance(delta_TH, Tensor):
        yield _error(delta_TH, wanted)
        return
    yield _error(delta_TH.summed(), wanted)
    after = norm_H, EPS, random.dtype
    yield from map(_error, ops.add_norm(sum_TH, delta_TH, *after), PLAIN.add_norm(wanted_TH, wanted, *after))


def _draws(random: _Random) -> tuple[Tensor, Draws]:
    rows = 64 if random.tokens > 1 else 1
    even = torch.arange(rows, device=random.device) % 2 == 0
    ones, nothing = torch.ones(rows, device=random.device), torch.zeros(rows, device=random.device)
    draws = Draws(
        temperature_S=torch.where(even, 1.0, 0.5),
        top_p_S=torch.where(even, ones, ones * 0.9),
        min_p_S=nothing,
        presence_S=nothing,
        frequency_S=nothing,
        repetition_S=ones,
        top_k_S=torch.where(even, 0, 50).to(torch.int32),
        seed_S=random.whole(0, 2**62, rows),
        position_S=torch.arange(rows, device=random.device),
    )
    return random.normal(rows, VOCAB, scale=3.0), draws


def _sample(ops: Operations, random: _Random) -> Iterator[float]:
    logits_SV, draws = _draws(random)
    wanted = Wanted(candidates=True, min_p=False)
    row_S = torch.arange(len(logits_SV), dtype=torch.int32, device=random.device)
    # kept by the kernel in memory of the host
    outs_NS2 = torch.zeros((2, len(row_S), 2), dtype=torch.int64, pin_memory=random.device.type == "cuda")
    kept = Kept(row_S, torch.zeros_like(row_S, dtype=torch.int64), torch.ones_like(row_S[:1]), outs_NS2)
    given = logits_SV, 0, Alone().all_gather, draws, wanted
    found, plain = ops.sample(*given, kept), PLAIN.sample(*given)
    yield float((found.tokens_S != plain.tokens_S)[plain.complete_S].double().mean())
    drawn_S2 = torch.stack((found.tokens_S, found.complete_S.long()), dim=1).cpu()  # waits: the host may read now
    is_kept = torch.equal(outs_NS2[1], drawn_S2) and torch.equal(kept.last_R, found.tokens_S)
    yield 0.0 if is_kept else float("nan")


def _sample_exact(ops: Operations, random: _Random) -> Iterator[float]:
    logits_SV, draws = _draws(random)
    found, plain = (one.sample_exact(logits_SV, 0, Alone().all_gather, draws) for one in (ops, PLAIN))
    yield float((found != plain).double().mean())


_EXAMPLES = {
    "upload": _upload,
    "locate": _locate,
    "embed": _embed,
    "linear": _linear,
    "add_norm": _add_norm,
    "norm_qkv_write": _norm_qkv_write,
    "attend": _attend,
    "norm_route": _norm_route,
    "experts": _experts,
    "mixture": _mixture,
    "sample": _sample,
    "sample_exact": _sample_exact,
}


def check_gpu(index: int) -> list[Agreement]:
    """Of the kernels that a plan gives this GPU, which must be of sm_80 or later."""
    from ..kernels.choose import triton_operations

    device = torch.device("cuda", index)
    with torch.cuda.device(device):
        return agreements(triton_operations(), device, torch.bfloat16)


def check_cpu() -> list[Agreement]:
    """Raises NoLibraryError where the CPU's experts cannot be compiled, UserError where they are grossly wrong."""
    from ..kernels.cpu_products import cpu_operations

    return agreements(cpu_operations(), torch.device("cpu"), torch.float32)

"""The sum of a small message over GPUs that can write each other's memory, without barrier or fence: in a Triton kernel
of its own, or inside the one that makes the message.

Every word of 8 bytes that a rank sends holds 4 bytes of its message and a flag, the number of the call. 8 bytes arrive
together, so that a word with the right flag is a word of this call, and nothing else has to be waited for: NCCL's
protocol LL (src/device/prims_ll.h). Each rank writes its words into a place of its own in the memory of every other
one, and polls its own memory for theirs. It then adds all messages in rank order, its own from registers, in fp32, and
rounds once: all ranks hold the same bits.

A program counts its calls in device memory, so that a captured graph can be replayed; as all ranks make the same calls,
the programs of one index are at the same count wherever they meet. Each has two places, for odd and even counts: who
sends call n has seen all of call n - 1, which every peer sent once its kernel of call n - 2 was over, and with it the
reading of the words that are now overwritten. A place is always written whole. So each of its flags is 0 or exactly 2
less than the one awaited, for as long as it is awaited: no older one can be taken for it, also when counts wrap.

Inside a product (`summed`) a place belongs to a part of the message, a tile, and so does its count: whichever program
has the tile at the end reads the count, sends, and stores it. All of the above holds for each tile by itself, as every
program waits for the kernels before (`gdc_wait`, or stream order) ahead of that: whoever sends call n of a tile, its
own kernel of call n - 1 is over, so that it has seen every peer's words of that call; and a peer sent those once its
kernel of call n - 2 was over. It also needs that a tile's place is always cut alike, so that it is written whole. So
each product has places and counts of its own, which nothing else uses, with as many values a program at every call; the
kernel of its own has others. Words are the same, aligned and of 8 bytes, so that what holds for the kernel of its own
on a link (`model.comm.flagged_flaw`) holds here; of 16 bits they carry one value each, as rows do not change lanes.

Programs that wait must not keep out those that their peers wait for: `Message.processors`. What starts early does not,
as it starts once all programs of the kernel before have begun.

Knows addresses; knows nothing of how memory is shared, nor of process groups.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's tl.constexpr annotations stand for plain values, which pyright cannot know.

from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .sums import Exchange, Message, Product
from .triton_launch import PROGRAMS_AT_ONCE, constants, early, processors

WORD_BYTES, DATA_BYTES = 8, 4
WARPS = 1  # whether all words are there is then known without shared memory
BLOCK = WARPS * 32 * 2  # words of a program: each lane has two side by side, which go in one access of 16 bytes


def largest_bytes(device: torch.device, ranks: int, buffer_bytes: int) -> int:
    """Of a message that `FlaggedSum` can take on the device; 0 where Triton does not compile for it.

    All its programs run at the same time: one that waits for its peers must not keep from starting those that the
    peers wait for.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return 0
    return min(_programs(ranks, buffer_bytes), PROGRAMS_AT_ONCE * processors(device)) * BLOCK * DATA_BYTES


def _programs(ranks: int, buffer_bytes: int) -> int:
    return buffer_bytes // (2 * ranks * BLOCK * WORD_BYTES)


class Exchanges:
    """One rank's part of sums inside products. As for `FlaggedSum`: buffers of buffer_bytes that hold zeros on every
    rank at first. processors: the fewest of a rank."""

    def __init__(
        self, addresses: tuple[int, ...], rank: int, buffer_bytes: int, processors: int, device: torch.device
    ) -> None:
        products, self._processors = get_args(Product), processors
        each_bytes = buffer_bytes // len(products)
        self._values = each_bytes // (2 * len(addresses) * WORD_BYTES)
        self._cuts: dict[Product, int] = {}
        self._of: dict[Product, Exchange] = {
            product: Exchange(
                tuple(address + at * each_bytes for address in addresses),
                rank,
                torch.zeros(self._values, dtype=torch.int32, device=device),
            )
            for at, product in enumerate(products)
        }

    def __call__(self, message: Message) -> Exchange | None:
        """None where the message is too large, or the device too small. Of a product all are cut alike."""
        assert self._cuts.setdefault(message.product, message.values) == message.values
        fits = message.programs * message.values <= self._values and message.processors <= self._processors
        return self._of[message.product] if fits else None


class FlaggedSum:
    """One rank's part. addresses: of all ranks' buffers of buffer_bytes, in rank order, as this rank sees them: zeros
    on every rank before the first call of any, and used by nothing else.

    Calls may not overlap, and every rank makes the same ones in the same order.
    """

    def __init__(self, addresses: tuple[int, ...], rank: int, buffer_bytes: int, device: torch.device) -> None:
        self._addresses, self._rank = addresses, rank
        self._counts = torch.zeros(_programs(len(addresses), buffer_bytes), dtype=torch.int32, device=device)

    def __call__(self, x: Tensor, most_polls: int = 0) -> Tensor:
        """The sum, in place where x is contiguous. most_polls: looks at what the peers sent before it is given up, and
        the sum is wrong; 0: it is waited for."""
        x = x.contiguous()
        per_word = DATA_BYTES // x.element_size()
        programs = triton.cdiv(x.numel(), BLOCK * per_word)
        assert programs <= len(self._counts), f"{x.nbytes} bytes do not fit"
        _flagged_all_reduce[(programs,)](
            x,
            self._counts,
            self._addresses,
            x.numel(),
            **constants(
                RANK=self._rank,
                PER_WORD=per_word,
                BLOCK=BLOCK,
                MOST_POLLS=most_polls,
                EARLY=early(x),
                num_warps=WARPS,
            ),
        )
        return x


@triton.jit
def _flagged_all_reduce(x, counts, addresses, count, RANK: tl.constexpr, PER_WORD: tl.constexpr,
                        BLOCK: tl.constexpr, MOST_POLLS: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    RANKS: tl.constexpr = len(addresses)
    program = tl.program_id(0)
    at = program * (BLOCK * PER_WORD) + tl.arange(0, BLOCK * PER_WORD)
    here = at < count
    if EARLY:
        gdc_wait()
    call = tl.load(counts + program) + 1
    mine = tl.load(x + at, mask=here, other=0.0)
    place = (program * 2 + (call & 1)) * (RANKS * BLOCK) + tl.arange(0, BLOCK)
    words = _packed(mine, PER_WORD) | (call.to(tl.int64) << 32)
    for step in tl.static_range(1, RANKS):  # each rank begins with another one
        tl.store(_buffer(addresses[(RANK + step) % RANKS]) + place + RANK * BLOCK, words, cache_modifier=".wt")
    got = _received(addresses, place, RANK, BLOCK)
    polls = 0
    while _late(got, call) & ((MOST_POLLS == 0) | (polls < MOST_POLLS)):
        got = _received(addresses, place, RANK, BLOCK)
        polls += 1
    total = tl.zeros([BLOCK * PER_WORD], tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            part = mine
        else:
            part = _unpacked(got[rank - (rank > RANK)], mine.dtype, PER_WORD)
        total = part.to(tl.float32) if rank == 0 else total + part.to(tl.float32)
    tl.store(x + at, total.to(x.dtype.element_ty), mask=here)
    tl.debug_barrier()  # all lanes have read the count
    tl.store(counts + program, call)


@triton.jit
def summed(message, call, part, addresses, RANK: tl.constexpr, LANES: tl.constexpr):
    """The sum over ranks, [ROWS] fp32, of message [ROWS] in its dtype, of 16 or 32 bits; rounded to that it has the
    bits that `FlaggedSum` gives. part: of the whole message. call: one more than the part's count, which the caller
    stores afterwards, once all lanes have read it.

    LANES: of a word, so that every lane of the program looks at exactly one. With fewer words than lanes several would
    hold the same element, see it come at different times, and not agree on whether to look again.
    """
    RANKS: tl.constexpr = len(addresses)
    ROWS: tl.constexpr = message.shape[0]
    lane = tl.arange(0, ROWS * LANES)
    place = (part * 2 + (call & 1)) * (RANKS * ROWS) + lane // LANES
    words = _bits(message).to(tl.int64) | (call.to(tl.int64) << 32)
    words = words[:, None].broadcast_to(ROWS, LANES).reshape(ROWS * LANES)
    for step in tl.static_range(1, RANKS):  # each rank begins with another one
        peer = _buffer(addresses[(RANK + step) % RANKS])
        tl.store(peer + place + RANK * ROWS, words, mask=lane % LANES == 0, cache_modifier=".wt")
    got = _received(addresses, place, RANK, ROWS)
    while _late(got, call):
        got = _received(addresses, place, RANK, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            one = message
        else:  # all lanes of a word hold the same
            one = _value(tl.max(got[rank - (rank > RANK)].to(tl.int32).reshape(ROWS, LANES), 1), message)
        total = one.to(tl.float32) if rank == 0 else total + one.to(tl.float32)
    return total


@triton.jit
def _bits(values):
    if values.dtype.primitive_bitwidth == 32:
        return values.to(tl.uint32, bitcast=True)
    else:
        return values.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _value(bits, like):
    """What `_bits` was given, of the dtype of like, from its bits as int32."""
    if like.dtype.primitive_bitwidth == 32:
        return bits.to(like.dtype, bitcast=True)
    else:
        return bits.to(tl.uint16).to(like.dtype, bitcast=True)


@triton.jit
def _buffer(address):
    wide = address.to(tl.int64)  # an integer below 2^31 comes as int32: a host may have memory there
    return tl.multiple_of(wide.to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def _received(addresses, place, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """What now stands in the places of all peers, in rank order. Volatile: read anew each time."""
    own = _buffer(addresses[RANK])
    got = ()
    for rank in tl.static_range(len(addresses)):
        if rank != RANK:
            got += (tl.load(own + place + rank * BLOCK, volatile=True),)
    return got


@triton.jit
def _late(got, call):
    """Whether a word of any peer is not yet of this call."""
    late = tl.zeros_like(got[0]).to(tl.int32)
    for peer in tl.static_range(len(got)):
        late |= ((got[peer] >> 32).to(tl.int32) != call).to(tl.int32)
    return tl.max(late, 0) != 0


@triton.jit
def _packed(values, PER_WORD: tl.constexpr):
    """[BLOCK * PER_WORD] -> int64 [BLOCK], the values' bits in the low half."""
    if PER_WORD == 1:
        bits = values.to(tl.uint32, bitcast=True)
    else:
        first, second = tl.split(values.to(tl.uint16, bitcast=True).reshape(values.shape[0] // 2, 2))
        bits = first.to(tl.uint32) | (second.to(tl.uint32) << 16)
    return bits.to(tl.int64)


@triton.jit
def _unpacked(words, dtype: tl.constexpr, PER_WORD: tl.constexpr):
    """The values that `_packed` was given."""
    bits = words.to(tl.uint32)
    if PER_WORD == 1:
        values = bits
    else:
        values = tl.join(bits.to(tl.uint16), (bits >> 16).to(tl.uint16)).reshape(words.shape[0] * 2)
    return values.to(dtype, bitcast=True)

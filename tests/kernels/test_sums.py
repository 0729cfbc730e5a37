"""Sums over ranks inside the kernels of products, with the bits of the product and `FlaggedSum` after it.

One rank whose peers are written by hand, and real ranks in processes of their own, as in test_all_reduce.py.

As a program, `python test_sums.py FOLDER RANK RANKS`, it is one of those ranks.
"""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, get_args

import compiled
import pytest
import torch
from gptoss_launch.parallel.kernels import experts as plain
from gptoss_launch.parallel.kernels import linear, triton_all_reduce, triton_decode, triton_experts, triton_linear
from gptoss_launch.parallel.kernels.sums import Exchange, Message, Product
from gptoss_launch.parallel.kernels.triton_all_reduce import BLOCK, WORD_BYTES, Exchanges, FlaggedSum
from gptoss_launch.parallel.kernels.triton_decode import Cut
from gptoss_launch.parallel.kernels.triton_launch import MOST_REGISTERS, at_once
from gptoss_launch.parallel.kernels.triton_linear import ONE_SUMMED
from gptoss_launch.parallel.kernels.triton_mxfp4 import Tiles, pack
from gptoss_launch.parallel.kernels.weight_only import narrowed
from gptoss_launch.parallel.planning.memory import INSIDE_BYTES
from torch import Tensor

CPU = torch.device("cpu")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="polls the CPU's memory, in the interpreter")
HIDDEN = 42  # 3 tiles and 11 programs of 4 rows, the last ones with some past the end
BUFFER_BYTES = 2 * 2 * 3 * 48 * WORD_BYTES  # of two products
LIMIT, CALLS, PROCESS_CALLS = 7.0, 5, 6
CUTS = Cut(1, 1), Cut(2, 1)
PRODUCTS = get_args(Product)

Given = tuple[Tensor, ...]
Run = Callable[[Given, Exchange | None], Tensor]


def attention_given(rank: int, call: int, dtype: torch.dtype) -> Given:
    generator = torch.Generator().manual_seed(1000 * call + rank)
    x_1I, weight_OI, bias_O = (torch.randn(shape, generator=generator) for shape in ((1, 96), (HIDDEN, 96), (HIDDEN,)))
    return x_1I.to(dtype), weight_OI.to(dtype), bias_O.to(dtype)


def attention(given: Given, exchange: Exchange | None) -> Tensor:
    x_1I, weight_OI, bias_O = given
    return triton_linear.one(x_1I, weight_OI, bias_O, ONE_SUMMED[0], exchange)


def narrow_attention(given: Given, exchange: Exchange | None) -> Tensor:
    x_1I, weight_OI, bias_O = given
    return triton_linear.one(x_1I, narrowed(weight_OI, torch.int8, x_1I.dtype), bias_O, ONE_SUMMED[0], exchange)


def experts_given(rank: int, call: int, dtype: torch.dtype) -> Given:
    """Each rank holds 2 of 6 experts, so that of a token's one or both may be elsewhere."""
    generator = torch.Generator().manual_seed(1000 * call + rank)
    sizes = ((2, 64, 2), (2, HIDDEN, 1))  # gate_up of 32 units and 64 columns; down
    parts = []
    for size in sizes:
        parts += [torch.randint(0, 256, (*size, 16), generator=generator, dtype=torch.uint8)]
        parts += [torch.randint(117, 123, size, generator=generator, dtype=torch.uint8)]
        parts += [torch.randn(size[:2], generator=generator).to(dtype)]
    shared = torch.Generator().manual_seed(call)
    x_TH, weights_TX = torch.randn((1, 64), generator=shared), torch.rand((1, 2), generator=shared)
    experts_TX = torch.randperm(6, generator=shared)[None, :2] - 2 * rank
    return x_TH.to(dtype), weights_TX, experts_TX, *parts


def experts(given: Given, exchange: Exchange | None) -> Tensor:
    x_TH, weights_TX, experts_TX, *parts = given
    gate_up, down = pack(*parts[:3]), pack(*parts[3:])
    return triton_decode.decode(x_TH, weights_TX, experts_TX, gate_up, down, 0, LIMIT, CUTS, exchange)


CASES: tuple[tuple[Product, Callable[..., Given], Run, int, torch.dtype], ...] = (
    ("attention's output", attention_given, attention, 4, torch.bfloat16),
    ("attention's output", attention_given, attention, 4, torch.float16),
    ("attention's output", attention_given, narrow_attention, 4, torch.float32),
    ("experts", experts_given, experts, 16, torch.bfloat16),
    ("experts", experts_given, experts, 16, torch.float32),
)
NAMES = ["attention bf16", "attention fp16", "attention int8 fp32", "experts bf16", "experts fp32"]


class ByHand:
    """One rank of several, whose peers are whoever calls `send`."""

    def __init__(self, rank: int, ranks: int, product: Product, values: int, calls_before: int = 0) -> None:
        self.rank, self.ranks, self.values, self.at = rank, ranks, values, PRODUCTS.index(product)
        self.buffers = [torch.zeros(BUFFER_BYTES // WORD_BYTES, dtype=torch.int64) for _ in range(ranks)]
        self.exchanges = Exchanges(self.addresses(), rank, BUFFER_BYTES, 1, CPU)
        self.programs = -(-HIDDEN // values)
        message = Message(product, HIDDEN, torch.float32, self.programs, values, 1)
        exchange = self.exchanges(message)
        assert exchange is not None
        self.exchange = exchange
        exchange.counts.add_(calls_before)

    def addresses(self) -> tuple[int, ...]:
        return tuple(buffer.data_ptr() for buffer in self.buffers)

    def words(self, x_1H: Tensor, call: int) -> Tensor:
        """[programs, values] of message x."""
        padded = torch.zeros(self.programs * self.values, dtype=x_1H.dtype)
        padded[:HIDDEN] = x_1H[0]
        bits = padded.view(torch.int16 if x_1H.element_size() == 2 else torch.int32).long()
        bits &= 0xFFFF if x_1H.element_size() == 2 else 0xFFFFFFFF
        return (bits | call << 32).view(self.programs, self.values)

    def place(self, to: int, rank: int, call: int) -> Tensor:
        """[programs, values]: where rank's words of a call lie in the memory of `to`."""
        half = self.buffers[to].view(2, -1)[self.at, : self.programs * 2 * self.ranks * self.values]
        return half.view(self.programs, 2, self.ranks, self.values)[:, call & 1, rank]

    def send(self, x_1H: Tensor, rank: int, call: int) -> None:
        self.place(self.rank, rank, call).copy_(self.words(x_1H, call))


def in_rank_order(messages: list[Tensor]) -> Tensor:
    """What `FlaggedSum` makes of them; in the interpreter, which cuts to bf16 instead of rounding."""
    ranks, per_word = len(messages), 4 // messages[0].element_size()
    buffers = [torch.zeros(2, ranks, BLOCK, dtype=torch.int64) for _ in messages]
    flagged = FlaggedSum(tuple(buffer.data_ptr() for buffer in buffers), 0, buffers[0].nbytes, CPU)
    for rank, message_1H in enumerate(messages):
        padded = torch.zeros(BLOCK * per_word, dtype=message_1H.dtype)
        padded[:HIDDEN] = message_1H[0]
        buffers[0][1, rank] = padded.view(torch.int32).long() & 0xFFFFFFFF | 1 << 32
    return flagged(messages[0].clone())


@INTERPRETED
@pytest.mark.parametrize(("rank", "ranks"), ((0, 2), (1, 3)))
@pytest.mark.parametrize(("product", "given", "run", "values", "dtype"), CASES, ids=NAMES)
def test_what_is_sent_and_what_is_summed(
    product: Product,
    given: Callable[..., Given],
    run: Run,
    values: int,
    dtype: torch.dtype,
    rank: int,
    ranks: int,
) -> None:
    here, others_add = ByHand(rank, ranks, product, values), 0
    for call in range(1, CALLS + 1):
        messages = [run(given(one, call, dtype), None) for one in range(ranks)]
        for peer in range(ranks):
            if peer != rank:
                here.send(messages[peer], peer, call)
        summed_1H = run(given(rank, call, dtype), here.exchange)
        assert summed_1H.dtype == dtype and torch.equal(summed_1H, in_rank_order(messages)), call
        others_add += not torch.equal(summed_1H, messages[rank])
        for peer in range(ranks):
            if peer != rank:
                assert torch.equal(here.place(peer, rank, call), here.words(messages[rank], call))
        assert here.exchange.counts[: here.programs].tolist() == [call] * here.programs
        assert not here.exchange.counts[here.programs :].any()
    assert others_add > 1
    for peer in range(ranks):  # nothing has been written where the other product's words are
        assert not here.buffers[peer].view(2, -1)[1 - here.at].any()


@INTERPRETED
@pytest.mark.parametrize(
    ("case", "calls_before"),
    ((0, 0), (0, 2**31 - 2), (0, -3), (4, 0)),
    ids=("attention", "past 2^31", "past 2^32", "experts"),
)
def test_words_are_waited_for(case: int, calls_before: int) -> None:
    """A peer's words come one call after the other, one of them late, wherever it is."""
    product, given, run, values, dtype = CASES[case]
    here = ByHand(0, 3, product, values, calls_before)
    for number in range(1, 4):
        call = (calls_before + number + 2**31) % 2**32 - 2**31  # as int32
        messages = [run(given(rank, number, dtype), None) for rank in range(3)]
        here.send(messages[1], 1, call)
        late, late_place = here.words(messages[2], call).flatten(), here.place(0, 2, call)
        missing = (13 * number) % len(late)
        before = late_place.reshape(-1)[missing].item()
        late_place.copy_(late.view(late_place.shape))
        late_place[missing // values, missing % values] = before
        sums: list[Tensor] = []
        thread = threading.Thread(target=lambda: sums.append(run(given(0, number, dtype), here.exchange)), daemon=True)  # noqa: B023
        thread.start()
        thread.join(0.3)
        assert thread.is_alive(), "summed while a word was missing"
        late_place[missing // values, missing % values] = late[missing]
        thread.join(20)
        assert torch.equal(sums[0], in_rank_order(messages))


class Asked:
    """Ranks that note what they are asked, whose messages come back doubled."""

    alone: ClassVar[bool] = False

    def __init__(self, exchange: Exchange | None = None) -> None:
        self.given, self.asked, self.reduced, self.inside = exchange, list[Message](), 0, False

    def all_reduce(self, x: Tensor) -> Tensor:
        self.reduced += 1
        return 2 * x

    @contextmanager
    def exchange(self, message: Message) -> Iterator[Exchange | None]:
        self.asked.append(message)
        self.inside = True
        yield self.given
        self.inside = False


@INTERPRETED
def test_only_one_token_is_exchanged_inside_and_where_the_ranks_say_so() -> None:
    x_1I, weight_OI, bias_O = attention_given(0, 1, torch.float32)
    x_1H, weights_TX, experts_TX, *parts = experts_given(0, 4, torch.float32)
    packs = pack(*parts[:3]), pack(*parts[3:])
    product: Any
    for tokens in (1, 2):
        x_TI, routed = x_1I.repeat(tokens, 1), [one.repeat(tokens, 1) for one in (x_1H, weights_TX, experts_TX)]
        for product, given, programs, values, ways in (
            (triton_linear.linear, (x_TI, weight_OI, bias_O), 11, 4, len(ONE_SUMMED)),
            (triton_experts.experts, (*routed, *packs, 0, LIMIT), 3, 16, 1),
        ):
            ranks = Asked()
            assert torch.equal(product(*given, ranks), 2 * product(*given)) and ranks.reduced == 1
            shapes = [(one.elements, one.programs, one.values) for one in ranks.asked]
            assert shapes == [(HIDDEN, programs, values)] * (ways if tokens == 1 else 0)
    for name, product, given, values in zip(
        PRODUCTS,
        (triton_linear.linear, triton_experts.experts),
        ((x_1I, weight_OI, bias_O), (x_1H, weights_TX, experts_TX, *packs, 0, LIMIT)),
        (4, 16),
        strict=True,
    ):
        here = ByHand(0, 2, name, values)
        here.send(torch.ones(1, HIDDEN), 1, 1)
        ranks = Asked(here.exchange)
        assert torch.equal(product(*given, ranks), product(*given) + 1)
        assert ranks.reduced == 0 and not ranks.inside and ranks.asked[0].product == name


def test_the_plain_products_are_summed_after() -> None:
    x_1I, weight_OI, bias_O = attention_given(0, 1, torch.float32)
    x_1H, weights_TX, experts_TX, *parts = experts_given(0, 4, torch.float32)
    gate_up = plain.Packed(*parts[:3])
    down = plain.Packed(gate_up.blocks[:, :, :1], gate_up.scales[:, :, :1], gate_up.bias)  # as many rows as columns
    given = x_1H, weights_TX, experts_TX, gate_up, down, 0, LIMIT
    ranks = Asked()
    assert torch.equal(linear.linear(x_1I, weight_OI, bias_O, ranks), 2 * linear.linear(x_1I, weight_OI, bias_O))
    assert torch.equal(plain.experts(*given, ranks), 2 * plain.experts(*given))
    assert ranks.reduced == 2 and not ranks.asked


def test_all_that_wait_are_there_at_the_same_time() -> None:
    """By published sizes among two ranks, as they are in `ONE_SUMMED`; and what is refused."""
    found = [at_once(4, 64), at_once(4, 80), at_once(4, 96), at_once(1, MOST_REGISTERS), at_once(1, 64), at_once(4, 32)]
    assert found == [8, 6, 5, 8, 16, 12]
    x_1I, weight_OI = torch.empty(1, 2048, dtype=torch.bfloat16), torch.empty(2880, 2048, device="meta")
    out, next_out = (triton_linear.one_message(x_1I, weight_OI, how) for how in ONE_SUMMED)
    empty = torch.empty(0)
    tiles = Tiles(torch.empty(32, 180, 23, 32, 8, device="meta"), empty, torch.empty(32, 2880, device="meta"), empty)
    down = triton_decode.one_message(x_1I, tiles)
    assert (out.programs, out.values, out.processors) == (720, 4, 120)
    assert (next_out.programs, next_out.values, next_out.processors) == (720, 4, 90)
    assert (down.programs, down.values, down.processors) == (180, 16, 23)
    for ranks in (2, 8):
        exchanges = Exchanges(tuple(range(0, 16 * ranks, 16)), 0, INSIDE_BYTES, 120, CPU)
        found = [exchanges(message) for message in (out, down)]
        assert None not in found and found[0] != found[1]
        assert [one.addresses[1] - 16 for one in found if one is not None] == [0, INSIDE_BYTES // 2]
    few = Exchanges((0, 16), 0, INSIDE_BYTES, 119, CPU)  # as an A100 has
    assert few(out) is None and few(next_out) is not None
    most = INSIDE_BYTES // 2 // (2 * 2 * WORD_BYTES)
    fitting, large = (Message("experts", size, torch.bfloat16, size // 16, 16, 1) for size in (most, most + 16))
    exchanges = Exchanges((0, 16), 0, INSIDE_BYTES, 90, CPU)
    assert exchanges(fitting) is not None and exchanges(large) is None


def rank_of_several(folder: Path, rank: int, ranks: int) -> None:
    """Both products and the kernel of its own in turn, as a step has them, with pauses of its own."""
    torch.set_num_threads(1)
    pauses = random.Random(rank)
    received = triton_all_reduce._received

    def received_late(*given):
        time.sleep(pauses.choice((0, 0, 0.01)))
        return received(*given)

    triton_all_reduce._received = received_late
    buffers = [torch.from_file(str(folder / f"{one}"), True, BUFFER_BYTES // 4, dtype=torch.int64) for one in range(2)]
    addresses = tuple(buffer.data_ptr() for buffer in buffers)
    exchanges = Exchanges(addresses, rank, BUFFER_BYTES, 1, CPU)
    flagged = FlaggedSum(tuple(one + BUFFER_BYTES for one in addresses), rank, BUFFER_BYTES, CPU)
    sums = []
    for call in range(PROCESS_CALLS):
        for product, given, run, values, dtype in (CASES[1], CASES[4]):
            programs = -(-HIDDEN // values)
            exchange = exchanges(Message(product, HIDDEN, dtype, programs, values, 1))
            time.sleep(pauses.choice((0, 0, 0.02)))
            inside = run(given(rank, call, dtype), exchange)
            after = flagged(run(given(rank, call, dtype), None))
            sums.append((inside, after))
    torch.save(sums, folder / f"sums-{rank}")


@INTERPRETED
@pytest.mark.slow
def test_ranks_that_are_processes(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"{rank}").write_bytes(bytes(2 * BUFFER_BYTES))
    path = [str(Path(compiled.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "1"}
    commands = [[sys.executable, __file__, str(tmp_path), str(rank), "2"] for rank in range(2)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    first, second = (torch.load(tmp_path / f"sums-{rank}") for rank in range(2))
    assert len(first) == 2 * PROCESS_CALLS
    for call, sums in enumerate(zip(first, second, strict=True)):
        (inside, after), (other_inside, other_after) = sums
        assert torch.equal(inside, after) and torch.equal(other_inside, other_after), call
        assert torch.equal(inside, other_inside), call


COMPILE = """
import triton
from gptoss_launch.parallel.kernels.triton_decode import _CUTS, _down
from gptoss_launch.parallel.kernels.triton_linear import ONE_SUMMED, _one, rows_shape
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = dict.fromkeys(("inner", "weights", "partial"), "*fp32")
POINTERS |= dict.fromkeys(("x", "bias", "out", "scale"), "*bf16") | {"blocks": "*i16"}
POINTERS |= dict.fromkeys(("experts", "logits"), "*i64")
POINTERS |= dict.fromkeys(("scales", "arrivals", "counts"), "*i32") | {"inner": "*bf16"}
cut, one = _CUTS[0][2], ONE_SUMMED[0]
down = {"EXPERTS_PER_TOKEN": 4, "CHUNK": 64, "COLUMNS": 8, "UNROLL": cut.unroll, "SPLIT": cut.split, "SINGLE": True}
down |= {"PLACES": 0, "EVEN": False, "EARLY": True, "PLAIN": False, "EXPERTS": 0, "EXPERTS_2": 0}
out = {"COLUMNS": 2048, "ROWS": one.warps, "PART": 256, "AHEAD": one.ahead, "BIAS": True, "FACTOR": 0.0, "EARLY": True}

def compiled(kernel, fixed, warps, ranks, registers):
    types = {name: POINTERS.get(name, "i32") for name in kernel.arg_names if name not in fixed}
    if kernel is _one:
        types["weight"] = "*bf16"
    fixed = fixed | ({"RANK": 1} if ranks else {"RANK": 0, "counts": None, "addresses": None})
    types = types | dict.fromkeys(fixed, "constexpr") | ({"addresses": ("i64",) * ranks} if ranks else {})
    names = enumerate(kernel.arg_names)
    divided = {(i,): [["tt.divisibility", 16]] for i, name in names if name in POINTERS and name not in fixed}
    options = {"num_warps": warps} | ({"maxnreg": registers} if registers else {})
    return triton.compile(ASTSource(kernel, types, fixed, divided), target=GPUTarget("cuda", 90, 32), options=options)

for kernel, fixed, warps, registers in ((_down, down, 1, cut.registers), (_one, out, one.warps, one.registers)):
    for ranks in (0, 2, 8):
        ptx = compiled(kernel, fixed, warps, ranks, registers).asm["ptx"]
        accesses = [line.split("[")[0].split("{")[0].split()[-1] for line in ptx.splitlines() if ".global" in line]
        of_words = [one for one in accesses if "volatile" in one or ".wt" in one]
        print(ranks, len(of_words), *sorted(set(of_words)))
"""


@pytest.mark.slow
def test_words_are_never_cut_nor_kept(tmp_path: Path) -> None:
    """Compiled, every access to words is of a whole one, by one lane; loads are volatile, before the loop and in it;
    stores go through to the peer's memory. Without ranks there is none."""
    lines = [line.split() for line in compiled.lines_of(COMPILE, tmp_path)]
    assert [int(ranks) for ranks, *_ in lines] == [0, 2, 8] * 2
    for ranks, accesses, *kinds in lines:
        peers = max(int(ranks) - 1, 0)
        assert int(accesses) == 3 * peers, kinds
        assert kinds == (["ld.volatile.global.b64", "st.global.wt.b64"] if peers else [])


if __name__ == "__main__":
    rank_of_several(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

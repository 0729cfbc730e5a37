"""The Triton race against the plain one, on a GPU if there is one, in Triton's interpreter if not."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawing import NEVER, draws_of, on_ranks, random_logits
from forced import answers
from gptoss_launch.parallel.engine.engine import Engine
from gptoss_launch.parallel.engine.measure import decode_step
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.kernels import PLAIN, triton_sample
from gptoss_launch.parallel.kernels import sample as plain
from gptoss_launch.parallel.kernels.choose import triton_operations
from gptoss_launch.parallel.kernels.sample import Draws, Kept, Wanted
from gptoss_launch.parallel.model.comm import Alone
from gptoss_launch.parallel.planning.plan import Plan
from small_models import SPECS, TINY, plain_engine, plain_plan, prompt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIXED = {
    "temperature": [1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 0.7],
    "min_p": [0.0, 0.3, 0.0, 0.02, 1.0, 0.5, 0.0],
    "top_p": [1.0, 1.0, 0.9, 0.999, 1.0, 0.4, 0.95],
    "top_k": [0, 0, 0, 40, 3, 0, 200],
    "seed": [0, 1, 2**63 - 1, 12345, 1 << 40, 77, 3],
    "position": [0, 5, 131071, 17, 1, 2, 3],
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs them one after the other, those without tokens too."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(triton_sample, "ROW_PROGRAMS", 5)


def moved(draws: Draws) -> Draws:
    return Draws(**{name: getattr(draws, name).to(DEVICE) for name in draws.__dataclass_fields__})


def logits_of(rows: int, vocab: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    return random_logits(rows, vocab, seed=vocab, scale=scale).to(dtype).to(DEVICE)


def winners(found_SPX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """When the first token of each row finishes, its id, and the weight of all tokens if it was wanted."""
    times_SP = found_SPX[..., 0].contiguous().view(torch.float64).float()
    return times_SP.amax(-1), plain.first(found_SPX[None], None).tokens_S, found_SPX[..., 2:].sum(1)


def races_agree(
    logits_SV: Tensor, first_token: int, draws: Draws, floor_S: Tensor | None, top_S: Tensor | None
) -> None:
    """The same winner, or one that the plain version has within rounding of its own."""
    fast = triton_sample.race(logits_SV, first_token, draws, floor_S, top_S)
    slow = plain.race(logits_SV, first_token, draws, floor_S, top_S)
    (fast_S, fast_token_S, fast_total_S1), (best_S, token_S, total_S1) = map(winners, (fast, slow))
    torch.testing.assert_close(fast_S, best_S, rtol=2e-6, atol=4e-6)
    token_V = torch.arange(first_token, first_token + logits_SV.shape[1], device=DEVICE)
    race_SV = logits_SV.float() / plain.divisor(draws, torch.float32)[:, None]
    race_SV = race_SV - plain.log_times(draws, token_V, torch.float32)
    of_fast_S = race_SV.gather(1, (fast_token_S - first_token)[:, None])[:, 0]
    is_near_S = (of_fast_S - best_S).abs() <= 4e-6 * (1 + best_S.abs())
    assert ((fast_token_S == token_S) | is_near_S).all()
    assert (fast_token_S == token_S).float().mean() > 0.95
    assert fast.shape[2] == slow.shape[2] == (2 if top_S is None else 3)
    torch.testing.assert_close(fast_total_S1.double(), total_S1.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(1, torch.bfloat16), (1024, torch.bfloat16), (2500, torch.bfloat16), (1500, torch.float16), (1500, torch.float32)],
    ids=str,
)
def test_races_agree(vocab: int, dtype: torch.dtype) -> None:
    logits_SV, draws = logits_of(7, vocab, dtype), moved(draws_of(7, MIXED))
    top_S = logits_SV.float().amax(-1) / plain.divisor(draws, torch.float32)
    floor_S = top_S + draws.min_p_S.log()
    for one in ((None, None), (floor_S, None), (None, top_S), (floor_S, top_S)):
        races_agree(logits_SV, 100544, draws, *one)


def test_times_agree() -> None:
    draws, token_SX = moved(draws_of(7, MIXED)), torch.randint(201088, (7, 1500), device=DEVICE)
    found_SX = triton_sample.log_times(draws, token_SX, torch.float32)
    torch.testing.assert_close(found_SX, plain.log_times(draws, token_SX, torch.float32), rtol=1e-6, atol=1e-6)
    assert (found_SX[1] == 0).all() and (found_SX[0] != 0).all()


def test_many_flat_rows_race_alike() -> None:
    """Where everything is equally likely only the noise decides, and its smallest values do."""
    rows = 16
    values = {"seed": list(range(rows)), "position": [3 * row for row in range(rows)]}
    races_agree(torch.zeros((rows, 3000), device=DEVICE), 0, moved(draws_of(rows, values)), None, None)


def test_the_result_depends_on_neither_shares_nor_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_SV, draws = logits_of(7, 3000, torch.bfloat16), moved(draws_of(7, MIXED))
    top_S = logits_SV.float().amax(-1) / plain.divisor(draws, torch.float32)
    expected = winners(triton_sample.race(logits_SV, 0, draws, None, top_S))
    for programs, parts in ((1, (1, 1, 1)), (14, (2, 4, 5)), (40, (5, 5, 5))):
        monkeypatch.setattr(triton_sample, "PROGRAMS", programs)
        monkeypatch.setattr(triton_sample, "ROW_PROGRAMS", 5)
        for rows, count in zip((slice(0, 7), slice(2, 5), slice(6, 7)), parts, strict=True):
            found = triton_sample.race(logits_SV[rows], 0, draws.rows(rows), None, top_S[rows])
            assert found.shape[1] == count
            for one, all_rows in zip(winners(found), expected, strict=True):
                assert torch.equal(one, all_rows[rows])


@pytest.mark.parametrize("columns", (2, 3))
@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (1, 197), (3, 1), (3, 5)])
def test_the_first_of_all_is_kept(ranks: int, parts: int, columns: int) -> None:
    """Many finish at the same time, some parts hold no token; views of words that are aligned to nothing."""
    rows, width = 5, 7
    r = torch.Generator().manual_seed(parts)
    times_RSP = torch.randint(4, (ranks, rows, parts), generator=r).double() / 3
    times_RSP[:, :, 2:][times_RSP[:, :, 2:] == 0] = NEVER
    tokens_RSP = torch.randint(201088, (ranks, rows, parts), generator=r)
    found = [times_RSP.view(torch.int64), tokens_RSP, tokens_RSP][:columns]
    found_RSPX = torch.stack(found, dim=-1).to(DEVICE)
    words_W = torch.tensor([6, 9, 3, 0, 8, 1, 5], dtype=torch.int32, device=DEVICE)  # the step, and rows from 9 on
    kept = [
        Kept(words_W[1:6], torch.zeros(10, dtype=torch.int64, device=DEVICE), words_W[:1], outs_NS2)
        for outs_NS2 in torch.full((2, 4, width, 2), -1, device=DEVICE)
    ]
    fast, slow = triton_sample.first(found_RSPX, kept[0]), plain.first(found_RSPX, kept[1])
    best = times_RSP.amax((0, 2))
    assert torch.equal(fast.tokens_S, slow.tokens_S) and fast.tokens_S.dtype == torch.int64
    assert all(
        int(slow.tokens_S[row]) == int(tokens_RSP[:, row][times_RSP[:, row] == best[row]].min()) for row in range(rows)
    )
    assert fast.complete_S.dtype == torch.bool and fast.complete_S.all() and slow.complete_S.all()
    assert torch.equal(triton_sample.first(found_RSPX, None).tokens_S, slow.tokens_S)
    for one in kept:
        assert torch.equal(one.last_R[words_W[1:6].long()], slow.tokens_S) and int((one.last_R == 0).sum()) >= 5
        assert torch.equal(one.outs_NS2[2, :rows, 0], slow.tokens_S) and (one.outs_NS2[2, :rows, 1] == 1).all()
        assert (one.outs_NS2[[0, 1, 3]] == -1).all() and (one.outs_NS2[2, rows:] == -1).all()


def test_what_is_kept_says_whether_it_is_complete() -> None:
    words_W = torch.tensor([11, 2, 0, 1], dtype=torch.int32, device=DEVICE)
    drawn = plain.Drawn(torch.tensor([7, 201087], device=DEVICE), torch.tensor([False, True], device=DEVICE))
    for keep in (triton_sample.keep, plain.keep):
        last_R = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        kept = Kept(words_W[1:3], last_R, words_W[:1], torch.full((4, 2, 2), -1, device=DEVICE))
        keep(drawn, kept)
        assert last_R.tolist() == [201087, 0, 7] and (kept.outs_NS2[:3] == -1).all()
        assert kept.outs_NS2[3].tolist() == [[7, 0], [201087, 1]]


def test_more_draws_than_there_is_room_for_are_refused() -> None:
    words_W = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    for rows, room in ((3, 2), (2, 3)):
        kept = Kept(words_W[:rows], words_W.long(), words_W[:1], torch.zeros((4, room, 2), device=DEVICE).long())
        with pytest.raises(ValueError, match=f"3 draws of {rows} rows, and there is room for {room}"):
            triton_sample.first(torch.zeros((1, 3, 1, 2), dtype=torch.int64, device=DEVICE), kept)


def test_a_rank_may_hold_less_than_a_token_a_part() -> None:
    draws = moved(draws_of(2, {"temperature": [1.0, 0.0]}))
    found_SPX = triton_sample.race(logits_of(2, 3, torch.float32), 50, draws, None, None)
    times_SP = found_SPX[..., 0].contiguous().view(torch.float64)
    assert found_SPX.shape[1] > 3 and (times_SP[:, 1:] == NEVER).all() and times_SP[:, 0].isfinite().all()
    assert triton_sample.first(found_SPX[None], None).tokens_S.tolist()[1] in (50, 51, 52)


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits_SV = torch.zeros((2, 4000), dtype=torch.bfloat16, device=DEVICE)
    logits_SV[0, [1500, 1501, 3999]] = 2.0
    logits_SV[1] = NEVER
    logits_SV[1, [3100, 2999]] = -5.0
    raced = triton_sample.race(logits_SV, 10, moved(draws_of(2, {"temperature": 0.0})), None, None)
    assert triton_sample.first(raced[None], None).tokens_S.tolist() == [1510, 3009]


def test_rows_may_be_a_part_of_a_wider_tensor() -> None:
    whole_SV, draws = logits_of(7, 3000, torch.bfloat16), moved(draws_of(7, MIXED))
    found = triton_sample.race(whole_SV[:, 500:2500], 500, draws, None, None)
    expected = triton_sample.race(whole_SV[:, 500:2500].contiguous(), 500, draws, None, None)
    assert torch.equal(found, expected)


def test_what_is_not_raced_here_is_refused() -> None:
    draws = moved(draws_of(2, {}))
    for logits_SV in (torch.zeros((2, 8), dtype=torch.float64, device=DEVICE), torch.zeros((8, 2), device=DEVICE).T):
        with pytest.raises(ValueError, match="rows of at most fp32"):
            triton_sample.race(logits_SV, 0, draws, None, None)
    with pytest.raises(ValueError, match="fp32, contiguous"):
        triton_sample.log_times(draws, torch.zeros((2, 8), dtype=torch.int64, device=DEVICE), torch.float64)


@pytest.mark.parametrize("cuts", [(), (1, 2000)], ids=str)
def test_draws_are_those_of_the_plain_version(cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    one_at_a_time = threading.Lock()  # the interpreter knows no threads

    def locked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            with one_at_a_time:
                return function(*given)

        return call

    names = ("race", "first", "log_times", "keep")
    locked_ones = (locked(getattr(triton_sample, name)) for name in names)
    monkeypatch.setattr(triton_sample, "FAST", plain.Local(*locked_ones))
    logits_SV, draws = logits_of(7, 3000, torch.bfloat16), moved(draws_of(7, MIXED))

    def one(part: slice, first: int, gather: plain.AllGather) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        here = logits_SV[:, part], first, gather, draws
        fast, slow = triton_sample.sample(*here, plain.EVERYTHING), plain.sample(*here, plain.EVERYTHING)
        assert torch.equal(fast.complete_S, slow.complete_S)
        assert torch.equal(fast.tokens_S[fast.complete_S], slow.tokens_S[fast.complete_S])
        exact_S = triton_sample.sample_exact(*here)
        assert torch.equal(exact_S[fast.complete_S], fast.tokens_S[fast.complete_S])
        return exact_S, plain.sample_exact(*here), fast.tokens_S, fast.complete_S

    for exact_S, plain_S, _, complete_S in on_ranks(3000, cuts, one):
        assert torch.equal(exact_S, plain_S) and complete_S.any()


WAYS = (
    Sampling(temperature=0.0),
    Sampling(seed=7),
    Sampling(temperature=0.8, top_p=0.9, seed=8),
    Sampling(min_p=0.2, seed=10),
    Sampling(temperature=0.0, presence=1.5),
    Sampling(temperature=8.0, top_p=0.999, seed=11),  # deeper than the first candidates
)


def test_an_engine_that_draws_here_answers_as_a_plain_one() -> None:
    """Every way to draw, together, and each step's tokens kept for the next and for the host."""
    asked = [Request(f"{i}", tuple(prompt(SPECS["tiny"], 9 + i, seed=i)), 5 + i, way) for i, way in enumerate(WAYS)]
    found = answers(drawing_engine(), asked, ahead=True)
    assert found == answers(plain_engine(drawing_plan()), asked, ahead=True)
    assert {len(tokens) for tokens in found.values()} == set(range(5, 5 + len(WAYS)))


def drawing_plan() -> Plan:
    return plain_plan(TINY, "fp32", device="cuda" if DEVICE.type == "cuda" else "cpu", sequences=4)


def drawing_engine() -> Engine:
    """What comes before and after the layers by Triton, the layers by torch."""
    names = ("upload", "locate", "sample", "sample_exact")
    ours = dataclasses.replace(PLAIN, **{name: getattr(triton_operations(), name) for name in names})
    return plain_engine(dataclasses.replace(drawing_plan(), kernels="triton"), ours)


class Calls(TorchDispatchMode):
    """Names of torch's operations that are more than another view or fresh memory: each is a kernel or a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_view = func.is_view and out.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
        if not is_view and not func.name().startswith("aten::empty"):
            self.names.append(func.name())
        return out


@dataclasses.dataclass(frozen=True)
class Launches:
    """In place of a kernel: its name each time that it would be launched."""

    names: list[str]
    name: str

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *given, **constants: self.names.append(self.name)


def test_a_draw_is_two_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the logits to the host: a step of decodes waits for each of them."""
    engine, calls = drawing_engine(), Calls()
    record = decode_step(engine, 2)
    engine.words.upload(record)
    logits_SV = torch.zeros((record.head.draws, engine.sizes.vocab), device=DEVICE)
    for name in ("_race", "_first", "_keep"):
        monkeypatch.setattr(triton_sample, name, Launches(calls.names, name))
    with torch.inference_mode(), calls:
        engine._draw(record.head, logits_SV)
        engine._deliver(record.head, None)
    assert calls.names == ["_race", "_first"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("wanted", [Wanted(False, False), Wanted(False, True), plain.EVERYTHING], ids=str)
@pytest.mark.parametrize("version", [plain.sample, triton_sample.sample], ids=["plain", "triton"])
def test_a_graph_draws_what_the_call_draws(version: object, wanted: Wanted) -> None:
    """Captured once, replayed on other logits and settings; a host sync would fail the capture."""
    assert callable(version)
    logits_SV, draws = logits_of(7, 201088, torch.bfloat16), moved(draws_of(7, MIXED))
    version(logits_SV, 0, Alone().all_gather, draws, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = version(logits_SV, 0, Alone().all_gather, draws, wanted)
    for step in range(3):
        logits_SV.copy_(random_logits(7, 201088, seed=step))
        draws.position_S.add_(1)
        graph.replay()
        expected = version(logits_SV, 0, Alone().all_gather, draws, wanted)
        assert torch.equal(drawn.tokens_S, expected.tokens_S) and torch.equal(drawn.complete_S, expected.complete_S)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("wanted", [Wanted(False, False), plain.EVERYTHING], ids=str)
def test_a_graph_keeps_each_step_in_its_place(wanted: Wanted) -> None:
    """In pinned memory, which the host reads once an event that follows the graph has come."""
    logits_SV, draws = logits_of(7, 201088, torch.bfloat16), moved(draws_of(7, MIXED))
    words_W = torch.tensor([0, 8, 0, 3, 5, 1, 7, 2], dtype=torch.int32, device=DEVICE)
    outs_NS2 = torch.zeros((4, 9, 2), dtype=torch.int64, pin_memory=True)
    kept = Kept(words_W[1:], torch.zeros(9, dtype=torch.int64, device=DEVICE), words_W[:1], outs_NS2)
    triton_sample.sample(logits_SV, 0, Alone().all_gather, draws, wanted, kept)
    graph, done = torch.cuda.CUDAGraph(), torch.cuda.Event()
    with torch.cuda.graph(graph):
        drawn = triton_sample.sample(logits_SV, 0, Alone().all_gather, draws, wanted, kept)
    expected = {}
    for step in range(1, 9):
        words_W[0] = step
        logits_SV.copy_(random_logits(7, 201088, seed=step))
        graph.replay()
        done.record()
        done.synchronize()
        found_S2 = outs_NS2[step % 4, :7].clone()
        expected[step % 4] = torch.stack((drawn.tokens_S, drawn.complete_S.long()), dim=1).cpu()
        assert torch.equal(found_S2, expected[step % 4])
        assert torch.equal(kept.last_R[words_W[1:].long()], drawn.tokens_S)
    assert all(torch.equal(outs_NS2[place, :7], one) for place, one in expected.items())

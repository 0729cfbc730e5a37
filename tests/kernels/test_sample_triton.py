"""The Triton race against the plain one, on a GPU if there is one, in Triton's interpreter if not."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drawing import NEVER, draws_of, on_ranks, random_logits
from gptoss_launch.parallel.kernels import sample as plain
from gptoss_launch.parallel.kernels import triton_sample
from gptoss_launch.parallel.kernels.sample import Draws, Wanted
from gptoss_launch.parallel.model.comm import Alone
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIXED = {
    "temperature": [1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 0.7],
    "min_p": [0.0, 0.3, 0.0, 0.02, 1.0, 0.5, 0.0],
    "top_p": [1.0, 1.0, 0.9, 0.999, 1.0, 0.4, 0.95],
    "top_k": [0, 0, 0, 40, 3, 0, 200],
    "seed": [0, 1, 2**63 - 1, 12345, 1 << 40, 77, 3],
    "position": [0, 5, 131071, 17, 1, 2, 3],
}


def moved(draws: Draws) -> Draws:
    return Draws(**{name: getattr(draws, name).to(DEVICE) for name in draws.__dataclass_fields__})


def logits_of(rows: int, vocab: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    return random_logits(rows, vocab, seed=vocab, scale=scale).to(dtype).to(DEVICE)


def winners(found_SX: Tensor) -> tuple[Tensor, Tensor]:
    """When the first token of each row finishes, and its id."""
    return found_SX[:, 0].contiguous().view(torch.float64).float(), found_SX[:, 1]


def races_agree(
    logits_SV: Tensor, first_token: int, draws: Draws, floor_S: Tensor | None, top_S: Tensor | None
) -> None:
    """The same winner, or one that the plain version has within rounding of its own."""
    fast = triton_sample.race(logits_SV, first_token, draws, floor_S, top_S)
    slow = plain.race(logits_SV, first_token, draws, floor_S, top_S)
    (fast_S, fast_token_S), (best_S, token_S) = map(winners, (fast, slow))
    torch.testing.assert_close(fast_S, best_S, rtol=2e-6, atol=4e-6)
    token_V = torch.arange(first_token, first_token + logits_SV.shape[1], device=DEVICE)
    race_SV = logits_SV.float() / plain.divisor(draws, torch.float32)[:, None]
    race_SV = race_SV - plain.log_times(draws, token_V, torch.float32)
    of_fast_S = race_SV.gather(1, (fast_token_S - first_token)[:, None])[:, 0]
    is_near_S = (of_fast_S - best_S).abs() <= 4e-6 * (1 + best_S.abs())
    assert ((fast_token_S == token_S) | is_near_S).all()
    assert (fast_token_S == token_S).float().mean() > 0.95
    assert fast.shape == slow.shape == (len(logits_SV), 2 if top_S is None else 3)
    torch.testing.assert_close(fast[:, 2:].double(), slow[:, 2:].double(), rtol=1e-6, atol=0)


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
    expected = triton_sample.race(logits_SV, 0, draws, None, top_S)
    for programs in (1, 14):
        monkeypatch.setattr(triton_sample, "PROGRAMS", programs)
        for rows in (slice(0, 7), slice(2, 5), slice(6, 7)):
            found = triton_sample.race(logits_SV[rows], 0, draws.rows(rows), None, top_S[rows])
            assert torch.equal(found, expected[rows])


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits_SV = torch.zeros((2, 4000), dtype=torch.bfloat16, device=DEVICE)
    logits_SV[0, [1500, 1501, 3999]] = 2.0
    logits_SV[1] = NEVER
    logits_SV[1, [3100, 2999]] = -5.0
    raced = triton_sample.race(logits_SV, 10, moved(draws_of(2, {"temperature": 0.0})), None, None)
    assert raced[:, 1].tolist() == [1510, 3009]


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

    monkeypatch.setattr(triton_sample, "FAST", plain.Local(locked(triton_sample.race), locked(triton_sample.log_times)))
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

"""Biases, penalties, masks and counts against loops in Python; log-probabilities against torch's log_softmax."""

import math
from collections import Counter

import pytest
import torch
from drawing import draws_of, on_ranks, random_logits
from gptoss_launch.parallel.kernels.adjust import MARK, adjust, count_tokens, mark_tokens
from gptoss_launch.parallel.kernels.logprobs import logprobs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CUTS = st.sets(st.integers(1, 69), max_size=3).map(sorted)
VOCAB = 70


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_logits_are_adjusted_as_the_loops_say(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    logits_SV = random_logits(rows, VOCAB).to(dtype)
    few = st.sampled_from([0.0, 0.5, -1.25, 2.0])  # exact in fp32, in any order
    presence, frequency = (data.draw(st.lists(few, min_size=rows, max_size=rows)) for _ in range(2))
    repetition = data.draw(st.lists(st.sampled_from([1.0, 2.0, 0.5]), min_size=rows, max_size=rows))
    repeats = any(value != 1 for value in repetition)
    kind = data.draw(st.sampled_from([torch.int16, torch.int32]))
    prompts = data.draw(st.lists(st.sets(st.integers(0, VOCAB - 1), max_size=30), min_size=5, max_size=5))
    answers = data.draw(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=30), min_size=5, max_size=5))
    held = data.draw(st.permutations(range(5)))[:rows]
    ids = st.integers(0, VOCAB - 1)
    biases = data.draw(
        st.lists(st.dictionaries(ids, st.sampled_from([-100.0, 0.25, 8.0])), min_size=rows, max_size=rows)
    )
    allowed = data.draw(st.one_of(st.none(), st.lists(st.sets(ids, min_size=1), min_size=rows, max_size=rows)))
    cuts = data.draw(CUTS)

    expected_SV = logits_SV.double().tolist()
    for row in range(rows):
        for token in range(VOCAB):
            count = answers[held[row]].count(token)
            value = expected_SV[row][token] + biases[row].get(token, 0.0)
            if count or token in prompts[held[row]]:
                value = value / repetition[row] if value > 0 else value * repetition[row]
            value -= (presence[row] if count else 0.0) + frequency[row] * count
            is_out = allowed is not None and token not in allowed[row]
            expected_SV[row][token] = -math.inf if is_out else value

    width = max(1, *(len(one) for one in biases)) if biases else 1
    padded = [list(one.items()) + [(-1, 7.0)] * (width - len(one)) for one in biases]
    bias = tuple(
        torch.tensor([[pair[part] for pair in row] for row in padded], dtype=kind)
        for part, kind in ((0, torch.int64), (1, torch.float32))
    )
    words = None
    if allowed is not None:
        bits = [[sum(1 << (t % 32) for t in row if t // 32 == word) for word in range(3)] for row in allowed]
        words = torch.tensor(bits, dtype=torch.int64).to(torch.int32)
    draws = draws_of(rows, {"presence": presence, "frequency": frequency, "repetition": repetition})

    def one(part: slice, first: int, _: object) -> Tensor:
        counts_RV = torch.zeros((6, part.stop - part.start), dtype=kind)
        fed = [(row, token) for row, prompt in enumerate(prompts) for token in prompt]
        rows_T, tokens_T = (torch.tensor([pair[i] for pair in fed], dtype=torch.int64) for i in (0, 1))
        mark_tokens(counts_RV, first, rows_T, tokens_T, torch.ones(len(fed), dtype=torch.bool))
        fed = [(row, token) for row, answer in enumerate(answers) for token in answer]
        rows_T, tokens_T = (torch.tensor([pair[i] for pair in fed], dtype=torch.int64) for i in (0, 1))
        count_tokens(counts_RV, first, rows_T, tokens_T, torch.ones(len(fed), dtype=torch.bool))
        before_SV = logits_SV[:, part].clone()
        out_SV = adjust(logits_SV[:, part], first, draws, counts_RV, torch.tensor(held), bias, words, repeats)
        assert torch.equal(logits_SV[:, part], before_SV)  # what logprobs reads later
        return out_SV

    adjusted_SV = torch.cat(on_ranks(VOCAB, cuts, one), dim=1)
    assert adjusted_SV.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        adjusted_SV.double(), torch.tensor(expected_SV, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_tiles_of_any_height_adjust_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_SV = random_logits(7, VOCAB)
    counts_RV = (random_logits(7, VOCAB, seed=1) > 2).int() * 3
    values = {"presence": [0.5, 0.0, 1.0, 0.0, 2.0, 0.0, 0.0], "frequency": 0.1, "repetition": 1.25}
    counts_RV += (random_logits(7, VOCAB, seed=2) > 2).int() * MARK
    words_SW = torch.arange(1, 22, dtype=torch.int32).view(7, 3) * 987654321
    given = logits_SV, 0, draws_of(7, values), counts_RV, None, None, words_SW, True
    expected = adjust(*given)
    assert (expected != logits_SV).any()
    monkeypatch.setattr("gptoss_launch.parallel.kernels.sample.DRAW_LIMIT_BYTES", 1)
    assert torch.equal(adjust(*given), expected)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_counts_add_up_over_steps_and_within_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    expected, counts_RV = Counter[tuple[int, int]](), torch.zeros((3, 10), dtype=dtype)
    for _ in range(4):
        rows_T, tokens_T = torch.randint(3, (50,), generator=generator), torch.randint(30, (50,), generator=generator)
        counted_T = torch.rand(50, generator=generator) < 0.7
        count_tokens(counts_RV, 12, rows_T, tokens_T, counted_T)
        for row, token, counted in zip(rows_T.tolist(), tokens_T.tolist(), counted_T.tolist(), strict=True):
            expected[row, token] += counted
    assert counts_RV.tolist() == [[expected[row, token] for token in range(12, 22)] for row in range(3)]
    assert counts_RV.max() > 1


def test_only_what_is_marked_is_marked() -> None:
    counts_RV = torch.zeros((4, 10), dtype=torch.int16)
    rows_T, tokens_T = torch.tensor([0, 1, 1, 2, 0, 2]), torch.tensor([12, 21, 11, 22, 15, 16])
    mark_tokens(counts_RV, 12, rows_T, tokens_T, torch.tensor([True, True, True, True, False, True]))
    assert counts_RV[:3].nonzero().tolist() == [[0, 0], [1, 9], [2, 4]]  # 11 and 22 are held elsewhere
    assert {count for count in counts_RV[:3].flatten().tolist() if count} == {MARK}


def found(logits_SV: Tensor, tokens: list[int], most: int, cuts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    tokens_S = torch.tensor(tokens)
    ranks = on_ranks(
        logits_SV.shape[1],
        cuts,
        lambda part, first, gather: logprobs(logits_SV[:, part], first, gather, tokens_S, most),
    )
    assert all(torch.equal(a, b) for one in ranks for a, b in zip(one, ranks[0], strict=True))
    return ranks[0]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(-6, 6), min_size=VOCAB, max_size=VOCAB), min_size=1, max_size=3),
    st.sampled_from([0, 1, 5, 20]),
    CUTS,
    st.integers(0, VOCAB - 1),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_logprobs_are_those_of_log_softmax(
    values: list[list[int]], most: int, cuts: list[int], token: int, dtype: torch.dtype
) -> None:
    """Small whole numbers, so that many are equal: the lowest ids of these come first."""
    logits_SV = torch.tensor(values, dtype=dtype)
    expected_SV = logits_SV.double().log_softmax(-1)
    tokens = [(token + 11 * row) % VOCAB for row in range(len(values))]
    of_token_S, ids_SK, top_SK = found(logits_SV, tokens, most, cuts)
    assert ids_SK.tolist() == [sorted(range(VOCAB), key=lambda t, row=row: (-row[t], t))[:most] for row in values]
    assert ids_SK.dtype == torch.int64 and ids_SK.shape == top_SK.shape == (len(values), most)
    near = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 2e-6}
    torch.testing.assert_close(of_token_S.double(), expected_SV.gather(1, torch.tensor(tokens)[:, None])[:, 0], **near)
    torch.testing.assert_close(top_SK.double(), expected_SV.gather(1, ids_SK), **near)


def test_logprobs_of_a_wide_row_depend_on_neither_batch_nor_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_SV = random_logits(5, 3000).bfloat16()
    tokens = [3, 2999, 1500, 0, 77]
    expected = found(logits_SV, tokens, 20, [])
    reference_SV = logits_SV.double().log_softmax(-1)
    torch.testing.assert_close(expected[2].double(), reference_SV.topk(20).values, rtol=0, atol=1e-6)
    for row in range(5):
        alone = found(logits_SV[row : row + 1], tokens[row : row + 1], 20, [])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, expected, strict=True))
    monkeypatch.setattr("gptoss_launch.parallel.kernels.sample.DRAW_LIMIT_BYTES", 1)
    cut = found(logits_SV, tokens, 20, [5, 1000])
    assert all(torch.equal(a, b) for a, b in zip(cut, expected, strict=True))

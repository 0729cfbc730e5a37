"""Which replica gets a request, and how often one that dies is started again: pure functions, no process."""

from gptoss_launch.launch.dispatch import BLOCK_TOKENS, BUSIER, SPARE, WORTH_BLOCKS, Dispatch, prompt_blocks
from gptoss_launch.launch.restarts import NO_RESTARTS, Restarts
from hypothesis import given
from hypothesis import strategies as st

LONG = list(range(10 * BLOCK_TOKENS + 5))


@given(st.lists(st.integers(0, 2**31), max_size=400), st.lists(st.integers(0, 2**31), max_size=400), st.data())
def test_blocks_agree_exactly_as_far_as_prompts_do(one, other, data):
    other = one[: data.draw(st.integers(0, len(one)))] + other
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    blocks, others = prompt_blocks(one), prompt_blocks(other)
    assert len(blocks) == len(one) // BLOCK_TOKENS
    shared = sum(a == b for a, b in zip(blocks, others, strict=False))
    assert shared == same // BLOCK_TOKENS and blocks[:shared] == others[:shared]


def test_the_replica_that_was_sent_the_prefix_is_preferred():
    dispatch = Dispatch(3)
    blocks = prompt_blocks(LONG)
    assert dispatch.choose(blocks, {0: 2, 1: 1, 2: 2}) == 1  # nobody was: the least loaded
    dispatch.remember(2, blocks[:6])
    dispatch.remember(0, blocks[:5])
    assert dispatch.choose(blocks, {0: 0, 1: 0, 2: 3}) == 0  # one block more is not worth it
    assert dispatch.choose(blocks, {1: 0, 2: 3}) == 2
    assert dispatch.choose(blocks, {0: 1, 1: 0}) == 0
    assert dispatch.choose(prompt_blocks([9, *LONG]), {1: 0, 2: 1}) == 1  # another prompt
    dispatch.forget(2)
    assert dispatch.held(2, blocks) == 0 and dispatch.choose(blocks, {1: 0, 2: 1}) == 1


def test_load_wins_beyond_the_rule():
    dispatch = Dispatch(2)
    blocks = prompt_blocks(LONG)
    dispatch.remember(0, blocks)
    for least in (0, 7, 100):
        most = int(BUSIER * least + SPARE)
        assert dispatch.choose(blocks, {0: most, 1: least}) == 0
        assert dispatch.choose(blocks, {0: most + 1, 1: least}) == 1


def test_what_all_prompts_share_is_no_reason():
    dispatch = Dispatch(2)
    blocks = prompt_blocks(LONG)
    dispatch.remember(0, blocks[: WORTH_BLOCKS - 1])
    assert dispatch.choose(blocks, {0: 1, 1: 0}) == 1
    dispatch.remember(0, blocks[:WORTH_BLOCKS])
    assert dispatch.choose(blocks, {0: 1, 1: 0}) == 0


def test_memory_is_bounded_and_the_least_used_goes_first():
    dispatch = Dispatch(1, remembered_blocks=12)
    kept, dropped, last = (prompt_blocks([one, *LONG])[:5] for one in range(3))
    dispatch.remember(0, kept)
    dispatch.remember(0, dropped)
    dispatch.remember(0, kept)
    dispatch.remember(0, last)
    # 15 blocks for 12 places: of the oldest prompt its end is dropped, and its beginning still counts.
    assert [dispatch.held(0, blocks) for blocks in (kept, dropped, last)] == [5, 2, 5]
    assert len(dispatch._sent[0]) == 12


def test_restarts_are_bounded_within_a_time_and_pauses_grow():
    rule = Restarts((1.0, 5.0, 25.0), within_s=600.0)
    begun_s = []
    for now_s, pause_s in ((0.0, 1.0), (10.0, 5.0), (20.0, 25.0)):
        assert rule.pause_s(begun_s, now_s) == pause_s
        begun_s.append(now_s)
    assert rule.pause_s(begun_s, 599.9) is None
    assert rule.pause_s(begun_s, 605.0) == 25.0 and rule.pause_s(begun_s, 700.0) == 1.0
    assert NO_RESTARTS.pause_s([], 0.0) is None

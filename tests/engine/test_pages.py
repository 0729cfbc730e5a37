"""Pages by themselves: what is held, kept and free, and which prefixes are found again.

That sequences never see each other's pages is shown where a model reads them (test_schedule.py).
"""

import dataclasses

import pytest
from gptoss_launch.parallel.engine.pages import DROPPED, Cache, Pool, Table
from gptoss_launch.parallel.planning.pages import pool_pages, window_pages
from gptoss_launch.parallel.planning.spec import PUBLISHED, LayerKind, alternating_kinds

PAGE = 4
SPEC = dataclasses.replace(PUBLISHED["openai/gpt-oss-20b"], layers=2, layer_kinds=alternating_kinds(2), window_tokens=6)


def cache(pages: int, kinds: tuple[LayerKind, ...] = ("window", "full")) -> Cache:
    return Cache(Pool(pages), dataclasses.replace(SPEC, layer_kinds=kinds, layers=len(kinds)), PAGE)


def fill(cache: Cache, tokens: list[int], step: int = 3) -> Table:
    """A table of `tokens`, computed `step` at a time."""
    table = Table()
    for start in range(0, len(tokens), step):
        cache.extend(table, min(step, len(tokens) - start))
        cache.drop_passed(table, len(tokens) - 1)
        cache.name_complete(table, tokens)
    return table


def test_a_sequence_holds_its_window_and_all_of_the_full_layers() -> None:
    here = cache(40)
    table = fill(here, list(range(30)))
    assert [page == DROPPED for page in table.pages["window"]] == [True] * 6 + [False] * 2  # 29 sees 24 and on
    assert DROPPED not in table.pages["full"] and len(table.pages["full"]) == 8
    held = 8 + 2
    assert here.pool.available == 40 - held
    assert len(set(table.pages["full"]) & set(table.pages["window"])) == 0
    here.release(table)
    assert here.pool.available == 40


@pytest.mark.parametrize("step", [1, 3, 8, 17])
def test_one_sequence_never_needs_more_than_the_plan_says(step: int) -> None:
    for length in range(1, 60):
        here, table = cache(1000), Table()
        most = 0
        for start in range(0, length, step):
            here.extend(table, min(step, length - start))
            most = max(most, 1000 - here.pool.available)
            here.drop_passed(table, max(0, table.length - 2))
        assert most <= pool_pages(here.spec, length, 1, step, PAGE)


def test_a_kept_page_is_found_until_its_place_is_needed() -> None:
    here, tokens = cache(12), list(range(17))
    here.release(fill(here, tokens))
    table = Table()
    assert here.longest_prefix(table, tokens, 16) == 4
    assert here.longest_prefix(Table(), tokens, 15) == 3
    assert here.longest_prefix(Table(), [99, *tokens], 16) == 0
    here.adopt(table, 4)
    assert table.length == 16 and len(table.pages["full"]) == 4
    assert table.pages["window"][:2] == [DROPPED, DROPPED]  # the next token, 16, sees 11 and on
    others = [here.pool.take() for _ in range(here.pool.available)]
    assert not set(others) & {*table.pages["full"], *table.pages["window"]}
    assert here.longest_prefix(Table(), tokens, 16) == 4  # held pages keep their names
    here.release(table)
    for _ in range(here.pool.available):
        here.pool.take()
    assert here.longest_prefix(Table(), tokens, 16) == 0


def test_a_prefix_is_shortened_where_its_window_is_gone() -> None:
    here, tokens = cache(30), list(range(32))
    table = fill(here, tokens)
    windows = {index: page for index, page in enumerate(table.pages["window"]) if page != DROPPED}
    assert sorted(windows) == [6, 7]
    # of a prefix of 7 pages the next token, 28, sees 23 and on: page 5, which was dropped, but is still kept
    assert here.longest_prefix(Table(), tokens, 28) == 7
    before = here.pool.available
    taken = [here.pool.take() for _ in range(before)]
    assert here.longest_prefix(Table(), tokens, 28) == 0  # full pages are there, no window before them is
    assert here.longest_prefix(Table(), tokens, 32) == 8  # pages 6 and 7, which token 32 sees, are held
    for page in taken:
        here.pool.give_back(page)


def test_two_that_compute_the_same_keep_one_name() -> None:
    here, tokens = cache(40), list(range(9))
    first, second = fill(here, tokens), fill(here, tokens)
    here.release(first)
    here.release(second)
    assert here.pool.available == 40
    free = here.pool.available - sum(here.pool.is_kept(page) for page in range(40))
    kept = {page for page in range(40) if here.pool.is_kept(page)}
    assert len(kept) == 4 and free == 36  # two pages of each kind, once
    assert here.longest_prefix(Table(), tokens, 8) == 2


def test_other_beginnings_have_other_names() -> None:
    here = cache(40)
    here.release(fill(here, [1, 2, 3, 4, 5, 6, 7, 8]))
    assert here.longest_prefix(Table(), [9, 2, 3, 4, 5, 6, 7, 8, 0], 8) == 0
    assert here.longest_prefix(Table(), [1, 2, 3, 4, 9, 6, 7, 8, 0], 8) == 1


@pytest.mark.parametrize("kinds", [("full", "full"), ("window", "window")])
def test_models_with_one_kind_of_layer(kinds: tuple[LayerKind, ...]) -> None:
    here, tokens = cache(40, kinds), list(range(20))
    table = fill(here, tokens)
    assert not table.pages["full" if kinds[0] == "window" else "window"]
    here.release(table)
    assert here.longest_prefix(Table(), tokens, 19) == 4
    assert here.pool.available == 40


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    here = cache(12, ("full", "full"))
    here.release(fill(here, [1] * 16))
    here.release(fill(here, [2] * 16))
    for _ in range(6):  # four were never used
        here.pool.take()
    assert here.longest_prefix(Table(), [1] * 17, 16) == 2
    assert here.longest_prefix(Table(), [2] * 17, 16) == 4


def test_a_page_that_nobody_holds_cannot_be_given_back() -> None:
    pool = Pool(2)
    page = pool.take()
    pool.give_back(page)
    with pytest.raises(AssertionError, match="held by nobody"):
        pool.give_back(page)


def test_window_pages_count_tokens_that_may_be_void() -> None:
    assert window_pages(SPEC, 1, PAGE) == 3 + 0 * PAGE

"""What is kept of responses: how many, how much, for how long."""

import asyncio
import json
from dataclasses import dataclass, field

import pytest
from gptoss_launch.launch.api.errors import ApiError
from gptoss_launch.launch.api.responses_query import Page, page_of
from gptoss_launch.launch.api.responses_store import Kept, Recording, Store


@dataclass
class Grown:
    id: str
    ended: bool = True
    status: str = "completed"
    response: dict = field(default_factory=dict)


def kept(id, text="", previous=None, owner=""):
    return Kept(Grown(id, response={"text": text}), owner, [], previous)


def put(store, one):
    store.put(one)
    store.settle(one)
    return one


def there(store, *ids):
    return [store.get(id, "") is not None for id in ids]


def test_the_number_is_bounded_and_the_least_used_go():
    store = Store(most=3)
    for id in "abc":
        put(store, kept(id))
    store.find("a", "")
    put(store, kept("d"))
    assert there(store, *"abcd") == [True, False, True, True] and len(store) == 3
    with pytest.raises(ApiError) as error:
        store.find("b", "")
    assert error.value.status == 404 and "at most 3" in error.value.message


def test_the_size_is_bounded():
    store = Store(most_bytes=1000)
    for id in "abcd":
        put(store, kept(id, "x" * 300))
    assert there(store, *"abcd") == [False, True, True, True]
    one = len(json.dumps({"text": "x" * 300})) + len("[]")
    assert store.size_bytes == 3 * one <= 1000
    put(store, kept("large", "x" * 2000))
    assert len(store) == 0 and store.size_bytes == 0
    recorded = kept("e")
    recorded.recording = Recording()
    recorded.recording.add([{"delta": "x" * 2000}])
    put(store, recorded)
    assert len(store) == 0


def test_those_being_made_stay():
    store = Store(most=2)
    going = [kept(id) for id in "abc"]
    for one in going:
        store.put(one)
    put(store, kept("d"))
    assert there(store, *"abcd") == [True, True, True, False]
    store.settle(going[1])
    assert there(store, *"abc") == [True, False, True]
    store.settle(going[1])  # twice is once
    store.settle(going[0])
    assert len(store) == 2 and store.size_bytes == going[0].size_bytes > 0
    store.remove("a")
    store.remove("c")
    store.settle(going[2])
    assert len(store) == 0 and store.size_bytes == 0


def test_a_chain_is_used_as_a_whole_and_breaks_where_one_is_gone():
    store = Store(most=4)
    for id, previous in (("a", None), ("b", "a"), ("c", "b"), ("x", None)):
        put(store, kept(id, previous=previous))
    assert [one.draft.id for one in store.chain("c", "")] == ["a", "b", "c"]
    put(store, kept("y"))
    assert there(store, *"abcxy") == [True, True, True, False, True]
    store.remove("a")
    with pytest.raises(ApiError) as error:
        store.chain("c", "")
    assert error.value.param == "previous_response_id" and "'a'" in error.value.message
    with pytest.raises(ApiError):
        store.chain("c", "someone else")
    assert store.chain(None, "") == []


def test_a_recording_is_read_by_several_from_anywhere():
    async def read(recording, after):
        return [event["n"] async for event in recording.read(after)]

    async def run():
        recording = Recording()
        recording.add([{"n": 0}, {"n": 1}])
        readers = [asyncio.create_task(read(recording, after)) for after in (-1, 0, 3, 9)]
        for n in range(2, 6):
            await asyncio.sleep(0)
            recording.add([{"n": n}])
        recording.end()
        late = asyncio.create_task(read(recording, 4))
        return await asyncio.gather(*readers, late)

    assert asyncio.run(run()) == [[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [4, 5], [], [5]]


@pytest.mark.parametrize(
    "page, expected, more",
    [
        (Page(None, 2, False), [0, 1], True),
        (Page("1", 2, False), [2, 3], True),
        (Page("3", 2, False), [4], False),
        (Page("4", 2, False), [], False),
        (Page(None, 2, True), [4, 3], True),
        (Page("1", 100, True), [0], False),
    ],
)
def test_pages(page, expected, more):
    items = [{"id": str(n)} for n in range(5)]
    listed = page_of(items, page)
    assert [int(item["id"]) for item in listed["data"]] == expected and listed["has_more"] is more
    assert (listed["first_id"], listed["last_id"]) == (
        (str(expected[0]), str(expected[-1])) if expected else (None, None)
    )

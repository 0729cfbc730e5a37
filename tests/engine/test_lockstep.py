"""The ring of records: whole records only, in order, for as many readers as there are."""

import threading
from array import array
from pathlib import Path

import pytest
from gptoss_launch.parallel.engine.lockstep import HEAD_WORDS, Ring
from gptoss_launch.parallel.engine.record import LAST_NUMBER, RING_STEPS, Padding, Record, Sizes, after, encode, read
from gptoss_launch.parallel.engine.request import Request, Sampling
from gptoss_launch.parallel.engine.schedule import Item, Running, Step

SIZES = Sizes(rows=4, row_pages=8, scratch_page=100, step_tokens=16, page_tokens=4, vocab=64)


def record(number: int) -> Record:
    sampling = Sampling(temperature=number / 7, seed=(number << 40) + 3)
    running = Running(Request("a", tuple(range(1 + number % 5)), 9, sampling), 0.0, row=number % 4)
    item = Item(running, 0, 0, len(running.tokens), draws=True)
    return encode(Step((item,), 0, False, (("full", running.row, 0, number),), (running,)), number, SIZES)


def test_readers_see_every_record_whole(tmp_path: Path) -> None:
    """The writer is never more than two steps ahead of a reader, as the leader is not."""
    ring = Ring(tmp_path / "steps", SIZES.words, create=True)
    count, readers = 300, 2
    read_so_far = [0] * readers
    moved = threading.Condition()
    seen: list[list[bytes]] = [[] for _ in range(readers)]

    def reader(index: int) -> None:
        mine = Ring(tmp_path / "steps", SIZES.words, create=False)
        for number in range(1, count + 1):
            seen[index].append(mine.wait(number).words.tobytes())
            with moved:
                read_so_far[index] = number
                moved.notify()

    threads = [threading.Thread(target=reader, args=(index,)) for index in range(readers)]
    for thread in threads:
        thread.start()
    expected = []
    for number in range(1, count + 1):
        with moved:
            assert moved.wait_for(lambda n=number: min(read_so_far) >= n - 2, timeout=60)
        ring.publish(record(number))
        expected.append(record(number).words.tobytes())
    for thread in threads:
        thread.join(60)
    assert seen == [expected] * readers


def test_a_record_that_is_being_written_is_not_taken(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "steps", SIZES.words, create=True)
    ring.publish(record(1))
    later = record(1 + RING_STEPS)
    slot = ring._slot(1)
    slot[HEAD_WORDS : HEAD_WORDS + later.head.words] = later.words  # the slot's head is still the old one

    class Waited(Exception):
        pass

    def pause(seconds: float) -> None:
        raise Waited

    with pytest.raises(Waited):
        ring.wait(1 + RING_STEPS, pause)
    ring.publish(later)
    assert ring.wait(1 + RING_STEPS, pause).head == later.head


def test_numbers_begin_again_before_a_word_is_full(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "steps", SIZES.words, create=True)
    step = Step((), 0, False, (), ())
    numbers = [LAST_NUMBER - 1]
    for _ in range(3):
        numbers.append(after(numbers[-1]))
    for number in numbers:
        ring.publish(encode(step, number, SIZES, Padding(1)))
    assert [ring.wait(number).head.number for number in numbers] == [LAST_NUMBER - 1, LAST_NUMBER, 1, 2]
    assert {number % RING_STEPS for number in numbers} == set(range(RING_STEPS)) and after(0) == 1


def test_a_record_reads_back() -> None:
    first = record(6)
    again = read(memoryview(array("i", [*first.words.tolist(), 7, 7])))  # what follows does not matter
    assert again.head == first.head and again.words == first.words
    assert again.chunks == first.chunks and first.chunks[0].row == 2

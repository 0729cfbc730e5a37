"""Messages between processes: every type comes back as it was sent, however the bytes are cut; junk is a ValueError."""

import time
from collections.abc import Callable, Iterable
from typing import get_args

import msgpack
import pytest
from gptoss_launch.parallel.engine.constraint import Constraint, Section
from gptoss_launch.parallel.engine.request import Request, Sampling, Token
from gptoss_launch.parallel.engine.wire import (
    MESSAGE_LIMIT_BYTES,
    Assigned,
    Cancel,
    Decoder,
    Done,
    Failed,
    Generate,
    Hello,
    Leave,
    Message,
    Progress,
    Ready,
    Refused,
    Stats,
    Stop,
    Tokens,
    encode,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SAMPLING = Sampling(0.5, 0.9, 7, 0.1, -1.0, 2.0, ((5, -100.0),), 2**63 - 1)
EXAMPLES: tuple[Message, ...] = (
    Generate(
        Request(
            "a",
            (1, 2, 201087),
            7,
            Sampling(0.5, 0.9, 7, 0.1, -1.0, 2.0, ((5, -100.0),), 2**63 - 1),
            (1007, 1002),
            3,
            9.5,
        )
    ),
    Generate(Request("b", (), 1)),
    Generate(
        Request("c", (1,), 1, constraint=Constraint((Section(((1, 2), (3,)), (4,), "{}", True),), (5, 6), 7)),
    ),
    Cancel("a"),
    Tokens(()),
    Tokens((Token("a", 5), Token("b", 201087, "stop"), Token("c", 0, "length"))),
    Tokens((Token("d", 3, None, -0.5, ((3, -0.5), (9, -2.25))), Token("e", -1, "deadline"))),
    Done("a", 0.5, 1.25, 3.0, 1000, 960, 17),
    Stats(1, 2, 300, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0.5, 0.25, 15, 16, 0.002, 0.0001, ("no CUDA graphs: why",)),
    Refused("a", "300 prompt tokens and max_tokens 1 exceed the context of 256"),
    Hello("rank", 3, 4711, "node-1"),
    Progress(0, 1 << 40, 1 << 41),
    Ready(
        1, "0123abcd", {"weights_bytes": 1 << 36, "read_bytes": 0}, {"decode_step_s": 0.01}, 1.5, ("slow",), ("a note",)
    ),
    Failed(0, "tensor x is short", "fetch it again", 2),
    Failed(1, "é 漢 \n two lines", "", 1, follows=True),
    Assigned("1.0", '{"digest": "0123abcd"}'),
    Leave(),
    Stop(),
)

ids = st.text(max_size=20)
counts = st.integers(0, 2**63 - 1)
small = st.integers(-(2**31), 2**31)
reals = st.floats(allow_nan=False)
biases = st.lists(st.tuples(small, reals), max_size=3).map(tuple)
samplings = st.builds(Sampling, reals, reals, small, reals, reals, reals, biases, counts)
token_ids = st.lists(small, max_size=3).map(tuple)
sections = st.builds(Section, st.lists(token_ids, max_size=2).map(tuple), token_ids, ids, st.booleans())
constraints = st.builds(Constraint, st.lists(sections, max_size=2).map(tuple), token_ids, st.none() | counts)
requests = st.builds(
    Request,
    ids,
    st.lists(small, max_size=30).map(tuple),
    small,
    samplings,
    token_ids,
    constraint=st.none() | constraints,
)
ends = st.sampled_from([None, "stop", "length", "deadline"])
tokens = st.builds(Token, ids, small, ends, st.none() | reals, biases)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Generate, requests),
    st.builds(Cancel, ids),
    st.builds(Tokens, st.lists(tokens, max_size=5).map(tuple)),
    st.builds(Refused, ids, ids),
    st.builds(Done, ids, reals, reals, reals, counts, counts, counts),
    st.builds(Stats, *[counts] * 14, *[reals] * 2, *[counts] * 2, *[reals] * 2, st.lists(ids, max_size=2).map(tuple)),
    st.builds(Hello, ids, small, small, ids),
    st.builds(Progress, small, counts, counts),
    st.builds(
        Ready, small, ids, st.dictionaries(ids, counts, max_size=4), st.dictionaries(ids, reals, max_size=4), reals
    ),
    st.builds(Failed, small, ids, ids, small, st.booleans()),
    st.builds(Assigned, ids, ids),
    st.builds(Leave),
    st.builds(Stop),
)


def decoded(pieces: Iterable[bytes]) -> list[Message]:
    decoder = Decoder()
    return [message for piece in pieces for message in decoder.feed(piece)]


def test_examples_are_of_every_type() -> None:
    assert {type(message) for message in EXAMPLES} == set(get_args(Message))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_type_survives_a_cut_at_any_byte(message: Message) -> None:
    data = encode(message)
    for cut in range(len(data) + 1):
        decoder = Decoder()
        before = list(decoder.feed(data[:cut]))
        assert before == ([message] if cut == len(data) else [])
        assert before + list(decoder.feed(data[cut:])) == [message]


@settings(deadline=None, max_examples=150)
@given(st.lists(messages, max_size=5), st.data())
def test_a_stream_survives_any_cuts(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    edges = [0, *cuts, len(stream)]
    assert decoded(stream[a:b] for a, b in zip(edges, edges[1:], strict=False)) == sent
    assert decoded(bytes([byte]) for byte in stream) == sent


def test_values_that_are_rebuilt_are_the_same_types() -> None:
    for message in decoded(map(encode, EXAMPLES[:6])):
        assert hash(message) is not None  # tuples all the way down, as frozen values must be


# --- junk


def accepts(data: bytes) -> bool:
    """Whether all of it was messages, or the beginning of one. Anything but a ValueError goes through."""
    try:
        found = decoded([data])
    except ValueError:
        return False
    assert all(isinstance(message, get_args(Message)) for message in found)
    return True


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from([kind.__name__ for kind in get_args(Message)])


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_bytes_of_no_meaning(data: bytes) -> None:
    accepts(data)


@settings(deadline=None, max_examples=300)
@given(values)
def test_values_that_are_no_message(value: object) -> None:
    accepts(msgpack.packb(value))


@settings(deadline=None, max_examples=300)
@given(NAMES, values | st.fixed_dictionaries({"request": values}))
def test_known_names_with_wrong_bodies(name: str, body: object) -> None:
    accepts(msgpack.packb([name, body]))


@settings(deadline=None, max_examples=300)
@given(messages, st.data())
def test_messages_with_a_byte_changed(message: Message, data: st.DataObject) -> None:
    stream = bytearray(encode(message))
    stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    accepts(bytes(stream))


@pytest.mark.parametrize(
    "junk",
    [
        b"\xc1",  # a byte that msgpack never uses
        b"\x05",
        b"GET / HTTP/1.1\r\n\r\n",
        msgpack.packb(["Nonsense", {}]),
        msgpack.packb(["Cancel", {}]),
        msgpack.packb(["Cancel", {"request_id": "a", "more": 1}]),
        msgpack.packb(["Cancel", ["a"]]),
        msgpack.packb(["Tokens", [["a"]]]),
        msgpack.packb(["Generate", {"request": {}}]),
        msgpack.packb([["Cancel"], {}]),
        msgpack.packb({1: 2}),
        b"\x91" * 5000,  # lists within lists
        b"\xdd\xff\xff\xff\xff",  # a list of 4 billion
    ],
    ids=lambda junk: repr(junk[:20]),
)
def test_plain_junk_is_refused(junk: bytes) -> None:
    assert not accepts(junk)


def test_more_than_a_message_may_have_is_refused() -> None:
    """A string of 4 GB, by and by."""
    decoder = Decoder()
    with pytest.raises(ValueError):
        list(decoder.feed(b"\xdb\xff\xff\xff\xff"))
        for _ in range((MESSAGE_LIMIT_BYTES >> 20) + 1):
            list(decoder.feed(bytes(1 << 20)))


def test_a_long_prompt_takes_no_longer_than_its_numbers() -> None:
    """The event loop that sends it stands still meanwhile, and all streams with it."""
    numbers = tuple(range(100_000, 150_000))

    def least_s(work: Callable[[], object]) -> float:
        took_s = []
        for _ in range(5):
            begun_s = time.thread_time()
            work()
            took_s.append(time.thread_time() - begun_s)
        return min(took_s)

    request = Generate(Request("a", numbers, 1))
    assert least_s(lambda: encode(request)) < 8 * least_s(lambda: msgpack.packb(numbers))

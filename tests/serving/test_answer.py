"""Stop strings, letter by letter, against the plain definition; and answers of any tokens at all."""

import random

import pytest
from gptoss_launch.launch.api.answer import Answer, Content, End, Reasoning, StopStrings
from gptoss_launch.launch.harmony import StreamParser


def cut(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("seed", range(200))
def test_stop_strings_as_defined(seed):
    draw = random.Random(seed)
    text = "".join(draw.choice("ab") for _ in range(30))
    stops = ["".join(draw.choice("ab") for _ in range(draw.randint(2, 7))) for _ in range(draw.randint(1, 3))]
    places = [text.find(stop) for stop in stops if stop in text]
    stream = StopStrings(stops)
    shown = "".join(stream.feed(part) for part in cut(text, draw.randint(1, 5)))
    shown += stream.flush()
    assert stream.hit == bool(places)
    if len(stops) == 1 or not places:
        assert shown == (text[: min(places)] if places else text)
    assert not any(stop in shown for stop in stops)


def test_only_what_may_still_stop_is_held_back():
    stream = StopStrings(["END"])
    fed = ("ab", "E", "N", "x", "EE", "ND", "more")
    assert [stream.feed(part) for part in fed] == ["ab", "", "", "ENx", "E", "", ""]
    assert stream.hit and stream.flush() == ""


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_make_an_answer(seed, tokenizer):
    draw = random.Random(seed)
    special = list(tokenizer.special.values())
    answer = Answer(StreamParser(tokenizer), ["e"], ["f"])
    pieces, count = [], 0
    while count < 200 and not answer.stopped:
        token = draw.choice(special) if draw.random() < 0.3 else draw.randrange(tokenizer.vocab_size)
        pieces += answer.feed(token)
        count += 1
    pieces += answer.finish("length")
    assert isinstance(pieces[-1], End) and pieces[-1].completion_tokens == count
    assert "e" not in "".join(piece.text for piece in pieces if isinstance(piece, Content))
    assert all(piece.text for piece in pieces if isinstance(piece, Content | Reasoning))

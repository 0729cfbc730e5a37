"""Answers of any tokens at all, as events: what they say together is the response, and the official types hold."""

import random

import pytest
from gptoss_launch.launch.api.answer import Answer
from gptoss_launch.launch.api.errors import ApiError
from gptoss_launch.launch.api.logprobs import chat_logprobs
from gptoss_launch.launch.api.responses_events import Draft, place_of_item
from gptoss_launch.launch.harmony import StreamParser
from openai.types.responses import Response

HEAD = {"id": "resp_1a", "object": "response", "created_at": 1, "background": False, "model": "tiny"}
HEAD |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
ENDS = ("response.completed", "response.incomplete", "response.failed")


def pieces_of_any_tokens(draw, tokenizer, count):
    special = list(tokenizer.special.values())
    header = [tokenizer.encode(word) for word in ("analysis", "commentary", "final", " to=functions.f", "assistant")]
    answer = Answer(StreamParser(tokenizer), ["e"] if draw.random() < 0.2 else [], ["f"], keep_tokens=True)
    for _ in range(count):
        way = draw.random()
        one = [draw.choice(special)] if way < 0.3 else [draw.randrange(tokenizer.vocab_size)]
        for token in draw.choice(header) if way > 0.8 else one:
            yield from answer.feed(token, -1.0)
            if answer.stopped:
                break
    yield from answer.finish(draw.choice(["stop", "length"]))


def told(events):
    """The output as someone who reads the events alone would put it together."""
    output = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(output)
            output.append({"id": event["item"]["id"], "type": event["item"]["type"], "text": "", "open": True})
        elif kind.endswith(".delta"):
            assert event["delta"] and output[-1]["open"] and event["item_id"] == output[-1]["id"]
            output[-1]["text"] += event["delta"]
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == output[-1]["id"]
            output[-1]["open"] = False
    return output


def text(item):
    return item["arguments"] if item["type"] == "function_call" else "".join(part["text"] for part in item["content"])


@pytest.mark.parametrize("seed", range(40))
def test_events_of_any_tokens_tell_the_response(seed, tokenizer):
    draw = random.Random(seed)
    draft = Draft(HEAD, 3, lambda tokens: chat_logprobs(tokens, tokenizer, 0))
    breaks = seed % 4 == 0
    events = [*draft.created(), *draft.started()]
    for piece in pieces_of_any_tokens(draw, tokenizer, 150):
        if breaks and len(events) > 60:
            break
        events += draft.feed(piece)
        assert draft.ended or draft.status == "in_progress"
    if not draft.ended:
        events += draft.failed(ApiError(503, "gone")) if seed % 8 else draft.cancelled()
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] in ENDS for event in events].count(True) == 1 and events[-1]["type"] in ENDS
    final = events[-1]["response"]
    Response.model_validate(final)
    assert final == draft.response and draft.ended
    parts = told(events)
    assert [(part["id"], part["type"], part["text"]) for part in parts] == [
        (item["id"], item["type"], text(item)) for item in final["output"]
    ]
    assert len({part["id"] for part in parts}) == len(parts)
    assert [place_of_item(part["id"]) for part in parts] == [("resp_1a", place) for place in range(len(parts))]
    cut = final["status"] in ("failed", "cancelled")
    assert not any(part["open"] for part in (parts[:-1] if cut else parts))
    statuses = [item["status"] for item in final["output"]]
    assert set(statuses[:-1]) <= {"completed"}
    assert statuses[-1:] in ([], ["completed"] if final["status"] == "completed" else ["incomplete"])


def test_ids_that_are_no_items():
    for id in ("", "msg", "msg_1a", "msg_1a_x", "msg_1a_in0", "x_1a_0", "msg_1a_0_0", "msg_1a_²", "resp_1a_0"):
        assert place_of_item(id) is None
    assert place_of_item("rs_1a_12") == ("resp_1a", 12)
    assert place_of_item("fc_1a_" + "9" * 5000)  # no item, and no crash

"""Bad harmony output through the whole of the HTTP application: never an error, nothing lost, each repair counted.

The streams are what models were seen to write (openai/harmony#38 #48 #60 #82, vllm#22519 #43408 #50690 #51977,
llama.cpp#21286 #25321 #27720, tenstorrent/vllm#386, tilesprivacy/tiles#145) and mutations of good ones: marks lost,
doubled, in the wrong place, and output cut short.
"""

import asyncio
import json
import re
from typing import Any

import pytest
from gptoss_launch.launch.harmony import REPAIRS
from scripted import Application, Scripted

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
Calls = list[tuple[str, str]]

ANSWER = "<|start|>assistant<|channel|>final<|message|>ok<|return|>"
CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
BEFORE = " to=functions.f<|channel|>commentary<|message|>{}<|call|>"

# stream: (content, reasoning, calls, finish_reason, repairs by kind). The engine says "length" after the last token.
BAD: dict[str, tuple[str, str, Calls, str, dict[str, int]]] = {
    "<|channel|>commentary ––commentary<|message|>x<|end|>": ("––commentaryx", "", [], "length", {"header": 1}),
    "<|channel|>analysis<|message|>a<|end|>–– commentary<|channel|>final<|message|>b<|return|>": (
        "–– commentaryb",
        "a",
        [],
        "stop",
        {"no_start": 1, "no_author": 1},
    ),
    "<|channel|><|message|>x<|end|>" + ANSWER: ("xok", "", [], "stop", {"no_channel": 1}),
    "<|start|>" + ANSWER: ("ok", "", [], "stop", {"nothing_to_end": 2}),
    "<|channel|>analysis<|message|>a<|end|>364" + ANSWER: ("364ok", "a", [], "stop", {"no_start": 1, "no_message": 1}),
    "<|channel|>final<|message|>ok<|end|><|return|>": ("ok", "", [], "stop", {"nothing_to_end": 1}),
    "<|channel|>analysis<|message|>a<|end|><|message|>b<|return|>": (
        "b",
        "a",
        [],
        "stop",
        {"no_start": 1, "no_author": 1},
    ),
    " to=functions.f<|channel|>commentary to=functions.f json<|message|>{}<|call|>": (
        "",
        "",
        [("f", "{}")],
        "tool_calls",
        {},
    ),
    "<|start|>assistantassistant<|channel|>final<|message|>ok<|return|>": (
        "ok",
        "",
        [],
        "stop",
        {"nothing_to_end": 1, "header": 1},
    ),
    "<|channel|>commentary to=functions.f <|constrain|>f: edit file.<|end|>" + ANSWER: (
        "ok",
        "",
        [("f", "f: edit file.")],
        "tool_calls",
        {"no_message": 1},
    ),
    "<|start|>bash<|channel|>final<|message|>x<|end|>": (
        "bashx",
        "",
        [],
        "length",
        {"nothing_to_end": 1, "no_author": 1},
    ),
    "<|channel|>??<|end|>" + ANSWER: ("??ok", "", [], "stop", {"no_message": 1}),
    "<|channel|>commentary 2?<|end|>" + ANSWER: ("2?ok", "", [], "stop", {"no_message": 1}),
    "<|channel|>commentary?commentary?<|message|>x<|end|>": ("?commentary?x", "", [], "length", {"header": 1}),
    "<|channel|>commentary to=assistant<|channel|>commentary?<|message|>x<|end|>": (
        "",
        "?x",
        [],
        "length",
        {"header": 1},
    ),
    "<|channel|>We should answer this with care<|end|>" + ANSWER: (
        "We should answer this with careok",
        "",
        [],
        "stop",
        {"no_message": 1},
    ),
    "<|channel|>final__HANDOFF__<|return|>": ("__HANDOFF__", "", [], "stop", {"no_message": 1}),
    '{"a": 1}<|return|>': ('{"a": 1}', "", [], "stop", {"no_message": 1}),
    "assistant is here<|return|>": ("assistant is here", "", [], "stop", {"no_message": 1}),
    "<|channel|>analysis<|message|>a<|channel|>final<|message|>ok<|return|>": ("ok", "a", [], "stop", {"no_end": 1}),
    "<|channel|>analysis<|message|>a" + ANSWER: ("ok", "a", [], "stop", {"no_end": 1}),
    "<|channel|>final<|message|>o<|constrain|><|message|>k<|return|>": ("ok", "", [], "stop", {"stray_token": 2}),
    "<|channel|>commentary to=functions.f<|call|>": ("", "", [("f", "")], "tool_calls", {"no_message": 1}),
    '<|channel|>commentary to=functions.f{"a": 1}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {"no_message": 1},
    ),
    "<|channel|>commentary functions.f json<|message|>{}<|call|>": ("", "", [("f", "{}")], "tool_calls", {"header": 1}),
    "<|channel|>analysis code<|message|>1 + 1<|end|>": ("", "1 + 1", [], "length", {"header": 1}),
    "<|start|>assistantfinal<|message|>ok<|return|>": ("ok", "", [], "stop", {"nothing_to_end": 1, "header": 1}),
    "<|channel|>thoughts<|channel|>final<|message|>ok<|return|>": ("thoughtsok", "", [], "stop", {"header": 1}),
    "<|end|><|end|>" + ANSWER: ("ok", "", [], "stop", {"nothing_to_end": 2}),
    ' to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {},
    ),
    CALL + '{"a": 1}<|call|>': ("", "", [("f", '{"a": 1}')], "tool_calls", {}),
    '<|channel|>commentary to=functions.f<|constrain|>json<|message|>{"a": 1}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {},
    ),
    '<|channel|>commentary to=functions.f json<|message|>{"a": 1}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {},
    ),
    '<|channel|>commentary to=functions.f code<|message|>{"a": 1}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {},
    ),
    '<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>': ("", "", [("f", '{"a": 1}')], "tool_calls", {}),
    '<|channel|>analysis to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {},
    ),
    '<|channel|>final to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {"recipient": 1},
    ),
    ' to=functions.f<|message|>{"a": 1}<|call|>': ("", "", [("f", '{"a": 1}')], "tool_calls", {"no_channel": 1}),
    ' to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {"no_channel": 1},
    ),
    ' to=f<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {"recipient": 1},
    ),
    '<|channel|>commentary to=f <|constrain|>json<|message|>{"a": 1}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {"recipient": 1},
    ),
    '<|channel|>commentary to=functions.functions.f <|constrain|>json<|message|>{"a": 1}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {"recipient": 1},
    ),
    '<|channel|>commentary to=functions.g <|constrain|>json<|message|>{"a": 1}<|call|>': (
        "",
        '{"a": 1}',
        [],
        "stop",
        {"not_offered": 1},
    ),
    "<|channel|>commentary to=python code<|message|>1 + 1<|call|>": ("", "1 + 1", [], "stop", {}),
    '<|channel|>commentary to=functions. <|constrain|>json<|message|>{"a": 1}<|call|>': (
        "",
        '{"a": 1}',
        [],
        "stop",
        {"not_offered": 1},
    ),
    '<|channel|>commentary to= <|constrain|>json<|message|>{"a": 1}<|call|>': ('{"a": 1}', "", [], "stop", {}),
    CALL + '{"a": 1}<|end|>': ("", "", [("f", '{"a": 1}')], "length", {}),
    CALL + '{"a": 1}<|return|>': ("", "", [("f", '{"a": 1}')], "tool_calls", {}),
    CALL + '{"a": ': ("", "", [("f", '{"a": ')], "length", {}),
    CALL + "": ("", "", [("f", "")], "length", {}),
    "<|channel|>commentary to=functions.f <|constrain|>json": ("", "", [], "length", {}),
    "<|channel|>commentary to=functions.": ("", "", [], "length", {}),
    CALL + '{"a": 1}' + ANSWER: ("ok", "", [("f", '{"a": 1}')], "tool_calls", {"no_end": 1}),
    CALL + '{"a": 1}<|call|><|start|>assistant<|channel|>commentary to=functions.f json<|message|>{}<|call|>': (
        "",
        "",
        [("f", '{"a": 1}')],
        "tool_calls",
        {},
    ),
    CALL + "{}<|end|><|start|>assistant" + CALL + '{"b": 2}<|call|>': (
        "",
        "",
        [("f", "{}"), ("f", '{"b": 2}')],
        "tool_calls",
        {},
    ),
    "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + BEFORE: (
        "I look.",
        "",
        [("f", "{}")],
        "tool_calls",
        {},
    ),
    "<|channel|>commentary<|message|>I look.<|end|> to=functions.f<|channel|>commentary<|message|>{}<|call|>": (
        "I look.",
        "",
        [("f", "{}")],
        "tool_calls",
        {"no_start": 1, "no_author": 1},
    ),
    "<|channel|>final to=user<|message|>ok<|return|>": ("ok", "", [], "stop", {"recipient": 1}),
    " to=user<|channel|>final<|message|>ok<|return|>": ("ok", "", [], "stop", {"recipient": 1}),
    '<|channel|>final json<|message|>{"a": 1}<|return|>': ('{"a": 1}', "", [], "stop", {"header": 1}),
    '<|channel|>final <|constrain|>json<|message|>{"a": 1}<|return|>': ('{"a": 1}', "", [], "stop", {}),
    "<|channel|>answer<|message|>ok<|return|>": ("ok", "", [], "stop", {"unknown_channel": 1}),
    "<|channel|>Final<|message|>ok<|return|>": ("ok", "", [], "stop", {"unknown_channel": 1}),
    "<|message|>ok<|return|>": ("ok", "", [], "stop", {"no_channel": 1}),
    "<|channel|>final<|message|>ok": ("ok", "", [], "length", {}),
    "<|channel|>final<|message|>": ("", "", [], "length", {}),
    "<|channel|>final": ("", "", [], "length", {}),
    "<|channel|>fin": ("", "", [], "length", {}),
    "<|channel|>": ("", "", [], "length", {}),
    "<|channel|>analysis<|message|>a": ("", "a", [], "length", {}),
    "<|channel|>analysis<|message|>a<|end|>": ("", "a", [], "length", {}),
    "<|channel|>analysis<|message|>a<|end|><|start|>": ("", "a", [], "length", {}),
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant": ("", "a", [], "length", {}),
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>": ("", "a", [], "length", {}),
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final": ("", "a", [], "length", {}),
    "<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>ok<|return|>": (
        "ok",
        "a",
        [],
        "stop",
        {"no_start": 1, "no_author": 1},
    ),
    "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>ok<|return|>": (
        "ok",
        "a",
        [],
        "stop",
        {"no_start": 1},
    ),
    "<|channel|>analysis<|message|>a<|message|>b<|end|>" + ANSWER: ("ok", "ab", [], "stop", {"stray_token": 1}),
    "<|channel|>analysis a<|end|>" + ANSWER: ("ok", "a", [], "stop", {"no_message": 1}),
    "<|channel|>analysis<|message|>a<|end|><|start|>user<|message|>hm<|end|>" + ANSWER: ("hmok", "a", [], "stop", {}),
    "<|channel|>analysis<|message|>a<|end|><|start|>system<|channel|>final<|message|>ok<|return|>": (
        "ok",
        "a",
        [],
        "stop",
        {},
    ),
    "<|channel|>analysis<|channel|>analysis<|message|>a<|end|>" + ANSWER: ("ok", "a", [], "stop", {"header": 1}),
    "<|channel|>final<|message|><|message|>ok<|return|>": ("ok", "", [], "stop", {"stray_token": 1}),
    "<|channel|>final<|message|>ok<|channel|>": ("ok", "", [], "length", {"no_end": 1}),
    "<|channel|>final<|message|>ok<|start|>": ("ok", "", [], "length", {"no_end": 1}),
    '<|constrain|>json<|message|>{"a": 1}<|return|>': ('{"a": 1}', "", [], "stop", {"no_channel": 1}),
    "<|constrain|>final<|message|>ok<|return|>": ("ok", "", [], "stop", {"no_channel": 1}),
    "<|start|>assistant<|message|>ok<|return|>": ("ok", "", [], "stop", {"nothing_to_end": 1, "no_channel": 1}),
    "<|start|>final<|message|>ok<|return|>": ("ok", "", [], "stop", {"nothing_to_end": 1, "no_author": 1}),
    "<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>": (
        "ab",
        "",
        [],
        "stop",
        {},
    ),
    "<|channel|>commentary": ("", "", [], "length", {}),
    "Hello, world": ("Hello, world", "", [], "length", {"no_message": 1}),
    "<|return|>": ("", "", [], "stop", {"nothing_to_end": 1}),
    "<|call|>": ("", "", [], "stop", {"nothing_to_end": 1}),
    "<|endoftext|>": ("", "", [], "stop", {"nothing_to_end": 1}),
    "<|channel|>final<|message|>ok<|endoftext|>": ("ok", "", [], "stop", {}),
    "<|channel|>finalok<|return|>": ("ok", "", [], "stop", {"no_message": 1}),
    "<|channel|>analysisfinal<|message|>ok<|return|>": ("", "ok", [], "stop", {"header": 1}),
}


def said(choice: dict) -> tuple[str, str, Calls, str]:
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message["content"] or "", message["reasoning"] or "", calls, choice["finish_reason"]


def collected(text: str) -> tuple[str, str, Calls, str | None]:
    """The same from the events of a stream, which must end as it should."""
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    content, reasoning, reason = "", "", None
    calls: list[list[str]] = []
    for event in events[:-2]:
        [choice] = json.loads(event.removeprefix("data: "))["choices"]
        assert reason is None, "something after the end"
        delta, reason = choice["delta"], choice["finish_reason"]
        content += delta.get("content") or ""
        reasoning += delta.get("reasoning") or ""
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                assert part["index"] == len(calls)
                calls.append([part["function"]["name"], ""])
            calls[part["index"]][1] += part["function"]["arguments"]
    return content, reasoning, [(name, arguments) for name, arguments in calls], reason


@pytest.fixture(scope="module")
def application(tokenizer):
    return Application(Scripted([]), tokenizer)


def ask(application: Application, script: list[int], **fields: object) -> tuple[Any, dict[str, float]]:
    """(the response, the repairs that it added to /metrics)"""

    async def send() -> tuple[Any, dict[str, float]]:
        async with application.client() as client:
            before = counted((await client.get("/metrics")).text)
            answer = await client.post("/v1/chat/completions", json=BODY | fields)
            after = counted((await client.get("/metrics")).text)
        return answer, {kind: after[kind] - before.get(kind, 0) for kind in after if after[kind] != before.get(kind)}

    application.engine.script = script
    return asyncio.run(send())


def counted(metrics: str) -> dict[str, float]:
    rows = re.findall(r'harmony_repairs_total{kind="(.*?)",model_name="tiny",replica="0"} (.*)', metrics)
    return {kind: float(count) for kind, count in rows}


@pytest.mark.parametrize("stream", BAD)
def test_bad_output_is_delivered_and_counted(stream, application, markup):
    *wanted, repairs = BAD[stream]
    answer, counts = ask(application, markup(stream))
    assert answer.status_code == 200
    assert list(said(answer.json()["choices"][0])) == wanted
    assert counts == repairs
    answer, counts = ask(application, markup(stream), stream=True)
    assert list(collected(answer.text)) == wanted
    assert counts == repairs


def test_the_table_holds_every_kind_of_repair():
    assert len(BAD) >= 60
    told = {kind for *_, repairs in BAD.values() for kind in repairs}
    assert told == REPAIRS.keys() - {"unknown_id"}  # no text spells an id that is in no vocabulary: the test below


def test_ids_of_no_vocabulary_are_dropped_and_counted(application, markup):
    head, tail = markup("<|channel|>final<|message|>o"), markup("k<|return|>")
    answer, counts = ask(application, [*head, 10**6, *tail])
    assert said(answer.json()["choices"][0]) == ("ok", "", [], "stop") and counts == {"unknown_id": 1}

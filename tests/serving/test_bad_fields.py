"""Every field of every route with a wrong type, range or size: 400 in OpenAI's error shape, naming the field."""

import asyncio
import json

import pytest
from gptoss_launch.launch.api.app import create_app
from gptoss_launch.launch.api.completions import CompletionRequest
from gptoss_launch.launch.api.schema import ChatRequest
from gptoss_launch.launch.api.tokens import DetokenizeRequest, TokenizeRequest
from in_process import DrawingEngine, exchange, served

NO_NUMBER = ["1", True, [], {}, [1]]
NO_INTEGER = [*NO_NUMBER, 0.5, 10**30, -(10**30)]
NO_TRUTH = ["true", 0, 1, [], {}]
NO_TEXT = [1, True, {}, 0.5]
NO_IDS = ["1", 1, {}, [-1], [2**31], [1.0], ["1"], [True], [None], [[]], [10**30], [2000]]
ODD = [float("nan"), float("inf"), 1e999]
HELLO = {"role": "user", "content": "x"}

# field: values that it may not have. A field of two routes has the same ones.
WRONG = {
    "model": [*NO_TEXT, [], "gpt-4", None, ""],
    "stream": [*NO_TRUTH],
    "stream_options": [1, "x", [], {"include_usage": 1}, {"usage": True}, {}],  # {}: without stream
    "n": [*NO_INTEGER, 0, -1, 129],
    "max_tokens": [*NO_INTEGER, 0, -1, 5000],
    "stop": [1, True, {}, "", ["a", ""], [1], [["a"]], [None], ["x"] * 17, "x" * 1001],
    "stop_token_ids": [*NO_IDS, [1] * 65],
    "seed": [*NO_INTEGER, 2**63, -(2**63) - 1],
    "temperature": [*NO_NUMBER, *ODD, -0.1, 2.1],
    "top_p": [*NO_NUMBER, *ODD, 0, -0.5, 1.5],
    "top_k": [*NO_INTEGER, -2, 1025],
    "min_p": [*NO_NUMBER, *ODD, -0.1, 1.1],
    "presence_penalty": [*NO_NUMBER, *ODD, -2.1, 2.1],
    "frequency_penalty": [*NO_NUMBER, *ODD, -2.1, 2.1],
    "repetition_penalty": [*NO_NUMBER, *ODD, 0, -1, 0.09, 10.1],
    "logit_bias": [
        *(1, "x", [], [[1, 1]], {"a": 1}, {"-1": 1}, {"1.0": 1}, {"01": 1}, {"": 1}, {"2000": 1}, {"99999999999": 1}),
        *({"1": "1"}, {"1": None}, {"1": 101}, {"1": -101}, {"1": float("nan")}, {str(i): 1 for i in range(301)}),
    ],
    "deadline_s": [*NO_NUMBER, *ODD, 0, -1],
    "user": [*NO_TEXT, [], "x" * 513],
    "safety_identifier": [*NO_TEXT, [], "x" * 513],
    "prompt_cache_key": [*NO_TEXT, [], "x" * 513],
    "metadata": [1, "x", [], {"a": 1}, {"a": "x" * 513}, {"x" * 65: "a"}, {str(i): "" for i in range(17)}],
    "store": [*NO_TRUTH, True],
    "service_tier": [*NO_TEXT, [], "flex"],
    # chat
    "messages": [
        *(1, "x", {}, None, [], [1], [None], [[]], [{}], [{"role": "user"}], [{"role": "robot", "content": "x"}]),
        *([{"role": "user", "content": 1}], [{"role": "user", "content": [1]}], [HELLO | {"colour": "red"}]),
        *([HELLO] * 20 + [1], [{"role": "tool", "content": "x", "tool_call_id": "y"}], [HELLO | {"content": None}]),
        *([{"role": "assistant", "tool_calls": [1]}], [{"role": "assistant", "refusal": "no"}]),
        [{"role": "user", "content": "word " * 3000}],
    ],
    "max_completion_tokens": [*NO_INTEGER, 0, -1, 5000],
    "logprobs": {"chat": [*NO_TRUTH, 3], "text": [*NO_INTEGER, -1, 21]},
    "top_logprobs": [*NO_INTEGER, -1, 21, 5],  # 5: without logprobs
    "reasoning_effort": [*NO_TEXT, [], "minimal", "none", ""],
    "tools": [
        *(1, "x", {}, [1], [{}], [{"type": "web_search"}], [{"type": "code_interpreter"}], [{"type": ["mcp"]}]),
        *([{"type": "mcp"}], [{"type": "function", "function": {"name": "a b"}}]),
    ],
    "tool_choice": [1, True, [], "x", "required", {}, {"type": "function", "function": {"name": "x"}}],
    "response_format": [
        *(1, "json", [], {}, {"type": "xml"}, {"type": "json_object", "strict": True}, {"type": "json_schema"}),
        *(
            {"type": "json_schema", "json_schema": value}
            for value in (1, {}, {"name": "a b"}, {"name": "a", "schema": 1})
        ),
        {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "robot"}}},
    ],
    "max_reasoning_tokens": [*NO_INTEGER, -1],
    "max_tool_calls": [*NO_INTEGER, 0, -1, 2**31],
    "parallel_tool_calls": [*NO_TRUTH],
    "modalities": [1, "text", ["audio"], [1], {}],
    **{
        name: [1, "x", True, [], {}, {"a": 1}]
        for name in ("functions", "function_call", "audio", "prediction", "web_search_options", "verbosity", "suffix")
    },
    # text
    "prompt": [
        *(1, True, {}, None, "", [], [""], [[]], [[1], []], ["a", 1], [1, "a"], [-1], [2**31], [2000], [1.5], [True]),
        *([[2000]], [[1], [2000]], [None], ["a"] * 129, "word " * 3000, [1] * 3000, [[1], [1] * 3000]),
    ],
    "echo": [*NO_TRUTH],
    "ignore_eos": [*NO_TRUTH],
    "best_of": [*NO_INTEGER, 0, 2],
    # tokens
    "tokens": [*NO_IDS, None],
    "add_generation_prompt": [*NO_TRUTH],
    "add_special_tokens": [*NO_TRUTH],
    "return_token_strs": [*NO_TRUTH],
}
ROUTES = {
    "/v1/chat/completions": ("chat", ChatRequest, {"model": "tiny", "messages": [HELLO]}),
    "/v1/completions": ("text", CompletionRequest, {"model": "tiny", "prompt": "x"}),
    "/tokenize": ("tokens", TokenizeRequest, {"messages": [HELLO]}),
    "/detokenize": ("tokens", DetokenizeRequest, {"tokens": [1]}),
}
# What is wrong elsewhere alone: these routes need no model, take any text, and have no context to exceed.
RIGHT = {
    "/tokenize": {"model": (None,), "prompt": (None, ""), "messages": (None, WRONG["messages"][-1])},
    "/detokenize": {"model": (None,)},
}
UNKNOWN = ("temperatur", "min_tokens", "best_off", "x" * 200, "", "a.b", "ünï", "__class__", "model ")


def cases(path):
    kind, schema, body = ROUTES[path]
    for field in schema.model_fields:
        values = WRONG[field][kind] if isinstance(WRONG[field], dict) else WRONG[field]
        for value in values:
            if not any(value == one for one in RIGHT.get(path, {}).get(field, ())):
                yield field, body | {field: value}


@pytest.mark.parametrize("path", ROUTES)
def test_every_field(tokenizer, path):
    engine = DrawingEngine(1000)
    app = create_app(served(tokenizer, engine))

    async def check():
        count = 0
        for field, body in cases(path):
            got = await exchange(app, "POST", path, json.dumps(body).encode())
            shown = f"{field}: {json.dumps(body[field])[:80]}"
            assert got.status == (404 if body.get("model") in ("gpt-4", "") else 400), f"{shown}: {got.body[:300]}"
            error = got.error
            assert error.keys() == {"message", "type", "param", "code"}, shown
            assert error["param"] is not None and error["param"].split(".")[0] == field, f"{shown}: {error}"
            assert field in error["message"], f"{shown}: {error}"
            count += 1
        for name in UNKNOWN:
            got = await exchange(app, "POST", path, json.dumps(ROUTES[path][2] | {name: 1}).encode())
            assert (got.status, got.error["code"]) == (400, "unsupported_field"), name
            assert got.error["param"] == name[:100]
        return count

    assert asyncio.run(check()) > 10
    assert not engine.asked


def test_fields_that_do_not_go_together(tokenizer):
    engine = DrawingEngine(1000)
    app = create_app(served(tokenizer, engine))
    chat, text, talk = (ROUTES[path][2] for path in list(ROUTES)[:3])

    async def check():
        for path, body, param in (
            ("/v1/chat/completions", chat | {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
            ("/v1/chat/completions", chat | {"logprobs": False, "top_logprobs": 0}, "top_logprobs"),
            ("/v1/completions", text | {"echo": True, "logprobs": 0, "prompt": [*range(1024)] * 2}, "prompt"),
            ("/v1/completions", text | {"n": 2, "best_of": 1}, "best_of"),
            ("/v1/completions", text | {"n": 100, "prompt": ["a", "b"]}, "prompt"),
            ("/v1/completions", text | {"stream": False, "stream_options": {}}, "stream_options"),
            ("/tokenize", talk | {"prompt": "x"}, "prompt"),
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "x", "tools": []}, "tools"),
            ("/tokenize", {"prompt": "x", "reasoning_effort": "low"}, "reasoning_effort"),
            ("/detokenize", {}, "tokens"),
        ):
            got = await exchange(app, "POST", path, json.dumps(body).encode())
            assert (got.status, got.error["param"]) == (400, param), body

    asyncio.run(check())
    assert not engine.asked


HUGE = {
    "digits": b'{"model": ' + b"1" * 100_000 + b"}",
    "depth": b'{"tools": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "depth of objects": b'{"model": "tiny", "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    "unknown names": json.dumps({str(i): 1 for i in range(50_000)}).encode(),
    "unknown names within": json.dumps({"messages": [{"role": "user"} | {str(i): 1 for i in range(20_000)}]}).encode(),
    "wrong entries": b'{"messages": [' + b"1," * 300_000 + b"1]}",
    "wrong parts": b'{"messages": [{"role": "user", "content": [' + b"1," * 200_000 + b"1]}]}",
    "wrong prompts": b'{"prompt": [' + b"[]," * 10_000 + b"[]]}",
    "biases": json.dumps({"logit_bias": {str(i): "x" for i in range(20_000)}}).encode(),
    "surrogates": b'{"model": "\\ud800", "messages": []}',
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "nothing": b"",
    "null": b"null",
}


@pytest.mark.parametrize("name", HUGE)
def test_large_and_odd_bodies_are_refused_at_once(tokenizer, name):
    engine = DrawingEngine(1000)
    app = create_app(served(tokenizer, engine))

    async def check():
        for path in ROUTES:
            got = await exchange(app, "POST", path, HUGE[name])
            assert got.status == 400 and len(got.body) < 2000, (path, got.body[:300])
            assert got.error["type"] == "invalid_request_error"

    asyncio.run(check())
    assert not engine.asked


def test_a_long_name_is_not_said_back(tokenizer):
    app = create_app(served(tokenizer, DrawingEngine(1000)))

    async def check():
        for path in ROUTES:
            body = json.dumps(ROUTES[path][2] | {"model": "x" * 100_000}).encode()
            got = await exchange(app, "POST", path, body)
            assert (got.status, got.error["param"]) == (404, "model") and len(got.body) < 1000

    asyncio.run(check())

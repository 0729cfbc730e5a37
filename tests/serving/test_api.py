"""The routes in process, with a scripted engine: the official client, and every bad input."""

import asyncio
import json

import openai
import pytest
from gptoss_launch.launch.api.replicas import REQUEST_LIMIT
from gptoss_launch.launch.engine_client import EngineDiedError
from gptoss_launch.parallel.engine.request import Token
from gptoss_launch.parallel.errors import UserError
from in_process import HELLO, Call, ScriptedEngine, TellingEngine, served

BODY = {"model": "tiny", "messages": HELLO}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def serving(tokenizer):
    """serving(script, **Served's fields) -> (engine, call)."""

    def make(script=(), engine=None, others=(), **fields):
        engine = engine or ScriptedEngine(list(script))
        return engine, Call(served(tokenizer, engine, *others, **fields))

    return make


THINKS = "<|channel|>analysis<|message|>Let me think<|end|><|start|>assistant"
ANSWERS = "<|channel|>final<|message|>Hello, world<|return|>"
CALLS = (
    "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather"
    ' <|constrain|>json<|message|>{"city": "Bern"}<|call|>'
)


def test_plain(serving, markup):
    engine, call = serving(markup(THINKS + ANSWERS))
    answer = call.chat(reasoning_effort="high", seed=7, top_p=0.5)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Hello, world",) + ("Let me think",) * 2
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage.completion_tokens == len(markup(THINKS + ANSWERS))
    assert usage.completion_tokens_details.reasoning_tokens == len(markup("Let me think")) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    [asked] = engine.asked
    assert (asked.sampling.seed, asked.sampling.top_p, asked.sampling.temperature) == (7, 0.5, 1.0)
    assert asked.max_tokens == 2048 - usage.prompt_tokens == 2048 - len(asked.prompt_tokens)
    assert engine.cancelled == []


def test_streamed(serving, markup):
    _, call = serving(markup(THINKS + ANSWERS))
    chunks = call.chat(stream=True, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Hello, world"
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "Let me think"
    assert len({chunk.id for chunk in chunks}) == 1
    assert deltas[0].role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(markup(THINKS + ANSWERS))
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("strict", [False, True])
def test_the_typed_stream_of_the_official_client(serving, markup, strict):
    """It raises for what is not in the order or of the types that it knows. strict: it parses the arguments, too; else
    log probabilities come along."""
    parameters = WEATHER["function"]["parameters"] | {"additionalProperties": False}
    weather = {"type": "function", "function": {"name": "get_weather", "parameters": parameters, "strict": strict}}
    script = markup(THINKS + CALLS)
    _, call = serving(engine=ScriptedEngine(script) if strict else TellingEngine(script))

    async def work(client):
        asked = {"model": "tiny", "messages": HELLO, "tools": [weather], "logprobs": not strict}
        async with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
            return [event async for event in stream], await stream.get_final_completion()

    events, whole = call.ask(work)
    [one] = whole.choices[0].message.tool_calls
    assert one.function.arguments == '{"city": "Bern"}' and whole.choices[0].finish_reason == "tool_calls"
    assert one.function.parsed_arguments == ({"city": "Bern"} if strict else None)
    kinds = {event.type for event in events}
    assert {"chunk", "content.delta", "content.done", "tool_calls.function.arguments.done"} <= kinds
    assert ("logprobs.content.done" in kinds) == (not strict)
    assert whole.usage.completion_tokens == len(script)


def test_events_as_they_are_on_the_wire(serving, markup):
    _, call = serving(markup(ANSWERS))
    answer = call("POST", "/v1/chat/completions", json=BODY | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    assert all("usage" not in json.loads(event[6:]) for event in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(serving, markup, stream):
    _, call = serving(markup(CALLS))
    answer = call.chat(tools=[WEATHER], stream=stream)
    if stream:
        deltas = [chunk.choices[0].delta for chunk in answer]
        parts = [part for delta in deltas for part in delta.tool_calls or ()]
        assert parts[0].id.startswith("call_") and all(part.index == 0 for part in parts)
        name, arguments = parts[0].function.name, "".join(part.function.arguments for part in parts)
        content, reason = "".join(delta.content or "" for delta in deltas), answer[-1].choices[0].finish_reason
    else:
        message = answer.choices[0].message
        [one] = message.tool_calls
        name, arguments, content = one.function.name, one.function.arguments, message.content
        reason = answer.choices[0].finish_reason
    assert (name, arguments, content, reason) == ("get_weather", '{"city": "Bern"}', "I look.", "tool_calls")


def test_a_tool_result_goes_back(serving, markup, tokenizer):
    engine, call = serving(markup(CALLS))
    first = call.chat(tools=[WEATHER]).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "rain"}
    call.chat(messages=[*HELLO, first.model_dump(), result], tools=[WEATHER])
    prompt = tokenizer.decode(engine.asked[1].prompt_tokens)
    assert prompt.endswith(
        "<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
        ' to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{"city": "Bern"}<|call|>'
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>rain<|end|><|start|>assistant"
    )


def test_functions_that_were_not_offered_are_not_called(serving, markup):
    _, call = serving(markup(CALLS))
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = call.chat(**fields).choices[0]
        assert choice.message.tool_calls is None and choice.finish_reason == "stop"


def test_roles_and_parts_become_a_conversation(serving, markup, tokenizer):
    engine, call = serving(markup(ANSWERS))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "<|end|>"},
        {"role": "assistant", "content": "Yes", "reasoning_content": "old thoughts"},
        {"role": "system", "content": "Now rhyme."},
        {"role": "user", "content": "Go"},
    ]
    call.chat(messages=messages, reasoning_effort="low")
    ids = engine.asked[0].prompt_tokens
    prompt = tokenizer.decode(ids)
    assert "Reasoning: low" in prompt and "old thoughts" not in prompt
    assert "<|start|>developer<|message|># Instructions\n\nBe brief.\n\nBe kind.<|end|>" in prompt
    assert "<|start|>developer<|message|># Instructions\n\nNow rhyme.<|end|><|start|>user<|message|>Go<|end|>" in prompt
    assert ids.count(tokenizer.special["<|end|>"]) == prompt.count("<|end|>") - 1  # the user's is text


@pytest.mark.parametrize(
    "stop, said", [("lo, w", "Hel"), (["nothing", ", "], "Hello"), (["world!"], "Hello, world"), ("H", "")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(serving, markup, stop, said, stream):
    engine, call = serving(markup(THINKS + ANSWERS))
    answer = call.chat(stop=stop, stream=stream)
    if stream:
        content = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        reason = answer[-1].choices[0].finish_reason
    else:
        content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (content, reason) == (said, "stop")
    assert len(engine.cancelled) == (said != "Hello, world")


def test_length(serving, markup):
    _, call = serving(markup(THINKS + ANSWERS))
    answer = call.chat(max_completion_tokens=4)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 4


BAD = {
    "no JSON": (b"{", None),
    "not an object": (b"[1]", None),
    "no UTF-8": (b'{"model": "\xff"}', None),
    "deep": (b'{"model": ' + b"[" * 100_000, None),
    "no model": ({"messages": HELLO}, "model"),
    "no messages": ({"model": "tiny"}, "messages"),
    "empty messages": (BODY | {"messages": []}, "messages"),
    "messages is text": (BODY | {"messages": "hi"}, "messages"),
    "unknown role": (BODY | {"messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
    "no content": (BODY | {"messages": [{"role": "user"}]}, "messages.0.content"),
    "picture": (
        BODY | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.image_url",
    ),
    "unknown field": (BODY | {"temperatur": 1}, "temperatur"),
    "unsupported field": (BODY | {"prediction": {}}, "prediction"),
    "temperature is text": (BODY | {"temperature": "1"}, "temperature"),
    "temperature is negative": (BODY | {"temperature": -1}, "temperature"),
    "temperature is no number": (json.dumps(BODY | {"temperature": float("nan")}).encode(), "temperature"),
    "max_tokens is a float": (BODY | {"max_tokens": 1.5}, "max_tokens"),
    "max_tokens is a truth": (BODY | {"max_tokens": True}, "max_tokens"),
    "max_tokens is 0": (BODY | {"max_tokens": 0}, "max_tokens"),
    "both maxima": (BODY | {"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    "maximum over the context": (BODY | {"max_completion_tokens": 2048}, "max_completion_tokens"),
    "seed is too large": (BODY | {"seed": 2**63}, "seed"),
    "stop is a number": (BODY | {"stop": 3}, "stop"),
    "stop is empty": (BODY | {"stop": [""]}, "stop.0"),
    "stop holds a number": (BODY | {"stop": ["a", 1]}, "stop.1"),
    "stream is text": (BODY | {"stream": "yes"}, "stream"),
    "stream_options without stream": (BODY | {"stream_options": {"include_usage": True}}, "stream_options"),
    "deadline is zero": (BODY | {"deadline_s": 0}, "deadline_s"),
    "deadline is text": (BODY | {"deadline_s": "1"}, "deadline_s"),
    "no such effort": (BODY | {"reasoning_effort": "minimal"}, "reasoning_effort"),
    "forced call of no tool": (BODY | {"tool_choice": "required"}, "tool_choice"),
    "tool name": (
        BODY | {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools.0.function.name",
    ),
    "answer to no call": (
        BODY | {"messages": [*HELLO, {"role": "tool", "tool_call_id": "x", "content": "y"}]},
        "messages.1.tool_call_id",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(serving, name):
    body, param = BAD[name]
    engine, call = serving()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = call("POST", "/v1/chat/completions", content=content)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param and (param is None or param in error["message"])
    assert error["type"] == "invalid_request_error" and engine.asked == []


def test_a_lone_surrogate_is_no_crash(serving, markup):
    _, call = serving(markup(ANSWERS))
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "a\\ud800b"}]}'
    assert call("POST", "/v1/chat/completions", content=body).status_code in (200, 400)


def test_a_prompt_longer_than_the_context(serving):
    engine, call = serving()
    messages = [{"role": "user", "content": "word " * 3000}]
    answer = call("POST", "/v1/chat/completions", json={"model": "tiny", "messages": messages})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context_length_exceeded" and engine.asked == []
    assert "2048" in error["message"] and any(int(word) > 3000 for word in error["message"].split() if word.isdigit())


def test_other_refusals(serving):
    engine, call = serving(body_limit_bytes=1000)
    assert call("POST", "/v1/chat/completions", json=BODY | {"model": "gpt-4"}).status_code == 404
    assert call("GET", "/v1/models/gpt-4").json()["error"]["code"] == "model_not_found"
    assert call("POST", "/v1/chat/completions", content=b" " * 1001).status_code == 413
    for path, status in (("/nowhere", 404), ("/v1/chat/completions", 405)):
        answer = call("GET", path)
        assert answer.status_code == status and answer.json()["error"]["type"].endswith("_error")
    assert engine.asked == []


def test_models(serving):
    _, call = serving()
    assert [model["id"] for model in call("GET", "/v1/models").json()["data"]] == ["tiny"]
    assert call("GET", "/v1/models/tiny").json()["object"] == "model"


def test_more_requests_than_may_wait_are_told_to_come_back(serving, markup):
    engine, call = serving(markup(ANSWERS))
    engine.running = REQUEST_LIMIT
    answer = call("POST", "/v1/chat/completions", json=BODY)
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "too_many_requests"
    assert answer.headers["retry-after"] == "1"
    assert not engine.asked
    engine.running -= 1
    assert call("POST", "/v1/chat/completions", json=BODY).status_code == 200


def test_not_ready_and_dead(serving):
    engine, call = serving(engine=ScriptedEngine([], ready=False))
    assert (call("GET", "/health").status_code, call("GET", "/ready").status_code) == (200, 503)
    answer = call("POST", "/v1/chat/completions", json=BODY)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
    engine.dead = True
    assert (call("GET", "/health").status_code, call("GET", "/ready").status_code) == (503, 503)
    answer = call("POST", "/v1/chat/completions", json=BODY)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_died"


@pytest.mark.parametrize(
    "error, status, code",
    [
        (EngineDiedError("the engine died"), 503, "replica_died"),
        (UserError("9 tokens do not fit"), 400, "refused_by_engine"),
        (RuntimeError("our mistake"), 500, None),
    ],
)
def test_errors_of_the_engine(serving, markup, error, status, code, caplog):
    # Before the first token the status says it, streamed or not.
    for stream in (False, True):
        _, call = serving([error])
        answer = call("POST", "/v1/chat/completions", json=BODY | {"stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert "our mistake" not in answer.text
    # In mid-answer a stream ends with an error event, without [DONE]; a plain answer still has its status.
    _, call = serving([*markup("<|channel|>final<|message|>Hel"), error])
    assert call("POST", "/v1/chat/completions", json=BODY).status_code == status
    events = call("POST", "/v1/chat/completions", json=BODY | {"stream": True}).text.split("\n\n")
    assert json.loads(events[-2][6:])["error"]["code"] == code
    with pytest.raises(openai.APIError):
        call.chat(stream=True)
    assert ("our mistake" in caplog.text) == (status == 500)


class DyingEngine(ScriptedEngine):
    """Dies before its first token, and is not ready any more."""

    async def generate(self, request):
        self.asked.append(request)
        await asyncio.sleep(0.1)
        self.ready, self.dead = False, True
        raise EngineDiedError("the engine died")
        yield


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_nobody_has_seen_moves_to_another_replica(serving, markup, stream):
    dying, living = DyingEngine([]), ScriptedEngine(markup(ANSWERS))
    living.running = 1  # so that the other one is asked first
    _, call = serving(engine=dying, others=[living])
    answer = call("POST", "/v1/chat/completions", json=BODY | {"stream": stream})
    assert answer.status_code == 200 and "Hello" in answer.text and "error" not in answer.text
    assert [len(dying.asked), len(living.asked)] == [1, 1]
    assert dying.asked == living.asked  # with its seed
    dying.ready = True
    call("POST", "/v1/chat/completions", json=BODY | {"stream": stream, "deadline_s": 5})
    assert dying.asked[1].deadline_s > 4.95 and 4 < living.asked[1].deadline_s < 4.9  # what is left of it
    health, ready = call("GET", "/health"), call("GET", "/ready")
    assert (health.status_code, health.json()) == (503, {"ok": False, "dead_replicas": 1, "replicas": 2})
    assert (ready.status_code, ready.json()) == (503, {"ready_replicas": 1, "replicas": 2})


def test_a_request_moves_twice_at_most(serving):
    everyone = [DyingEngine([]) for _ in range(5)]
    _, call = serving(engine=everyone[0], others=everyone[1:])
    answer = call("POST", "/v1/chat/completions", json=BODY)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    error = answer.json()["error"]
    assert error["code"] == "replica_died" and error["retryable"] and "send the request again" in error["message"]
    assert sum(len(engine.asked) for engine in everyone) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_has_begun_does_not_move(serving, markup, stream):
    dying = ScriptedEngine([*markup("<|channel|>final<|message|>Hel"), EngineDiedError("the engine died")])
    living = ScriptedEngine(markup(ANSWERS))
    living.running = 1
    _, call = serving(engine=dying, others=[living])
    answer = call("POST", "/v1/chat/completions", json=BODY | {"stream": stream})
    if stream:
        assert answer.status_code == 200
        error = json.loads(answer.text.split("\n\n")[-2][6:])["error"]
    else:
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        error = answer.json()["error"]
    assert error["code"] == "replica_died" and error["retryable"] is True and not living.asked


def test_a_conversation_goes_on_where_it_began(serving, markup):
    first, second = ScriptedEngine(markup(ANSWERS)), ScriptedEngine(markup(ANSWERS))
    _, call = serving(engine=first, others=[second])
    talks = [[{"role": "user", "content": f"{word} " * 400}] for word in ("apple", "pear")]
    call.chat(messages=talks[0])
    first.running = 1
    call.chat(messages=talks[1])
    assert (len(first.asked), len(second.asked)) == (1, 1)
    for _ in range(2):
        talks = [[*talk, {"role": "assistant", "content": "Yes"}, HELLO[0]] for talk in talks]
        call.chat(messages=talks[0])
        call.chat(messages=talks[1])
    assert (len(first.asked), len(second.asked)) == (3, 3)
    assert {len(request.prompt_tokens) for request in first.asked} != {
        len(request.prompt_tokens) for request in second.asked
    }


def test_a_deadline_cuts_an_answer_short(serving, markup):
    class Late(ScriptedEngine):
        async def generate(self, request):
            self.asked.append(request)
            for token in markup("<|channel|>final<|message|>Hel"):
                yield Token(request.id, token)
            yield Token(request.id, -1, "deadline")

    engine, call = serving(engine=Late([]))
    answer = call.chat(extra_body={"deadline_s": 2})
    assert 1.9 < engine.asked[0].deadline_s <= 2
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("length", "Hel")
    assert answer.usage.completion_tokens == len(markup("<|channel|>final<|message|>Hel"))
    assert 'request_success_total{finish_reason="deadline"' in call("GET", "/metrics").text
    assert call.chat(stream=True)[-1].choices[0].finish_reason == "length"
    assert engine.asked[1].deadline_s is None


class SlowEngine(ScriptedEngine):
    """Waits before its first item."""

    async def generate(self, request):
        await asyncio.sleep(0.35)
        async for token in super().generate(request):
            yield token


def test_a_stream_that_waits_for_its_first_token_says_so(serving, markup):
    engine, call = serving(engine=SlowEngine(markup(ANSWERS)), quiet_s=0.1)
    events = call("POST", "/v1/chat/completions", json=BODY | {"stream": True}).text.split("\n\n")
    assert "assistant" in events[0] and 1 <= events.count(": waiting") <= 3
    assert events[1] == ": waiting" and events[-2:] == ["data: [DONE]", ""]
    chunks = call.chat(stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello, world"
    assert engine.cancelled == []
    # Late errors are events; what comes at once still is a status.
    _, call = serving(engine=SlowEngine([UserError("9 tokens do not fit")]), quiet_s=0.1)
    answer = call("POST", "/v1/chat/completions", json=BODY | {"stream": True})
    assert answer.status_code == 200 and '"refused_by_engine"' in answer.text and "[DONE]" not in answer.text
    _, call = serving([UserError("9 tokens do not fit")], quiet_s=0.1)
    assert call("POST", "/v1/chat/completions", json=BODY | {"stream": True}).status_code == 400
    # A plain answer has no room for comments.
    _, call = serving(engine=SlowEngine(markup(ANSWERS)), quiet_s=0.1)
    assert call.chat().choices[0].message.content == "Hello, world"

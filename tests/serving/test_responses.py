"""/v1/responses: the official client over a socket, the real app, a scripted engine; and every bad input."""

import asyncio
import gc
import json
import random
import socket
import sys
import threading
import time
import typing

import httpx
import openai
import pytest
import uvicorn
from gptoss_launch.launch.api.app import create_app
from gptoss_launch.launch.api.metrics import Metrics
from gptoss_launch.launch.api.replicas import Replicas
from gptoss_launch.launch.api.responses_schema import ResponsesRequest
from gptoss_launch.launch.api.served import Served
from gptoss_launch.launch.dispatch import Dispatch
from gptoss_launch.launch.engine_client import EngineDiedError
from gptoss_launch.parallel.engine.request import Token
from gptoss_launch.parallel.errors import UserError
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from prometheus_client import CollectorRegistry

THINKS = "<|channel|>analysis<|message|>Let me think<|end|><|start|>assistant"
SAYS = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
ANSWERS = "<|channel|>final<|message|>Hello, world<|return|>"
CALLS = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Bern"}<|call|>'
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "default": None}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "get_weather", "description": "Weather", "parameters": PARAMETERS}
BODY = {"model": "tiny", "input": "Hello"}
PAUSE = -2  # in a script: wait until cancelled, or until `go_on`
TYPES = {
    kind: event
    for event in typing.get_args(typing.get_args(ResponseStreamEvent)[0])
    for kind in typing.get_args(event.model_fields["type"].annotation)
}


class ScriptedEngine:
    """Gives the script's tokens, each with logprobs if asked; an exception in it is raised, a PAUSE waited out."""

    def __init__(self):
        self.ready, self.dead, self.running, self.restarts = True, False, 0, 0
        self.begin()

    def begin(self, script=()):
        self.script, self.asked, self.cancelled = list(script), [], []
        self.paused, self.go_on = threading.Event(), threading.Event()

    async def generate(self, request):
        self.asked.append(request)
        ended, answered = False, 0
        try:
            for token in self.script:
                if isinstance(token, Exception):
                    ended = True
                    raise token
                while token == PAUSE and not self.go_on.is_set():
                    self.paused.set()
                    await asyncio.sleep(0.005)
                if token == PAUSE:
                    continue
                answered += 1
                reason = "stop" if token in request.stop_tokens else None
                reason = reason or ("length" if answered == request.max_tokens else None)
                ended = reason is not None
                told = request.logprobs is not None
                top = ((token, -0.5), (1, -2.0), (2, -3.0))[: request.logprobs or 0] if told else ()
                yield Token(request.id, token, reason, -0.5 if told else None, top)
                if ended:
                    return
        finally:
            if not ended:
                self.cancelled.append(request.id)


class Server:
    def __init__(self, tokenizer):
        self.engine = ScriptedEngine()
        replicas = Replicas([self.engine], Dispatch(1), Metrics(CollectorRegistry(), "tiny", 1))
        self.served = Served("tiny", 2048, tokenizer, replicas, body_limit_bytes=1 << 20, quiet_s=0.2)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(create_app(self.served), http="h11", log_level="warning", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([listener])))
        self._thread.start()
        # A connection each: one over which a 500 went is closed by uvicorn, at a time of its own.
        self.http = httpx.Client(base_url=self.url, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def stop(self):
        self.http.close()
        self.client.close()
        self._server.should_exit = True
        self._thread.join()

    def create(self, **fields):
        return self.client.responses.create(**{"model": "tiny", "input": "Hello"} | fields)

    def events(self, **fields):
        """As they are on the wire, each checked against the official client's own type."""
        text = self.http.post("/v1/responses", json=BODY | {"stream": True} | fields).text
        return read_events(text)


def read_events(text):
    """Server-sent events -> objects. Fails where the official client's types do not hold, or a number is missing."""
    events = []
    for block in text.split("\n\n")[:-1]:
        if block == ": waiting":
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        TYPES[event["type"]].model_validate(event)
        events.append(event)
    assert text.endswith("\n\n") and "[DONE]" not in text
    return events


def wait_for(found, limit_s=30.0):
    deadline = time.monotonic() + limit_s
    while not (got := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return got


@pytest.fixture(scope="module")
def running(tokenizer):
    server = Server(tokenizer)
    yield server
    server.stop()


@pytest.fixture
def server(running, markup):
    """script(text with markup, PAUSE, exceptions) sets what is answered next."""

    def script(*parts):
        running.engine.begin(token for part in parts for token in (markup(part) if isinstance(part, str) else [part]))

    running.script = script
    script(THINKS + ANSWERS)
    return running


def test_plain(server, markup):
    answer = server.create(
        instructions="Be brief.",
        reasoning={"effort": "high"},
        temperature=0.5,
        top_p=0.25,
        metadata={"a": "b"},
        user="me",
    )
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    thought, message = answer.output
    assert (thought.content[0].text, thought.summary, thought.status) == ("Let me think", [], "completed")
    assert (answer.output_text, message.phase, message.status) == ("Hello, world", "final_answer", "completed")
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert answer.completed_at >= answer.created_at > time.time() - 60
    usage = answer.usage
    assert usage.output_tokens == len(markup(THINKS + ANSWERS))
    assert usage.output_tokens_details.reasoning_tokens == len(markup("Let me think")) + 1
    assert usage.input_tokens == len(server.engine.asked[0].prompt_tokens) == usage.total_tokens - usage.output_tokens
    assert (answer.instructions, answer.metadata, answer.user) == ("Be brief.", {"a": "b"}, "me")
    assert (answer.temperature, answer.top_p, answer.reasoning.effort) == (0.5, 0.25, "high")
    assert (answer.tool_choice, answer.tools, answer.truncation, answer.background) == ("auto", [], "disabled", False)
    sampling = server.engine.asked[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.25)
    assert server.engine.cancelled == []
    Response.model_validate(server.http.get(f"/v1/responses/{answer.id}").json())


def test_input_tokens_are_those_of_the_response(server):
    first = server.create()
    fields = {"input": "And now?", "instructions": "Be brief.", "tools": [WEATHER], "reasoning": {"effort": "high"}}
    fields |= {"previous_response_id": first.id}
    counted = server.client.responses.input_tokens.count(model="tiny", **fields)
    assert (counted.object, counted.input_tokens) == (
        "response.input_tokens",
        server.create(**fields).usage.input_tokens,
    )
    long = {"input": "word " * 5000}  # more than the context holds
    assert server.client.responses.input_tokens.count(model="tiny", **long).input_tokens > 2048
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        server.client.responses.input_tokens.count(model="tiny", input="x", previous_response_id="resp_1")


REASONING = [
    "response.output_item.added",
    "response.content_part.added",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
MESSAGE = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
CALL = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]
BEGIN = ["response.created", "response.in_progress"]


def order(events):
    """The types, deltas that follow each other once."""
    types = [event["type"] for event in events]
    return [kind for place, kind in enumerate(types) if not (place and kind == types[place - 1] and "delta" in kind)]


@pytest.mark.parametrize(
    "script, fields, expected",
    [
        (ANSWERS, {}, [*BEGIN, *MESSAGE, "response.completed"]),
        (THINKS + ANSWERS, {}, [*BEGIN, *REASONING, *MESSAGE, "response.completed"]),
        (THINKS + SAYS + CALLS, {"tools": [WEATHER]}, [*BEGIN, *REASONING, *MESSAGE, *CALL, "response.completed"]),
        (THINKS + SAYS + THINKS + ANSWERS, {}, [*BEGIN, *(REASONING + MESSAGE) * 2, "response.completed"]),
        (THINKS + THINKS + ANSWERS, {}, [*BEGIN, *REASONING * 2, *MESSAGE, "response.completed"]),
        (SAYS + ANSWERS, {}, [*BEGIN, *MESSAGE * 2, "response.completed"]),
        (CALLS, {"tools": [WEATHER]}, [*BEGIN, *CALL, "response.completed"]),
        (CALLS, {}, [*BEGIN, *REASONING, "response.completed"]),  # of a function that was not offered
        (THINKS + ANSWERS, {"max_output_tokens": 8}, [*BEGIN, *REASONING, "response.incomplete"]),
        ("<|channel|>final<|message|><|return|>", {}, [*BEGIN, "response.completed"]),
    ],
)
def test_order_of_events(server, script, fields, expected):
    server.script(script)
    events = server.events(**fields)
    assert order(events) == expected
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1]["response"]
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1
    for place, item in enumerate(final["output"]):
        about = [event for event in events if event.get("output_index") == place]
        ids = {event.get("item_id") or event["item"]["id"] for event in about}
        assert ids == {item["id"]}  # one in every event
        assert about[0]["item"] == item | {"status": "in_progress"} | (
            {"arguments": ""} if item["type"] == "function_call" else {"content": []}
        )
        assert about[-1]["item"] == item
        said = "".join(event.get("delta", "") for event in about)
        assert said == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]) != ""
    assert len({item["id"] for item in final["output"]}) == len(final["output"])
    assert all(event["response"]["usage"] is None for event in events[:-1] if "response" in event)
    assert final["usage"]["total_tokens"] == final["usage"]["input_tokens"] + final["usage"]["output_tokens"]
    # Whole, it is the same; but for what is drawn.
    server.script(script)
    plain = server.http.post("/v1/responses", json=BODY | fields).json()

    def same(item):
        return {name: value for name, value in item.items() if name not in ("id", "call_id")}

    assert [same(item) for item in plain["output"]] == [same(item) for item in final["output"]]
    assert (plain["status"], plain["usage"]) == (final["status"], final["usage"])


def test_the_typed_stream_of_the_official_client(server):
    server.script(THINKS + SAYS + CALLS)
    tools = [WEATHER | {"strict": False}]
    with server.client.responses.stream(model="tiny", input="Hello", tools=tools) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert events[-1].type == "response.completed" and events[-1].response.id == final.id
    snapshots = [event.snapshot for event in events if event.type == "response.function_call_arguments.delta"]
    assert snapshots[-1] == final.output[2].arguments == '{"city": "Bern"}'
    texts = [event.snapshot for event in events if event.type == "response.output_text.delta"]
    assert texts[-1] == final.output_text == "I look." and final.output[1].phase == "commentary"
    # What came back goes back, with the official client's own additions.
    server.script(THINKS + ANSWERS)
    result = {"type": "function_call_output", "call_id": final.output[2].call_id, "output": "rain"}
    again = server.create(input=[{"role": "user", "content": "Hello"}, *final.output, result], tools=tools)
    assert again.output_text == "Hello, world"


def test_the_async_client(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            plain = await client.responses.create(model="tiny", input="Hello")
            stream = await client.responses.create(model="tiny", input="Hello", stream=True)
            raw = [event async for event in stream]
            async with client.responses.stream(model="tiny", input="Hello") as typed:
                await typed.until_done()
                return plain, raw, await typed.get_final_response()

    plain, raw, typed = asyncio.run(ask())
    assert plain.output_text == typed.output_text == raw[-1].response.output_text == "Hello, world"


def test_a_function_call(server, tokenizer):
    server.script(THINKS + SAYS + CALLS)
    first = server.create(tools=[WEATHER])
    call = first.output[2]
    assert (call.name, call.arguments, call.status) == ("get_weather", '{"city": "Bern"}', "completed")
    assert call.call_id.startswith("call_") and first.status == "completed" and first.tools[0].parameters == PARAMETERS
    server.script(THINKS + ANSWERS)
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": [{"type": "input_text", "text": "rain"}],
    }
    server.create(input=[result], tools=[WEATHER], previous_response_id=first.id)
    prompt = tokenizer.decode(server.engine.asked[0].prompt_tokens)
    assert prompt.endswith(
        "<|start|>user<|message|>Hello<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Let me think<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json"
        '<|message|>{"city": "Bern"}<|call|>'
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>rain<|end|><|start|>assistant"
    )
    assert "city: string, // default: null" in prompt


def test_a_chain_is_the_conversation_sent_whole(server, tokenizer):
    """In rendered tokens, and equal to chat's where chat can say it."""
    server.script(THINKS + SAYS + CALLS)
    first = server.create(instructions="Be kind.", tools=[WEATHER])
    output = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "rain"}
    server.script(THINKS + ANSWERS)
    second = server.create(input=[output], instructions="Be brief.", tools=[WEATHER], previous_response_id=first.id)
    chained = {"input": "And now?", "instructions": "Be brief.", "tools": [WEATHER]}
    server.script(THINKS + ANSWERS)
    server.create(**chained, previous_response_id=second.id)
    question = {"role": "user", "content": "And now?"}
    items = [{"role": "user", "content": "Hello"}, *first.output, output, *second.output, question]
    dumped = [item if isinstance(item, dict) else item.model_dump() for item in items]
    referred = [item if isinstance(item, dict) else {"type": "item_reference", "id": item.id} for item in items]
    for whole in (items, dumped, referred):
        server.create(**chained | {"input": whole})
    chat_messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "reasoning_content": "Let me think"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"id": "x", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "x", "content": "rain"},
        {"role": "assistant", "reasoning_content": "Let me think", "content": "Hello, world"},
        question,
    ]
    function = {name: value for name, value in WEATHER.items() if name != "type"}
    chat = {"model": "tiny", "messages": chat_messages, "tools": [{"type": "function", "function": function}]}
    assert server.http.post("/v1/chat/completions", json=chat).status_code == 200
    prompts = [request.prompt_tokens for request in server.engine.asked]
    assert len(prompts) == 5 and len(set(prompts)) == 1
    assert "Let me think" not in tokenizer.decode(prompts[0])  # the turn is over
    assert "I look." in tokenizer.decode(prompts[0]) and "Be kind." not in tokenizer.decode(prompts[0])


def test_items_of_every_kind(server, tokenizer):
    server.create(
        input=[
            {"role": "developer", "content": "Rhyme."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<|end|>"}], "status": None},
            {"role": "assistant", "content": "Well.", "phase": "commentary"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
            {"type": "reasoning", "id": "rs_2", "summary": []},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Yes", "annotations": []}]},
            {"role": "system", "content": "Stop rhyming."},
            {"role": "user", "content": "Go"},
        ]
    )
    ids = server.engine.asked[0].prompt_tokens
    prompt = tokenizer.decode(ids)
    assert prompt.endswith(
        "<|start|>developer<|message|># Instructions\n\nRhyme.<|end|><|start|>user<|message|><|end|><|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Well.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Yes<|end|>"
        "<|start|>developer<|message|># Instructions\n\nStop rhyming.<|end|>"
        "<|start|>user<|message|>Go<|end|><|start|>assistant"
    )
    assert ids.count(tokenizer.special["<|end|>"]) == prompt.count("<|end|>") - 1  # the user's is text


def test_logprobs(server, markup, tokenizer):
    server.script(THINKS + ANSWERS)
    include = ["message.output_text.logprobs"]
    plain = server.create(include=include, top_logprobs=2)
    part = plain.output[1].content[0]
    assert b"".join(bytes(entry.bytes) for entry in part.logprobs) == b"Hello, world"
    assert [entry.token for entry in part.logprobs] == [tokenizer.decode([id]) for id in markup("Hello, world")]
    assert {entry.logprob for entry in part.logprobs} == {-0.5}
    assert all([top.logprob for top in entry.top_logprobs] == [-0.5, -2.0] for entry in part.logprobs)
    assert server.engine.asked[0].logprobs == plain.top_logprobs == 2
    server.script(THINKS + ANSWERS)
    events = server.events(include=include, top_logprobs=2)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    told = [entry for event in deltas for entry in event["logprobs"]]
    assert told == [entry.model_dump() for entry in part.logprobs]
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    assert done["logprobs"] == told
    assert server.create().output[1].content[0].logprobs == [] and server.engine.asked[1].logprobs is None
    # They go back in, too.
    server.create(input=[{"role": "user", "content": "a"}, *plain.output, {"role": "user", "content": "b"}])


def test_what_works_in_chat_works_here(server):
    server.script(ANSWERS)
    extra = {"seed": 5, "stop": ["wor"], "top_k": 7, "deadline_s": 9, "logit_bias": {"3": 1}}
    answer = server.create(extra_body=extra)
    assert (answer.output_text, answer.status) == ("Hello, ", "completed")
    [asked] = server.engine.asked
    assert (asked.sampling.seed, asked.sampling.top_k, asked.sampling.logit_bias) == (5, 7, ((3, 1.0),))
    assert asked.deadline_s > 8


def test_length(server):
    answer = server.create(max_output_tokens=8)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete" and answer.usage.output_tokens == 8
    server.script(ANSWERS)
    again = server.create(previous_response_id=answer.id)
    assert again.status == "completed" and again.previous_response_id == answer.id


ERRORS = [
    (EngineDiedError("the engine died"), 503, "replica_died", "server_error"),
    (UserError("9 tokens do not fit"), 400, "refused_by_engine", "invalid_prompt"),
    (RuntimeError("our mistake"), 500, None, "server_error"),
]


@pytest.mark.parametrize("error, status, code, told", ERRORS)
def test_errors_of_the_engine(server, caplog, error, status, code, told):
    for stream in (False, True):  # before the first token
        server.script(error)
        answer = server.http.post("/v1/responses", json=BODY | {"stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    server.script("<|channel|>final<|message|>Hel", error)
    assert server.http.post("/v1/responses", json=BODY).status_code == status
    server.script("<|channel|>final<|message|>Hel", error)
    events = server.events()
    assert order(events) == [*BEGIN, *MESSAGE[:3], "response.failed"]
    final = events[-1]["response"]
    assert (final["status"], final["error"]["code"], final["usage"]) == ("failed", told, None)
    assert final["output"][0]["status"] == "incomplete" and final["output"][0]["content"][0]["text"] == "Hel"
    kept = server.http.get(f"/v1/responses/{final['id']}").json()
    assert kept == final
    server.script(ANSWERS)
    answer = server.http.post("/v1/responses", json=BODY | {"previous_response_id": final["id"]})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "previous_response_id"
    with pytest.raises(openai.APIError):
        server.script(error)
        server.create(stream=True)
    server.script(error)
    failed = server.http.post("/v1/responses", json=BODY | {"background": True}).json()
    final = wait_for(lambda: ended(server, failed["id"]))
    assert (final["status"], final["error"]["code"]) == ("failed", told)
    assert "our mistake" not in json.dumps(final) and ("our mistake" in caplog.text) == (status == 500)


def ended(server, id):
    response = server.http.get(f"/v1/responses/{id}").json()
    Response.model_validate(response)
    return response if response["status"] not in ("queued", "in_progress") else None


def test_a_stream_that_waits_says_so(server):
    server.script(PAUSE, ANSWERS)
    with server.http.stream("POST", "/v1/responses", json=BODY | {"stream": True}) as answer:
        lines = answer.iter_lines()
        first = [next(lines) for _ in range(8)]
        assert first[0] == "event: response.created" and ": waiting" in first
        server.engine.go_on.set()
        assert "event: response.completed" in list(lines)


def test_background(server):
    server.script(THINKS, PAUSE, ANSWERS)
    first = server.create(background=True)
    assert (first.status, first.output, first.background) == ("queued", [], True)
    server.engine.paused.wait(30)
    going = wait_for(lambda: (r := server.client.responses.retrieve(first.id)).output and r)
    assert going.status == "in_progress" and going.output[0].content[0].text == "Let me think"
    answer = server.http.post("/v1/responses", json=BODY | {"previous_response_id": first.id})
    assert answer.status_code == 400 and "in_progress" in answer.json()["error"]["message"]
    server.engine.go_on.set()
    final = wait_for(lambda: ended(server, first.id))
    assert final["status"] == "completed" and final["id"] == first.id
    cancelled = server.client.responses.cancel(first.id)
    assert cancelled.status == "completed"  # too late
    assert server.engine.cancelled == []


def test_cancel(server):
    server.script(THINKS, PAUSE, ANSWERS)
    first = server.create(background=True)
    server.engine.paused.wait(30)
    for _ in range(2):
        cancelled = server.client.responses.cancel(first.id)
        assert (cancelled.status, cancelled.id) == ("cancelled", first.id)
    assert server.engine.cancelled == [server.engine.asked[0].id]
    assert server.client.responses.retrieve(first.id).status == "cancelled"
    server.script(ANSWERS)
    plain = server.create()
    with pytest.raises(openai.BadRequestError, match="background"):
        server.client.responses.cancel(plain.id)


def test_cancel_before_it_begins(server):
    server.script(PAUSE, ANSWERS)
    first = server.create(background=True)
    assert server.client.responses.cancel(first.id).status == "cancelled"
    assert server.http.get(f"/v1/responses/{first.id}").json()["output"] == []
    wait_for(lambda: len(server.engine.cancelled) == len(server.engine.asked))


def test_a_background_stream_goes_on_without_its_reader_and_is_read_again(server):
    server.script(THINKS, PAUSE, ANSWERS)
    stream = server.create(background=True, stream=True)
    seen = []
    for event in stream:
        seen.append(event)
        if event.type == "response.reasoning_text.delta":
            break
    stream.close()
    id = seen[0].response.id
    server.engine.paused.wait(30)
    # Read on from there, while it is being made.
    with server.client.responses.retrieve(id, stream=True, starting_after=seen[-1].sequence_number) as later:
        rest = [next(iter(later))]
        server.engine.go_on.set()
        rest += list(later)
    assert server.engine.cancelled == []
    numbers = [event.sequence_number for event in [*seen, *rest]]
    assert numbers == list(range(len(numbers))) and rest[-1].type == "response.completed"
    # And again from the start, once it is over; as the typed stream, too.
    whole = read_events(server.http.get(f"/v1/responses/{id}", params={"stream": "true"}).text)
    assert order(whole) == ["response.created", "response.queued", "response.in_progress", *REASONING, *MESSAGE] + [
        "response.completed"
    ]
    assert [event["sequence_number"] for event in whole] == numbers
    with server.client.responses.stream(response_id=id, starting_after=3) as typed:
        assert typed.get_final_response().output_text == "Hello, world"
    assert server.http.get(f"/v1/responses/{id}?stream=true&starting_after=100000").text == ""
    server.script(ANSWERS)
    plain = server.create()
    with pytest.raises(openai.BadRequestError, match="background"):
        server.client.responses.retrieve(plain.id, stream=True)


def test_a_cancelled_background_stream_ends(server):
    server.script(THINKS, PAUSE, ANSWERS)
    stream = server.create(background=True, stream=True)
    events = [next(iter(stream))]
    server.engine.paused.wait(30)
    server.client.responses.cancel(events[0].response.id)
    events += list(stream)
    assert (events[-1].type, events[-1].response.status) == ("response.incomplete", "cancelled")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_a_response_unless_it_is_in_the_background(server, stream):
    for background in (False, True):
        server.script(THINKS, PAUSE, ANSWERS)
        body = BODY | {"stream": stream, "background": background}
        if background and not stream:
            continue  # it is answered at once
        with httpx.Client(base_url=server.url) as leaving:
            try:
                with leaving.stream("POST", "/v1/responses", json=body, timeout=0.5) as answer:
                    next(answer.iter_lines())
                    server.engine.paused.wait(30)
            except httpx.ReadTimeout:
                assert not stream
        if not background:
            wait_for(lambda: server.engine.cancelled == [server.engine.asked[0].id])
            id = f"resp_{server.engine.asked[0].id}"
            assert wait_for(lambda id=id: ended(server, id))["status"] == "cancelled"
            continue
        time.sleep(0.2)
        assert server.engine.cancelled == []
        server.engine.go_on.set()
        id = f"resp_{server.engine.asked[0].id}"
        assert wait_for(lambda id=id: ended(server, id))["status"] == "completed"


def test_truncation_drops_the_oldest_items(server, tokenizer):
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "a", "output": "RESULT"}
    talk = [call, {"role": "user", "content": "old " * 900}, result]
    questions = [f"QUESTION {n} " + "word " * 160 for n in range(6)]
    largest_tokens = max(len(tokenizer.encode(question)) for question in questions) + 10  # with its markup
    talk += [{"role": "user", "content": question} for question in questions]
    fields = {"model": "tiny", "input": talk, "instructions": "Be brief."}
    assert server.http.post("/v1/responses", json=fields).json()["error"]["code"] == "context_length_exceeded"
    for more, least_room in (({}, 512), ({"max_output_tokens": 100}, 100), ({"max_output_tokens": 1200}, 1200)):
        server.script(ANSWERS)
        answer = server.http.post("/v1/responses", json=fields | more | {"truncation": "auto"})
        assert answer.status_code == 200 and answer.json()["truncation"] == "auto", answer.text
        [asked] = server.engine.asked
        prompt = tokenizer.decode(asked.prompt_tokens)
        seen = [n for n in range(6) if f"QUESTION {n} " in prompt]
        assert seen and seen == list(range(seen[0], 6)) and "RESULT" not in prompt and "Be brief." in prompt
        left = 2048 - len(asked.prompt_tokens)
        assert left >= least_room
        assert seen[0] > 0 and left - least_room < largest_tokens, "one more item would have fitted"
        listed = server.http.get(f"/v1/responses/{answer.json()['id']}/input_items?limit=100").json()
        assert len(listed["data"]) == len(talk)
    # What fits is left alone, also where it leaves little room.
    server.script(ANSWERS)
    server.create(input=talk[-5:], truncation="auto")
    assert 2048 - len(server.engine.asked[0].prompt_tokens) < 512
    assert "QUESTION 1 " in tokenizer.decode(server.engine.asked[0].prompt_tokens)


def test_delete(server):
    answer = server.create()
    assert server.client.responses.delete(answer.id) is None
    for ask in (server.client.responses.retrieve, server.client.responses.delete, server.client.responses.cancel):
        with pytest.raises(openai.NotFoundError) as error:
            ask(answer.id)
        assert error.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        server.create(previous_response_id=answer.id)
    assert (refused.value.param, refused.value.code) == ("previous_response_id", "previous_response_not_found")
    server.script(THINKS, PAUSE, ANSWERS)
    going = server.create(background=True)
    server.engine.paused.wait(30)
    answer = server.http.delete(f"/v1/responses/{going.id}")
    assert answer.json() == {"id": going.id, "object": "response", "deleted": True}
    assert server.engine.cancelled == [server.engine.asked[0].id]


@pytest.mark.parametrize("background", [False, True])
def test_what_is_kept_does_not_hold_the_body_that_came(server, background):
    """As checked objects it takes up to 13 times what the store counts, which is the JSON of what it keeps."""

    def held():
        gc.collect()
        return sum(type(one) is ResponsesRequest for one in gc.get_objects())  # isinstance would ask lazy modules

    before = held()  # by tracebacks of what other tests raise
    made = server.create(background=background, top_logprobs=1, include=["message.output_text.logprobs"]).id
    kept = wait_for(lambda: ended(server, made))
    assert len(kept["output"][-1]["content"][0]["logprobs"][0]["top_logprobs"]) == 1
    wait_for(lambda: held() <= before, 5)


def test_what_is_not_to_be_stored_is_not(server):
    before = len(server.served.store)
    answer = server.create(store=False)
    assert answer.output_text == "Hello, world" and len(server.served.store) == before
    assert answer.model_extra["store"] is False
    with pytest.raises(openai.NotFoundError):
        server.client.responses.retrieve(answer.id)


def test_input_items(server):
    first = server.create(input="One")
    second = server.create(
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Two"}]},
            {"role": "user", "content": "Three"},
        ],
        previous_response_id=first.id,
    )
    listed = server.http.get(f"/v1/responses/{second.id}/input_items", params={"order": "asc"}).json()
    ResponseItemList.model_validate(listed)
    assert [item["type"] for item in listed["data"]] == ["message", "reasoning", "message", "message", "message"]
    assert [item["content"][0]["text"] for item in listed["data"]] == [
        "One",
        "Let me think",
        "Hello, world",
        "Two",
        "Three",
    ]
    assert len({item["id"] for item in listed["data"]}) == 5 and listed["has_more"] is False
    pages = server.client.responses.input_items.list(second.id, limit=2)
    assert [item.id for item in pages] == [item["id"] for item in reversed(listed["data"])]
    assert pages.has_more is True
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=nobody", "include=x", "nonsense=1"):
        answer = server.http.get(f"/v1/responses/{second.id}/input_items?{query}")
        assert answer.status_code == 400 and answer.json()["error"]["param"] == query.split("=")[0]
    for query in (
        "stream=1",
        "stream=true&starting_after=-1",
        "starting_after=1",
        "include=x",
        "include_obfuscation=true",
    ):
        answer = server.http.get(f"/v1/responses/{first.id}?{query}")
        assert answer.status_code == 400 and answer.json()["error"]["param"] in query


def item(**fields):
    return BODY | {"input": [{"role": "user", "content": "x"}, fields]}


BAD = {
    "no JSON": (b"{", None),
    "not an object": (b"[1]", None),
    "deep": (b'{"model": ' + b"[" * 100_000, None),
    "no model": ({"input": "x"}, "model"),
    "no input": ({"model": "tiny"}, "input"),
    "input is a number": (BODY | {"input": 3}, "input"),
    "input is empty": (BODY | {"input": []}, "input"),
    "input holds text": (BODY | {"input": ["x"]}, "input.0"),
    "item of no type": (item(text="x"), "input.1.text"),
    "item of an unknown type": (item(type="computer_call", id="x"), "input.1"),
    "item whose type is a list": (item(type=["message"]), "input.1"),
    "custom tool call": (item(type="custom_tool_call", call_id="x", name="y", input="z"), "input.1"),
    "unknown role": (item(role="robot", content="x"), "input.1.role"),
    "no content": (item(role="user"), "input.1.content"),
    "picture": (item(role="user", content=[{"type": "input_image", "image_url": "x"}]), "input.1.content.0.image_url"),
    "answer's text said by a user": (
        item(role="user", content=[{"type": "output_text", "text": "x"}]),
        "input.1.content.0.type",
    ),
    "refusal": (item(role="assistant", content=[{"type": "refusal", "refusal": "x"}]), "input.1.content.0"),
    "annotations": (
        item(role="assistant", content=[{"type": "output_text", "text": "x", "annotations": [{}]}]),
        "input.1.content.0.annotations",
    ),
    "encrypted reasoning": (
        item(type="reasoning", summary=[], encrypted_content="x"),
        "input.1.encrypted_content",
    ),
    "summary": (
        item(type="reasoning", summary=[{"type": "summary_text", "text": "x"}]),
        "input.1.summary",
    ),
    "result of no call": (item(type="function_call_output", call_id="x", output="y"), "input.1.call_id"),
    "result without output": (item(type="function_call_output", call_id="x"), "input.1.output"),
    "call without a name": (item(type="function_call", call_id="x", arguments="{}"), "input.1.name"),
    "call whose arguments are no text": (
        item(type="function_call", call_id="x", name="y", arguments={}),
        "input.1.arguments",
    ),
    "reference to nothing": (item(type="item_reference", id="msg_1"), "input.1.id"),
    "reference to nothing that looks right": (item(type="item_reference", id="msg_1_9"), "input.1.id"),
    "unknown field": (BODY | {"temperatur": 1}, "temperatur"),
    "chat's field": (BODY | {"max_tokens": 1}, "max_tokens"),
    "chat's messages": (BODY | {"messages": []}, "messages"),
    "two answers": (BODY | {"n": 2}, "n"),
    "conversation": (BODY | {"conversation": "x"}, "conversation"),
    "prompt": (BODY | {"prompt": {"id": "x"}}, "prompt"),
    "temperature is text": (BODY | {"temperature": "1"}, "temperature"),
    "temperature is negative": (BODY | {"temperature": -1}, "temperature"),
    "temperature is no number": (json.dumps(BODY | {"temperature": float("nan")}).encode(), "temperature"),
    "top_p is 0": (BODY | {"top_p": 0}, "top_p"),
    "max_output_tokens is 0": (BODY | {"max_output_tokens": 0}, "max_output_tokens"),
    "max_output_tokens is a float": (BODY | {"max_output_tokens": 1.5}, "max_output_tokens"),
    "more than the context": (BODY | {"max_output_tokens": 2048}, "max_output_tokens"),
    "longer than the context": (BODY | {"input": "word " * 3000}, "input"),
    "max_tool_calls is 0": (BODY | {"max_tool_calls": 0}, "max_tool_calls"),
    "max_tool_calls is no number of this world": (BODY | {"max_tool_calls": 10**4000}, "max_tool_calls"),
    "metadata is text": (BODY | {"metadata": "x"}, "metadata"),
    "metadata holds a number": (BODY | {"metadata": {"a": 1}}, "metadata.a"),
    "metadata is too large": (BODY | {"metadata": {"a": "x" * 600}}, "metadata.a"),
    "effort": (BODY | {"reasoning": {"effort": "minimal"}}, "reasoning.effort"),
    "effort is a list": (BODY | {"reasoning": {"effort": []}}, "reasoning.effort"),
    "reasoning summary": (BODY | {"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    "reasoning is text": (BODY | {"reasoning": "high"}, "reasoning"),
    "include": (BODY | {"include": ["reasoning.encrypted_content"]}, "include.0"),
    "logprobs not included": (BODY | {"top_logprobs": 2}, "top_logprobs"),
    "too many logprobs": (BODY | {"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    "tool of another type": (BODY | {"tools": [{"type": "web_search"}]}, "tools.0.type"),
    "tool of another type with fields": (
        BODY | {"tools": [{"type": "mcp", "server_label": "x"}]},
        "tools.0.server_label",
    ),
    "tool without a name": (BODY | {"tools": [{"type": "function"}]}, "tools.0.name"),
    "tool name": (BODY | {"tools": [WEATHER | {"name": "a b"}]}, "tools.0.name"),
    "tool as in chat": (BODY | {"tools": [{"type": "function", "function": WEATHER}]}, "tools.0.function"),
    "tool_choice": (BODY | {"tool_choice": "perhaps"}, "tool_choice"),
    "verbosity": (BODY | {"text": {"verbosity": "high"}}, "text.verbosity"),
    "text.format": (BODY | {"text": {"format": {"type": "xml"}}}, "text.format"),
    "truncation": (BODY | {"truncation": "middle"}, "truncation"),
    "the last item alone is too long": (
        BODY | {"truncation": "auto", "input": [{"role": "user", "content": word} for word in ("a", "word " * 3000)]},
        "input",
    ),
    "service tier": (BODY | {"service_tier": "flex"}, "service_tier"),
    "stream is text": (BODY | {"stream": "yes"}, "stream"),
    "stream_options without stream": (BODY | {"stream_options": {}}, "stream_options"),
    "obfuscation": (
        BODY | {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    "background without store": (BODY | {"background": True, "store": False}, "background"),
    "no such response": (BODY | {"previous_response_id": "resp_1"}, "previous_response_id"),
    "store is text": (BODY | {"store": "no"}, "store"),
    "instructions are a list": (BODY | {"instructions": []}, "instructions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(server, name):
    body, param = BAD[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    before = len(server.served.store)
    answer = server.http.post("/v1/responses", content=content)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and (param is None or param in error["message"]), error
    assert server.engine.asked == [] and len(server.served.store) == before


def test_other_refusals(server):
    assert server.http.post("/v1/responses", json=BODY | {"model": "gpt-4"}).status_code == 404
    assert server.http.post("/v1/responses", content=b" " * (1 << 20 | 1)).status_code == 413
    assert server.http.get("/v1/responses").status_code == 405
    body = b'{"model": "tiny", "input": "a\\ud800b"}'
    assert server.http.post("/v1/responses", content=body).status_code in (200, 400)
    server.engine.ready = False
    try:
        assert server.http.post("/v1/responses", json=BODY).status_code == 503
        assert server.http.post("/v1/responses", json=BODY | {"background": True}).status_code == 503
    finally:
        server.engine.ready = True


def test_any_body_is_answered(server):
    """Bodies that are right but for one or two places: never a 5xx, never a request left behind."""
    draw = random.Random(7)
    odd = [None, True, -1, 0, 1.5, 1e999, 10**5000, "", "x" * 300, [], [[]], {}, {"type": "message"}, ["a"], "\x00"]
    full = BODY | {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "x", "logprobs": [1]}],
            },
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "y"},
        ],
        "tools": [WEATHER],
        "tool_choice": "auto",
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "text"}},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
        "metadata": {"a": "b"},
        "max_tool_calls": 3,
        "max_output_tokens": 30,
        "truncation": "auto",
        "instructions": "Be brief.",
        "temperature": 0.5,
        "user": "me",
        "background": False,
        "store": False,
    }

    def places(value, path=()):
        yield from ([path] if path else [])
        for step, inner in (
            value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
        ):
            yield from places(inner, (*path, step))

    everywhere = list(places(full))
    statuses = set()
    for _ in range(120):
        body = json.loads(json.dumps(full))
        for *path, last in draw.sample(everywhere, draw.randint(1, 2)):
            inner = body
            try:
                for step in path:
                    inner = inner[step]
                inner[last] = draw.choice(odd)
            except (KeyError, IndexError, TypeError):
                pass  # the first change took away the place of the second
        sys.set_int_max_str_digits(0)
        content = json.dumps(body | {"stream": draw.random() < 0.3}).encode()
        sys.set_int_max_str_digits(4300)
        answer = server.http.post("/v1/responses", content=content)
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (answer.text, content[:2000])
        if answer.status_code == 200 and answer.text.startswith("{"):
            Response.model_validate(answer.json())
    assert statuses >= {200, 400} and server.engine.cancelled == []


def test_what_one_key_keeps_no_other_sees(server):
    """The front names the key in the scope."""

    async def named(scope, receive, send):
        headers = dict(scope.get("headers", ()))
        await app(scope | {"gptoss_launch.key": headers.get(b"x-key", b"").decode()}, receive, send)

    app = create_app(server.served)

    async def ask(method, path, key, **fields):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(named), base_url="http://test") as client:
            return await client.request(method, f"/v1/responses{path}", headers={"x-key": key}, **fields)

    made = asyncio.run(ask("POST", "", "a", json=BODY)).json()
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        assert asyncio.run(ask(method, f"/{made['id']}{path}", "b")).status_code == 404
    for fields in (
        {"previous_response_id": made["id"]},
        {"input": [{"type": "item_reference", "id": made["output"][1]["id"]}]},
    ):
        assert asyncio.run(ask("POST", "", "b", json=BODY | fields)).status_code == 400
        assert asyncio.run(ask("POST", "", "a", json=BODY | fields)).status_code == 200
    assert asyncio.run(ask("GET", f"/{made['id']}", "a")).json() == made

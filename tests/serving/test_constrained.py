"""Tools and formats through HTTP with the official client, and a tiny model behind it, in this process: its random
weights say what the grammar lets them say, and jsonschema judges it.
"""

import asyncio
import json
import queue
import re
import threading
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import httpx
import jsonschema
import openai
import pytest
from bounded_schemas import BOUNDED, thing
from gptoss_launch.launch.api.app import Served, create_app
from gptoss_launch.launch.api.logprobs import spelled
from gptoss_launch.launch.api.metrics import Metrics
from gptoss_launch.launch.api.replicas import Replicas
from gptoss_launch.launch.dispatch import Dispatch
from gptoss_launch.launch.json_grammar import flaw_of, json_grammar
from gptoss_launch.parallel.engine.engine import refusal, scheduler_for
from gptoss_launch.parallel.engine.grammars import grammars_of
from gptoss_launch.parallel.engine.leader import Device, Leader
from gptoss_launch.parallel.engine.request import Request, Token
from gptoss_launch.parallel.engine.wire import Cancel, Generate, Message, Refused, Tokens
from gptoss_launch.parallel.errors import UserError
from prometheus_client import CollectorRegistry
from small_models import SPECS, checkpoint, plain_engine, plain_plan

CONTEXT = 2048
REASONING = 8
HELLO = [{"role": "user", "content": "Hello"}]
BODY = {"model": "tiny", "messages": HELLO}


class TinyEngine:
    """A replica whose leader runs in a thread of this process."""

    ready, dead, restarts, running = True, False, 0, 0

    def __init__(self, folder: Path) -> None:
        self.asked: list[Request] = []
        self._inbox: queue.Queue[Generate | Cancel | None] = queue.Queue()
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue]] = {}
        engine = plain_engine(plain_plan(folder, "fp32", context_tokens=CONTEXT, sequences=32))
        device = Device(engine.launch, engine.graphs.of, engine.sizes, ahead=True)
        doubts = partial(refusal, engine.plan)
        grammars = grammars_of(str(folder), SPECS["tiny"].vocab)
        self._leader = Leader(scheduler_for(engine.plan), device, self._send, doubts, grammars)
        self.thread = threading.Thread(target=self._lead)
        self.thread.start()

    def close(self) -> None:
        self._inbox.put(None)
        self.thread.join()

    async def generate(self, request: Request) -> AsyncGenerator[Token]:
        self.asked.append(request)
        stream: asyncio.Queue[Token | Refused] = asyncio.Queue()
        self._streams[request.id] = asyncio.get_running_loop(), stream
        self._inbox.put(Generate(request))
        try:
            while True:
                one = await stream.get()
                if isinstance(one, Refused):
                    raise UserError(one.message)
                yield one
                if one.finish_reason is not None:
                    return
        finally:
            del self._streams[request.id]
            self._inbox.put(Cancel(request.id))

    def _send(self, front_end: str, message: Message) -> None:
        everything = message.tokens if isinstance(message, Tokens) else [message] * isinstance(message, Refused)
        for one in everything:
            if one.request_id in self._streams:
                loop, stream = self._streams[one.request_id]
                loop.call_soon_threadsafe(stream.put_nowait, one)

    def _lead(self) -> None:
        while True:
            while self._leader.idle or not self._inbox.empty():
                message = self._inbox.get()
                if message is None:
                    return
                self._leader.take("test", message)
            self._leader.turn()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyEngine]:
    engine = TinyEngine(checkpoint("tiny", tmp_path_factory.getbasetemp()))
    yield engine
    engine.close()


@pytest.fixture
def ask(engine, tokenizer):
    """ask(fields, ...) -> what came of each, all of them asked at once: `Said`, or the error."""

    def run(*everything: dict) -> list:
        async def at_once() -> list:
            replicas = Replicas([engine], Dispatch(1), Metrics(CollectorRegistry(), "tiny", 1))
            app = create_app(Served("tiny", CONTEXT, tokenizer, replicas))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300) as http:
                client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0)
                work = [Said.of(client, {**BODY, "max_tokens": 400, **fields}) for fields in everything]
                return await asyncio.gather(*work, return_exceptions=True)

        return asyncio.run(at_once())

    return run


class Said:
    """One answer, streamed or whole."""

    def __init__(self) -> None:
        self.reasoning = self.content = self.arguments = self.reason = ""
        self.name: str | None = None
        self.calls = 0
        self.reasoning_tokens = 0

    @staticmethod
    async def of(client: openai.AsyncOpenAI, fields: dict) -> "Said":
        said = Said()
        ours = {name: fields[name] for name in ("max_reasoning_tokens",) if name in fields}
        fields = {name: value for name, value in fields.items() if name not in ours}
        if fields.get("stream"):
            fields |= {"stream_options": {"include_usage": True}}
            async for chunk in await client.chat.completions.create(**fields, extra_body=ours):
                for choice in chunk.choices:
                    said.add(choice.delta)
                    said.reason = choice.finish_reason or said.reason
                usage = chunk.usage
        else:
            answer = await client.chat.completions.create(**fields, extra_body=ours)
            said.add(answer.choices[0].message)
            said.reason, usage = answer.choices[0].finish_reason, answer.usage
        said.reasoning_tokens = usage.completion_tokens_details.reasoning_tokens
        return said

    def add(self, part) -> None:
        self.reasoning += getattr(part, "reasoning_content", None) or ""
        self.content += part.content or ""
        for call in part.tool_calls or ():
            self.calls += call.id is not None
            self.name = call.function.name or self.name
            self.arguments += call.function.arguments or ""


def demands(schema: dict, seed: int, **more) -> dict:
    """A final text of this schema, after at most REASONING tokens of thought; streamed or not, by seed."""
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema, "strict": True}}
    return {"response_format": form, "max_reasoning_tokens": REASONING, "seed": seed, "stream": bool(seed % 2)} | more


def tool(name: str, schema: dict | None, strict: bool | None = True) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


def check(answers: list, schemas: list[dict]) -> None:
    assert len(answers) == len(schemas)
    for said, schema in zip(answers, schemas, strict=True):
        assert isinstance(said, Said), said
        assert said.reason == "stop" and said.calls == 0, said.__dict__
        assert said.reasoning_tokens <= REASONING
        jsonschema.validate(json.loads(said.content), schema)


CALLED = {"pick": BOUNDED["enums"], "say": BOUNDED["const"], "say_it": None, "say-it-2": BOUNDED["numbers"]}
CALLS = [
    {"seed": seed, "stream": bool(seed % 2), "max_reasoning_tokens": 8, "tool_choice": "required"}
    | {"tools": [tool(name, schema) for name, schema in CALLED.items()]}
    for seed in range(5)
]
NAMED = [one | {"tool_choice": {"type": "function", "function": {"name": "say_it"}}} for one in CALLS[:1]]
FEW = list(BOUNDED.values())[:5]
CUT = [
    demands(BOUNDED["refs"], 1, max_tokens=24),
    demands(BOUNDED["refs"], 2, max_tokens=24),
    {"tools": [tool("pick", BOUNDED["enums"])], "tool_choice": "required", "max_tokens": 30, "seed": 1}
    | {"max_reasoning_tokens": 0},
    {"max_reasoning_tokens": 5, "max_tokens": 40, "seed": 4},
]
ANY = {"response_format": {"type": "json_object"}, "max_reasoning_tokens": 0, "max_tokens": 30, "seed": 1}


@pytest.fixture
def said(ask, together: dict[str, list]) -> dict[str, list]:
    """What the fast tests look at, asked for at once: steps of many take no longer than steps of one."""
    if not together:
        parts = {"texts": [demands(schema, seed) for seed, schema in enumerate(FEW)]}
        parts |= {"calls": CALLS, "named": NAMED, "cut": CUT, "any": [ANY]}
        answers = iter(ask(*(fields for part in parts.values() for fields in part)))
        together |= {name: list(islice(answers, len(part))) for name, part in parts.items()}
    return together


@pytest.fixture(scope="module")
def together() -> dict[str, list]:
    return {}


def test_texts_are_of_their_schema(said) -> None:
    check(said["texts"], FEW)
    spent = {one.reasoning_tokens for one in said["texts"]}
    assert REASONING in spent, "random weights do not end their reasoning themselves"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_texts_of_twenty_schemas(ask) -> None:
    everything = [(schema, seed) for schema in BOUNDED.values() for seed in range(10)]
    check(ask(*(demands(schema, seed) for schema, seed in everything)), [schema for schema, _ in everything])


def test_calls_are_of_a_tool_that_was_offered(said) -> None:
    for one in said["calls"] + said["named"]:
        assert isinstance(one, Said), one
        assert one.reason == "tool_calls" and one.calls == 1 and not one.content and one.reasoning_tokens <= 8
        jsonschema.validate(json.loads(one.arguments), CALLED[one.name] or thing({}))
    assert {one.name for one in said["named"]} == {"say_it"} and len({one.name for one in said["calls"]}) > 1


def test_cut_short_is_length(said) -> None:
    answers = said["cut"]
    assert [one.reason for one in answers] == ["length"] * 4
    for one in answers[:2]:
        assert one.content.startswith("{") and not one.content.endswith("}}")
    assert answers[2].name == "pick" and answers[2].arguments.startswith("{") and answers[2].calls == 1
    assert answers[3].reasoning_tokens <= 5 and answers[3].content, "the final channel is open"


def test_everything_together_on_responses(engine, tokenizer) -> None:
    """A schema, a tool that must be called, log probabilities and a stream in one request; then the answer after it."""
    schema = BOUNDED["enums"]
    form = {"format": {"type": "json_schema", "name": "form", "schema": schema, "strict": True}}
    pick = {"type": "function", "name": "pick", "parameters": schema, "strict": True}
    fields = {
        "model": "tiny",
        "tools": [pick],
        "text": form,
        "include": ["message.output_text.logprobs"],
        "stream": True,
    }
    fields |= {
        "top_logprobs": 2,
        "max_output_tokens": 400,
        "extra_body": {"max_reasoning_tokens": REASONING, "seed": 3},
    }

    async def talk() -> list:
        replicas = Replicas([engine], Dispatch(1), Metrics(CollectorRegistry(), "tiny", 1))
        transport = httpx.ASGITransport(create_app(Served("tiny", CONTEXT, tokenizer, replicas)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300) as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0)
            turns, said = [], {"input": "Hello", "tool_choice": "required"}
            for _ in range(2):
                turns.append([event async for event in await client.responses.create(**fields, **said)])
                response = turns[-1][-1].response
                call = next((item for item in response.output if item.type == "function_call"), None)
                result = {"type": "function_call_output", "call_id": call and call.call_id, "output": "ok"}
                said = {"input": [result], "previous_response_id": response.id, "tool_choice": "none"}
            return turns

    first, second = asyncio.run(talk())
    [call] = [item for item in first[-1].response.output if item.type == "function_call"]
    deltas = [event.delta for event in first if event.type == "response.function_call_arguments.delta"]
    assert call.name == "pick" and "".join(deltas) == call.arguments and first[-1].type == "response.completed"
    jsonschema.validate(json.loads(call.arguments), schema)
    [message] = [item for item in second[-1].response.output if item.type == "message"]
    jsonschema.validate(json.loads(message.content[0].text), schema)
    told = [entry for event in second if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert "".join(entry.token for entry in told) == message.content[0].text
    assert all(len(entry.top_logprobs) == 2 for entry in told)
    assert second[-1].response.usage.output_tokens_details.reasoning_tokens <= REASONING


@pytest.mark.parametrize("stream", [False, True])
def test_echo_tells_how_likely_the_prompt_is(engine, tokenizer, stream) -> None:
    """What is said of tokens of a prompt is what was said of them as they were drawn."""
    texts = ["Once upon", "The 漢 of a"]

    async def talk() -> list[dict[int, list]]:
        replicas = Replicas([engine], Dispatch(1), Metrics(CollectorRegistry(), "tiny", 1))
        transport = httpx.ASGITransport(create_app(Served("tiny", CONTEXT, tokenizer, replicas)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300) as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0)

            async def complete(**fields) -> dict[int, list]:
                fields |= {"model": "tiny", "logprobs": 2, "seed": 5, "stream": stream}
                answer = await client.completions.create(**fields)
                rows: dict[int, list] = {}
                for choice in [c async for chunk in answer for c in chunk.choices] if stream else answer.choices:
                    told, row = choice.logprobs, rows.setdefault(choice.index, ["", [], [], [], []])
                    row[0] += choice.text
                    for place, name in enumerate(("tokens", "token_logprobs", "top_logprobs", "text_offset"), 1):
                        row[place] += getattr(told, name)
                return rows

            drawn = await complete(prompt=texts, max_tokens=8)
            of = {spelled(id, tokenizer): id for id in range(tokenizer.vocab_size)}
            whole = [[*tokenizer.encode(text), *map(of.get, drawn[place][1])] for place, text in enumerate(texts)]
            return [drawn, await complete(prompt=[*whole, whole[0][:1]], n=2, max_tokens=3, echo=True)]

    drawn, echoed = asyncio.run(talk())
    assert sorted(echoed) == list(range(6))
    for place, text in enumerate(texts):
        for choice in (2 * place, 2 * place + 1):
            before = len(tokenizer.encode(text))
            tokens, values, tops, offsets = echoed[choice][1:]
            assert (values[0], tops[0], offsets[0]) == (None, None, 0) and None not in values[1:]
            count = len(drawn[place][1])
            assert tokens[before : before + count] == drawn[place][1]
            assert values[before : before + count] == pytest.approx(drawn[place][2], abs=1e-3)
            assert len(tokens) == len(values) == len(tops) == len(offsets) and offsets == sorted(offsets)
            assert before + count <= len(tokens) <= before + count + 3  # it may stop
            places = [len(text) + place for place in drawn[place][4]]
            assert offsets[before : before + count] == places or "\ufffd" in echoed[choice][0]
            assert echoed[choice][0].startswith(text)
    assert echoed[4][2][0] is None and 1 <= len(echoed[4][1]) <= 4


def test_any_object(said) -> None:
    [one] = said["any"]
    assert one.reasoning == "" and one.reasoning_tokens == 0 and re.match(r'\{("|\}$)', one.content)
    if one.reason == "stop":
        assert isinstance(json.loads(one.content), dict)


@pytest.mark.slow
def test_auto_leaves_the_choice_and_holds_strict_calls_to_their_schema(ask) -> None:
    tools = [tool("pick", BOUNDED["enums"]), tool("loose", {"type": "object", "not": {}}, None)]
    fields = demands(BOUNDED["booleans"], 0, tools=tools, parallel_tool_calls=False)
    answers = ask(*(fields | {"seed": seed, "stream": bool(seed % 2), "max_tokens": 120} for seed in range(16)))
    ends = {one.reason for one in answers}
    for one in answers:
        if one.reason == "tool_calls" and one.name == "pick":
            jsonschema.validate(json.loads(one.arguments), BOUNDED["enums"])
        if one.reason == "stop":  # what was said before it, in the commentary channel, is content as well
            jsonschema.validate(json.loads(one.content[one.content.rindex("{") :]), BOUNDED["booleans"])
    assert "stop" in ends and "tool_calls" in ends


def test_the_model_reads_the_format(ask, engine, tokenizer) -> None:
    schema = thing({"ja": {"type": "boolean", "description": "größer?"}})
    named = {"name": "form", "schema": schema, "description": "Two\nlines"}
    ask({"response_format": {"type": "json_schema", "json_schema": named}, "max_tokens": 1})
    prompt = tokenizer.decode(engine.asked[-1].prompt_tokens)
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    assert f"<|start|>developer<|message|># Response Formats\n\n## form\n\n// Two\n// lines\n{text}<|end|>" in prompt


def test_what_harmony_brings_about_by_itself_is_not_constrained(ask, engine) -> None:
    """Such requests wait for no grammar."""
    loose = tool("loose", {"type": "object", "not": {}}, None)
    ask({"max_tokens": 1}, {"max_tokens": 1, "tools": [loose]}, {"max_tokens": 1, "response_format": {"type": "text"}})
    ask({"max_tokens": 1, "tools": [tool("pick", BOUNDED["enums"])], "tool_choice": "none"})
    assert [request.constraint for request in engine.asked[-4:]] == [None] * 4


def test_a_grammar_without_any_text_is_an_error_that_says_so(ask, engine) -> None:
    """Only the engine finds out; the stream of a request that has begun ends with the error."""
    asked = len(engine.asked)
    endless = {"$ref": "#"}
    late = {"tools": [tool("endless", endless)], "tool_choice": "required", "max_reasoning_tokens": 4}
    for error in ask(demands(endless, 0), demands(endless, 1), late, late | {"stream": True}):
        assert isinstance(error, openai.APIError) and "no way on" in error.message, error
    assert len(engine.asked) == asked + 4


SCHEMA = "response_format.json_schema.schema"
BAD = {
    "no such type": (demands({"type": "strng"}, 0), SCHEMA, "strng"),
    "nothing fits": (demands({"type": "integer", "minimum": 2, "maximum": 1}, 0), SCHEMA, "minimum (2)"),
    "no such reference": (demands({"$ref": "#/$defs/x"}, 0), SCHEMA, "/$defs/x"),
    "a keyword that strict cannot hold": (demands({"not": {}}, 0), SCHEMA, "not"),
    "a pattern with look-ahead": (demands({"type": "string", "pattern": "(?=a)"}, 0), SCHEMA, "look-around"),
    "too large": (demands({"enum": ["x" * 1000 + str(i) for i in range(200)]}, 0), SCHEMA, "131072"),
    "a tool's schema": (
        {"tools": [tool("a", {}), tool("b", {"type": 5})], "tool_choice": "required"},
        "tools.1.function.parameters",
        "type",
    ),
    "the same tool twice": ({"tools": [tool("a", {})] * 2}, "tools", "'a'"),
    "required, of no tools": ({"tool_choice": "required"}, "tool_choice", "required"),
    "a tool that is not there": (
        {"tools": [tool("a", {})], "tool_choice": {"type": "function", "function": {"name": "b"}}},
        "tool_choice",
        "'b'",
    ),
    "no such choice": ({"tools": [tool("a", {})], "tool_choice": "perhaps"}, "tool_choice", ""),
    "no such format": ({"response_format": {"type": "yaml"}}, "response_format", "yaml"),
    "no name": (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format.json_schema.name",
        "",
    ),
    "schema is a list": (demands([], 0), SCHEMA, ""),
    "less than no reasoning": ({"max_reasoning_tokens": -1}, "max_reasoning_tokens", ""),
    "reasoning is text": ({"max_reasoning_tokens": "1"}, "max_reasoning_tokens", ""),
}


def test_bad_demands_are_refused_by_name_before_any_work(ask, engine) -> None:
    asked = len(engine.asked)
    for name, error in zip(BAD, ask(*(fields for fields, _, _ in BAD.values())), strict=True):
        _, param, word = BAD[name]
        assert isinstance(error, openai.BadRequestError), (name, error)
        assert error.param == param and param in error.message and word in error.message, (name, error.message)
    assert len(engine.asked) == asked


def test_a_schema_deeper_than_a_body_may_be_does_not_compile_either() -> None:
    deep = json.loads('{"items":' * 160 + "{}" + "}" * 160)
    assert "recursion" in (flaw_of(json_grammar(deep, strict=True)) or "")

"""Built-in tools: python and browser, called by scripted answers and run by an MCP server in the test's own process."""

import asyncio
import json
import logging
import socket
import threading
import typing

import openai
import pytest
import uvicorn
from gptoss_launch.launch.api.constraint import constraint_for
from gptoss_launch.launch.api.tool_server import find_tools
from gptoss_launch.parallel.errors import UserError
from in_process import HELLO, Call, ScriptedEngine, served
from openai.types.responses import ResponseStreamEvent

CODE = "print(6 * 7)"
THINKS = "<|channel|>analysis<|message|>I compute.<|end|><|start|>assistant"
RUNS = f"{THINKS}<|channel|>analysis to=python code<|message|>{CODE}"
SEARCHES = '<|channel|>analysis to=browser.search code<|message|>{"query": "Bern", "topn": 3}'
ANSWERS = "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>It is 42.<|return|>"
CALLS = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
PYTHON, BROWSER = [{"type": "code_interpreter"}], [{"type": "web_search"}]
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TYPES = {
    kind: event
    for event in typing.get_args(typing.get_args(ResponseStreamEvent)[0])
    for kind in typing.get_args(event.model_fields["type"].annotation)
}


class Turns(ScriptedEngine):
    """One script after another."""

    def __init__(self, *scripts):
        super().__init__([])
        self.scripts = list(scripts)

    async def generate(self, request):
        self.script = self.scripts[len(self.asked)]
        async for token in super().generate(request):
            yield token


@pytest.fixture(scope="module")
def tools():
    """A tool server of its own kind: `ran` holds what it was asked."""
    from mcp.server.mcpserver import MCPServer

    logging.getLogger("mcp").setLevel(logging.CRITICAL)
    server = MCPServer("both")
    server.ran = []

    @server.tool()
    async def python(code: str) -> str:
        server.ran.append(code)
        if code == "hang":
            await asyncio.sleep(60)
        if code == "raise":
            raise ValueError("no")
        return "42" * (5000 if code == "long" else 1)

    @server.tool()
    async def search(query: str, topn: int = 10) -> str:
        server.ran.append((query, topn))
        return f"[0] {query} is a town."

    @server.tool()
    async def open(id: str | int = -1) -> str:
        return f"opened {id}"

    @server.tool()
    async def find(pattern: str) -> str:
        return f"found {pattern}"

    return server


def start(tokenizer, tools, *scripts):
    tools.ran.clear()
    engine = Turns(*scripts)
    return Call(served(tokenizer, engine, tools=asyncio.run(find_tools([tools])))), engine


def respond(call, **fields):
    """A response, or its events, each checked against the client's own type."""
    body = {"model": "tiny", "input": "Hello"} | fields
    answer = call("POST", "/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return answer.json()
    events = [json.loads(block.split("data: ")[1]) for block in answer.text.split("\n\n")[:-1]]
    for event in events:
        TYPES[event["type"]].model_validate(event)
    return events


@pytest.mark.parametrize("stream", [False, True])
def test_chat_runs_python_and_goes_on(tokenizer, markup, tools, stream):
    call, engine = start(tokenizer, tools, markup(RUNS + "<|call|>"), markup(ANSWERS))
    answer = call.chat(tools=PYTHON, max_tokens=200, stream=stream)
    if stream:
        said = [
            "".join(getattr(c.choices[0].delta, name, None) or "" for c in answer) for name in ("content", "reasoning")
        ]
        assert said == ["It is 42.", f"I compute.{CODE}So."] and answer[-1].choices[0].finish_reason == "stop"
    else:
        [choice] = answer.choices
        assert (choice.message.content, choice.finish_reason) == ("It is 42.", "stop")
        assert answer.usage.completion_tokens == len(markup(RUNS + "<|call|>" + ANSWERS))
    assert tools.ran == [CODE]
    first, second = engine.asked
    told = tokenizer.decode(first.prompt_tokens)
    assert "## python" in told and "## browser" not in told
    said = "<|start|>python to=assistant<|channel|>analysis<|message|>42<|end|><|start|>assistant"
    assert list(second.prompt_tokens) == [*first.prompt_tokens, *engine.scripts[0], *markup(said)]
    if not stream:
        assert answer.usage.prompt_tokens == len(first.prompt_tokens) + len(markup(said))
        assert answer.usage.total_tokens == len(second.prompt_tokens) + len(engine.scripts[1])
    assert second.max_tokens == 200 - len(engine.scripts[0]) and second.sampling == first.sampling
    assert not engine.cancelled


def test_responses_tell_of_each_run(tokenizer, markup, tools):
    scripts = [markup(text) for text in (RUNS + "<|call|>", SEARCHES + "<|call|>", ANSWERS)]
    call, engine = start(tokenizer, tools, *scripts)
    fields = {"tools": PYTHON + BROWSER, "include": ["code_interpreter_call.outputs"]}
    events = respond(call, **fields, stream=True)
    response = events[-1]["response"]
    kinds = ["reasoning", "code_interpreter_call", "web_search_call", "reasoning", "message"]
    assert [item["type"] for item in response["output"]] == kinds and response["status"] == "completed"
    ran, searched = response["output"][1:3]
    assert (ran["code"], ran["outputs"], ran["status"]) == (CODE, [{"type": "logs", "logs": "42"}], "completed")
    assert searched["action"] == {"type": "search", "query": "Bern", "queries": ["Bern"]}
    assert searched["status"] == "completed" and tools.ran == [CODE, ("Bern", 3)]
    names = [event["type"].removeprefix("response.") for event in events if event.get("item_id") == ran["id"]]
    code = [name for name in names if name != "code_interpreter_call_code.delta"]
    assert code == [
        *("code_interpreter_call.in_progress", "code_interpreter_call_code.done"),
        *("code_interpreter_call.interpreting", "code_interpreter_call.completed"),
    ]
    deltas = [event["delta"] for event in events if event["type"].endswith("_code.delta")]
    assert "".join(deltas) == CODE
    names = [event["type"].rpartition(".")[2] for event in events if event.get("item_id") == searched["id"]]
    assert names == ["in_progress", "searching", "completed"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert response["usage"]["output_tokens"] == sum(map(len, scripts))
    assert response["usage"]["total_tokens"] == len(engine.asked[-1].prompt_tokens) + len(scripts[-1])
    # What was kept is taken up again, by its id and as the items themselves.
    for more in ({"previous_response_id": response["id"], "input": "More"}, {"input": [*response["output"], *HELLO]}):
        call.served.replicas._engines[0].scripts += [markup(ANSWERS)]
        again = respond(call, **more)
        assert again["status"] == "completed"
    shown = tokenizer.decode(call.served.replicas._engines[0].asked[-1].prompt_tokens)
    assert "It is 42." in shown and CODE not in shown  # as reasoning, it is left out


@pytest.mark.parametrize(
    ("calls", "told"),
    [
        ("<|channel|>analysis to=python code<|message|>raise<|call|>", "Error executing tool python"),
        ("<|channel|>analysis to=browser.click<|message|>{}<|call|>", "browser has no function click"),
        ("<|channel|>analysis to=browser.find code<|message|>{oops<|call|>", "browser.find takes a JSON object"),
        ("<|channel|>analysis to=browser.find code<|message|>[1]<|call|>", "browser.find takes a JSON object"),
        ("<|channel|>analysis to=browser.find code<|message|>{}<|call|>", "pattern"),
    ],
)
def test_what_a_tool_cannot_do_is_told_to_the_model(tokenizer, markup, tools, calls, told):
    call, engine = start(tokenizer, tools, markup(calls), markup(ANSWERS))
    response = respond(call, tools=PYTHON + BROWSER)
    assert [item["status"] for item in response["output"]] == ["failed", "completed", "completed"]
    assert told in tokenizer.decode(engine.asked[1].prompt_tokens)


def test_limits_hold_for_all_turns(tokenizer, markup, tools):
    ran = markup(RUNS + "<|call|>")
    # max_tokens is used up by the first turn
    call, engine = start(tokenizer, tools, ran)
    assert call.chat(tools=PYTHON, max_tokens=len(ran)).choices[0].finish_reason == "length"
    call, engine = start(tokenizer, tools, ran, markup(ANSWERS))
    response = respond(call, tools=PYTHON, max_output_tokens=len(ran) + 3)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    # a call that is cut short is not run
    call, engine = start(tokenizer, tools, ran)
    response = respond(call, tools=PYTHON, max_output_tokens=len(ran) - 1)
    assert response["output"][-1]["status"] == "incomplete" and tools.ran == []
    # no more runs than the client allows
    call, engine = start(tokenizer, tools, ran, ran, markup(ANSWERS))
    response = respond(call, tools=PYTHON, max_tool_calls=1)
    assert tools.ran == [CODE] and "no more calls" in tokenizer.decode(engine.asked[2].prompt_tokens)
    # an output that is too long is cut
    call, engine = start(
        tokenizer, tools, markup("<|channel|>analysis to=python<|message|>long<|call|>"), markup(ANSWERS)
    )
    assert respond(call, tools=PYTHON)["status"] == "completed"
    assert "[the rest was cut off]" in tokenizer.decode(engine.asked[1].prompt_tokens)
    assert len(engine.asked[1].prompt_tokens) < 1024
    # reasoning that was spent is not given again
    call, engine = start(tokenizer, tools, ran, markup(ANSWERS))
    call.chat(tools=PYTHON, extra_body={"max_reasoning_tokens": 20})
    budgets = [asked.constraint.max_reasoning_tokens for asked in engine.asked]
    assert budgets == [20, 20 - len(markup("I compute.<|end|>"))]


def test_a_function_ends_the_answer(tokenizer, markup, tools):
    call, engine = start(tokenizer, tools, markup(RUNS + "<|call|>"), markup(CALLS))
    answer = call.chat(tools=[*PYTHON, FUNCTION])
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls[0].function.name == "f"
    assert tools.ran == [CODE] and len(engine.asked) == 2


def test_a_client_that_leaves_ends_the_tool(tokenizer, markup, tools):
    hangs = markup("<|channel|>analysis to=python<|message|>hang<|call|>")
    call, engine = start(tokenizer, tools, hangs, markup(ANSWERS))

    async def leave():
        async with call.http() as http:
            body = {"model": "tiny", "messages": HELLO, "tools": PYTHON}
            asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            while not tools.ran:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for _ in range(100):  # its session ends with it
                if not (others := {task for task in others if not task.done()}):
                    return
                await asyncio.sleep(0.05)
            raise AssertionError(others)

    asyncio.run(leave())
    assert len(engine.asked) == 1


def test_without_a_tool_server_they_are_refused_by_name(tokenizer, markup, tools):
    call = Call(served(tokenizer, ScriptedEngine(markup(ANSWERS))))
    for ask in (
        lambda: call.chat(tools=[FUNCTION, *PYTHON]),
        lambda: call.ask(
            lambda client: client.responses.create(
                model="tiny", input="x", tools=[{"type": "function", "name": "f"}, *PYTHON]
            )
        ),
    ):
        with pytest.raises(
            openai.BadRequestError, match="code_interpreter takes a tool server that offers python"
        ) as caught:
            ask()
        assert (caught.value.param, caught.value.code) == ("tools.1.type", "unsupported_tool")
    # and what is not offered is not run
    call, engine = start(tokenizer, tools, markup(RUNS + "<|call|>"))
    answer = call.chat()
    assert tools.ran == [] and answer.choices[0].message.reasoning.endswith(CODE)
    call, engine = start(tokenizer, tools, markup(RUNS + "<|call|>"))
    call.chat(tools=PYTHON, tool_choice="none")
    assert tools.ran == [] and "## python" not in tokenizer.decode(engine.asked[0].prompt_tokens)


def test_a_constraint_leaves_room_for_runs(tokenizer, markup):
    made = constraint_for(tokenizer, max_reasoning_tokens=5, builtins={"python", "browser"})
    headers = {tokenizer.decode(header) for section in made.sections for header in section.headers}
    assert {
        "<|channel|>analysis to=python code<|message|>",
        " to=browser.open<|channel|>analysis<|message|>",
    } <= headers
    [runs] = [section for section in made.sections if section.ends == (tokenizer.special["<|call|>"],)]
    assert not runs.reasoning and len(runs.headers) == 16
    assert constraint_for(tokenizer, builtins={"python"}) is None


def test_over_http(tools):
    """A server as it stands on the network, which remembers its session."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(tools.streamable_http_app(), log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"

    async def use():
        found = await find_tools([url])
        async with found.session() as session:
            return found.offered, [await session.run("python", "1"), await session.run("browser.open", '{"id": 3}')]

    try:
        offered, outputs = asyncio.run(use())
    finally:
        server.should_exit = True
        thread.join(20)
    assert offered == {"python", "browser"}
    assert [(output.text, output.failed) for output in outputs] == [("42", False), ("opened 3", False)]


def test_what_is_no_tool_server(tools):
    from mcp.server.mcpserver import MCPServer

    other = MCPServer("other")
    other.tool("click")(lambda: "x")
    with pytest.raises(UserError, match="it offers click"):
        asyncio.run(find_tools([other]))
    with pytest.raises(UserError, match="--tool-server http://127.0.0.1:9/mcp"):
        asyncio.run(find_tools(["http://127.0.0.1:9/mcp"]))
    assert asyncio.run(find_tools([tools])).offered == {"python", "browser"}

"""Bodies that nobody would write, and clients that leave: no 5xx, no stuck stream, no request or task left behind."""

import asyncio
import gc
import json
import random
import tracemalloc
from itertools import islice

import pytest
from gptoss_launch.launch.api.app import create_app
from in_process import DrawingEngine, exchange, served

PART = {"type": "text", "text": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
# Right values of each field; a body takes some of them, and now and then anything at all.
SAMPLING = {
    "stream": [True, False, None],
    "stream_options": [{"include_usage": True}, {}],
    "n": [1, 2, 5, 128],
    "max_tokens": [1, 2, 7, 30],
    "stop": ["e", ["a", " t"], [], None, "\u0000", "漢"],
    "stop_token_ids": [[3], [], [1, 2, 1007]],
    "seed": [0, 7, -1, 2**63 - 1],
    "temperature": [0, 1e-300, 0.7, 2],
    "top_p": [1e-300, 0.5, 1],
    "top_k": [-1, 0, 1, 1024],
    "min_p": [0, 0.1, 1],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2, 0, 2.0],
    "repetition_penalty": [0.1, 1, 1.5, 10],
    "logit_bias": [{}, {"1": 100}, {"1": -100, "2": 0.5}],
    "deadline_s": [1e-300, 5, 1e300],
    "user": ["", "x" * 512],
    "metadata": [{}, {"a": "b"}],
}
FIELDS = {
    "/v1/chat/completions": SAMPLING
    | {
        "messages": [
            [{"role": "user", "content": "x"}],
            [{"role": "system", "content": ""}, {"role": "user", "content": [PART, PART]}],
            [{"role": "user", "content": ""}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c", "content": "<|end|>"}],
            [{"role": "developer", "content": "x"}, {"role": "assistant", "content": "y", "reasoning": "z"}],
        ],
        "logprobs": [True, False],
        "top_logprobs": [0, 20],
        "max_completion_tokens": [1, 9],
        "reasoning_effort": ["low", "high"],
        "tools": [[TOOL], []],
        "tool_choice": ["auto", "none"],
        "parallel_tool_calls": [True],
    },
    "/v1/completions": SAMPLING
    | {
        "prompt": ["x", ["x", "y"], [1, 2], [[1], [1007, 3]], "漢\u0000😀"],
        "echo": [True, False],
        "logprobs": [0, 3, 20],
        "best_of": [1],
    },
    "/tokenize": {
        "prompt": ["", "x", "<|start|>", "漢"],
        "messages": [[{"role": "user", "content": "x"}]],
        "tools": [[TOOL]],
        "add_generation_prompt": [True, False],
        "return_token_strs": [True, False],
    },
    "/detokenize": {"tokens": [[], [0], [1023, 1007, 5] * 20]},
}
NEEDED = {"/v1/chat/completions": ("model", "messages"), "/v1/completions": ("model", "prompt")}
NEEDED |= {"/tokenize": ("messages",), "/detokenize": ("tokens",)}
ODD = [None, True, False, 0, 1, -1, 0.5, 2**31, 2**64, -(2**63), 1e308, float("nan"), float("inf"), "", "x", "\u0000"]
ODD += ["漢😀", "<|end|>", "auto", [], {}, [[]], [None], {"": None}, {"type": "text"}, {"role": "user"}, "9" * 400]


def anything(draw: random.Random, depth: int = 0):
    if depth > 3 or draw.random() < 0.6:
        return draw.choice(ODD)
    if draw.random() < 0.5:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    names = ("role", "content", "type", "text", "function", "name", "a", "", "parameters", "tool_call_id")
    return {draw.choice(names): anything(draw, depth + 1) for _ in range(draw.randrange(4))}


def replaced(draw: random.Random, value):
    """`value` with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(list(value))
        if draw.random() < 0.1:
            return {key: one for key, one in value.items() if key != name}
        if draw.random() < 0.1:
            return value | {draw.choice(["a", "", "type", "name", "n"]): anything(draw)}
        return value | {name: replaced(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], replaced(draw, value[place]), *value[place + 1 :]]
    return anything(draw)


def random_body(draw: random.Random, path: str, wild: bool = True) -> bytes:
    fields = {"model": ["tiny"]} | FIELDS[path]
    names = {*NEEDED[path], *draw.sample(list(fields), draw.randrange(min(7, len(fields))))}
    body = {name: draw.choice(fields[name]) for name in names}
    for _ in range(draw.choice((0, 0, 1, 1, 2, 5)) if wild else 0):
        body = replaced(draw, body) if draw.random() < 0.97 else anything(draw)
    return json.dumps(body, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")


def mutated(draw: random.Random, body: bytes) -> bytes:
    """A few bytes changed, dropped, doubled, or all cut off after one; often only a digit or a letter is another."""
    data = bytearray(body)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, end = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
        match draw.randrange(7):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[at : min(end, at + 8)]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:at] = draw.choice(
                    (b'"', b"{", b"[", b"\\u", b"\\ud83d", b"1e999", b"-", b"null", b"\x00", b"\xff")
                )
            case 4 if draw.random() < 0.2:
                del data[at:]
            case _:
                digits = [place for place, byte in enumerate(data) if 48 <= byte < 58]
                if digits:
                    data[draw.choice(digits)] = draw.randrange(48, 58)
    return bytes(data)


def check_answer(got, body):
    if got.status >= 400:
        assert got.status < 500, body
        error = got.error
        assert error.keys() >= {"message", "type", "param", "code"} and error["message"], body
    elif got.headers.get("content-type", "").startswith("text/event-stream"):
        assert got.events[-1] == "[DONE]", (body, got.events[-1])
        assert all("error" not in json.loads(event) for event in got.events[:-1]), body
    else:
        json.loads(got.body)


@pytest.fixture
def front(tokenizer):
    """(app, the engine behind it)"""
    engine = DrawingEngine(1000, tuple(tokenizer.special.values()), ends=0.2)
    return create_app(served(tokenizer, engine)), engine


async def send_all(front, bodies, leaving: float) -> dict[int, int]:
    """Several at a time. Returns how many answers had which status; leaving: the share of clients that do."""
    app, engine = front
    statuses: dict[int, int] = {}
    draw = random.Random(0)

    async def one(path, body):
        leave_after = draw.choice((0, 1, 2, 5, 20)) if draw.random() < leaving else None
        got = await asyncio.wait_for(exchange(app, "POST", path, body, leave_after), 60)
        if leave_after is None:
            check_answer(got, body)
        assert got.status < 500, body
        statuses[got.status] = statuses.get(got.status, 0) + 1

    waiting = iter(bodies)
    while group := list(islice(waiting, 8)):
        await asyncio.gather(*(one(path, body) for path, body in group))
        assert not engine.open, "a request was left behind"
        assert len(asyncio.all_tasks()) == 1, "a task was left behind"
        engine.asked.clear()
    return statuses


def bodies(count: int, seed: int, mutate: bool):
    draw = random.Random(seed)
    for _ in range(count):
        path = draw.choice([*FIELDS, "/v1/chat/completions", "/v1/completions"])
        body = random_body(draw, path, wild=not mutate)
        yield path, mutated(draw, body) if mutate else body


@pytest.mark.parametrize(
    ("count", "mutate"),
    [
        (200, False),
        (100, True),
        pytest.param(5000, False, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(2000, True, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_no_body_breaks_it(front, count, mutate):
    statuses = asyncio.run(send_all(front, bodies(count, count, mutate), leaving=0.2))
    # the bodies are worth something: many get through to the engine, many do not
    assert sum(statuses.values()) == count and statuses[400] > count / 10
    assert statuses[200] > count / 20, statuses


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_stays_flat(front):
    def used_bytes(seed):
        asyncio.run(send_all(front, bodies(200, seed, seed % 2 == 1), leaving=0.2))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    used_bytes(0)  # what is made once
    tracemalloc.start()
    try:
        used_bytes(1)
        before = used_bytes(2)
        after = [used_bytes(seed) for seed in (3, 4, 5)]
    finally:
        tracemalloc.stop()
    print(f"bytes more after {200 * len(after)} requests: {[size - before for size in after]}")
    assert after[-1] - before < 60_000  # 100 bytes a request

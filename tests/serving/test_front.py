"""The front door: keys and their limits, cross-origin pages, request ids, the access log, spans, and what is too deep.

In this process, without sockets; tests/serving/test_connections.py has those.
"""

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from gptoss_launch.launch.api.depth import MOST_DEEP, check_depth
from gptoss_launch.launch.api.errors import ApiError
from gptoss_launch.launch.api.gate import ENTER_PER_TURN, Gate
from gptoss_launch.launch.api.record import AccessLog
from gptoss_launch.launch.commands.serve import open_door
from gptoss_launch.launch.keys import KEYS_VARIABLE, find_key, read_keys
from gptoss_launch.launch.settings import ServeSettings
from gptoss_launch.parallel.errors import UserError
from scripted import Application, Scripted

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "the very private prompt"}]}
ANSWER = "<|channel|>final<|message|>the very private answer<|return|>"
CLOSED = ("/v1/models", "/v1/models/tiny", "/v1/nowhere", "/plan", "/tokenize", "/V1/models", "//v1/models", "/v1")
OPEN = ("/", "/health", "/ready", "/metrics", "/openapi.json")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def ask(tokenizer, tiny_plan, markup):
    """ask(method, path, ..., front={of Front}) -> the response."""
    applications: dict[str, Application] = {}

    def send(method: str, path: str, front: dict | None = None, **arguments) -> httpx.Response:
        name = repr(sorted((front or {}).items(), key=str))
        if name not in applications:
            applications[name] = Application(Scripted(markup(ANSWER)), tokenizer, tiny_plan, **front or {})

        async def call() -> httpx.Response:
            async with applications[name].client() as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(call())

    return send


# --- keys


def test_keys_of_a_file_and_of_the_environment(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\nfirst-key\n\nsecond-key  name=team-b per_minute=60 at_once=4\n")
    first, second, third = read_keys(path, {KEYS_VARIABLE: "third-key name=ci"})
    assert (first.name, first.per_minute, first.at_once) == ("key-1", None, None)
    assert (second.name, second.per_minute, second.at_once) == ("team-b", 60, 4)
    assert find_key((first, second, third), b"third-key") is third
    assert find_key((first, second, third), b"second-key") is second
    for wrong in (b"", b"first-ke", b"first-key ", b"\xff", b"name=ci"):
        assert find_key((first, second, third), wrong) is None
    assert read_keys(None, {}) == ()
    assert "first-key" not in repr(first) and "second-key" not in repr(second)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no key"),
        ("# nothing\n", "no key"),
        ("secret-key limit=3", "line 1: a word after the key is no setting"),
        ("secret-key per_minute=0", "per_minute=0 is no number above 0"),
        ("secret-key per_minute=nan", "is no number above 0"),
        ("secret-key at_once=1.5", "is no number from 1"),
        ("secret-key name=a b", "is no setting"),
        ("secret-key\nsecret-key name=b", "the same"),
        ("secret-key name=a\nother name=a", "called a"),
        ("secret-k\u00e9y", "ASCII"),
    ],
)
def test_a_wrong_file_of_keys_is_explained_without_the_key(tmp_path, text, said):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_keys(path, {})
    assert said in str(error.value) and "secret" not in str(error.value)


def test_no_file_of_keys(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_keys(tmp_path / "none", {})


def test_the_key_is_asked_for_on_every_route(ask):
    front = {"keys": read_keys(None, {KEYS_VARIABLE: "secret"})}
    bodies = {
        "/v1/chat/completions": BODY,
        "/v1/completions": {"model": "tiny", "prompt": "x"},
        "/v1/responses": {"model": "tiny", "input": "x"},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [1]},
    }
    for path, body in bodies.items():
        assert ask("POST", path, front, json=body).status_code == 401, path
        assert ask("POST", path, front, json=body, headers=bearer("secret")).status_code == 200, path


def test_the_key_opens_everything_but_what_is_open(ask, tmp_path):
    front = {"keys": read_keys(None, {KEYS_VARIABLE: "good-key\nsecond"})}
    wrong = (
        {},
        bearer("wrong"),
        {"Authorization": "good-key"},
        {"Authorization": b"Bearer \xff"},
        {"X-Api-Key": "good-key"},
    )
    for headers in wrong:
        for path in CLOSED:
            answer = ask("GET", path, front, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", path
            assert answer.headers["www-authenticate"] == "Bearer"
        assert ask("POST", "/v1/chat/completions", front, json=BODY, headers=headers).status_code == 401
        for path in OPEN:
            assert ask("GET", path, front, headers=headers).status_code == 200, path
    for key in ("good-key", "second"):
        assert ask("GET", "/plan", front, headers=bearer(key)).status_code == 200
        answer = ask("POST", "/v1/chat/completions", front, json=BODY, headers={"authorization": f"bearer  {key}"})
        assert answer.json()["choices"][0]["message"]["content"] == "the very private answer"
    assert "good-key" not in ask("GET", "/metrics", front).text


# --- limits, by an application that waits


class Waiting:
    """Counts who is in; answers 200 when told."""

    def __init__(self) -> None:
        self.inside = 0
        self.go = asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.inside += 1
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}", "more_body": False})
        self.inside -= 1


async def knock(gate: Gate, key: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://test") as client:
        return await client.get("/v1/models", headers=bearer(key))


async def settle(waiting: Waiting, wanted: int) -> None:
    for _ in range(1000):
        if waiting.inside == wanted:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{waiting.inside} inside, not {wanted}")


def test_a_key_has_so_many_requests_at_once_and_all_together_have_so_many():
    async def run() -> None:
        waiting = Waiting()
        gate = Gate(waiting, read_keys(None, {KEYS_VARIABLE: "two at_once=2\nfree"}), most=5)
        inside = [asyncio.create_task(knock(gate, "two")) for _ in range(2)]
        await settle(waiting, 2)
        refused = await knock(gate, "two")
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "too_many_requests" and refused.json()["error"]["retryable"] is True
        inside += [asyncio.create_task(knock(gate, "free")) for _ in range(3)]
        await settle(waiting, 5)
        assert (await knock(gate, "free")).status_code == 429
        assert (await knock(gate, "wrong")).status_code == 401
        inside.pop().cancel()  # a client that leaves makes room
        await settle(waiting, 5)
        await asyncio.sleep(0)
        inside.append(asyncio.create_task(knock(gate, "free")))
        await settle(waiting, 6)  # the one that left never says that it is out
        waiting.go.set()
        assert {answer.status_code for answer in await asyncio.gather(*inside)} == {200}
        assert (await knock(gate, "two")).status_code == 200

    asyncio.run(run())


def test_bodies_under_way_are_so_large_together(ask):
    """What one has sent so far counts until it is answered or gone; others are told to come back."""

    async def run() -> None:
        sizes: list[int] = []

        async def app(scope, receive, send):
            more = True
            while more:
                message = await receive()
                sizes.append(len(message["body"]))
                more = message["more_body"]

        gate = Gate(app, (), most=9, most_body_bytes=1000)

        async def upload(*parts: int, end: asyncio.Event | None = None) -> None:
            left = [{"type": "http.request", "body": b"x" * part, "more_body": True} for part in parts]

            async def receive():
                if left:
                    return left.pop(0)
                if end is not None:
                    await end.wait()
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(message):
                raise AssertionError(message)

            await gate({"type": "http", "path": "/v1/chat/completions", "headers": []}, receive, send)

        end = asyncio.Event()
        slow = asyncio.create_task(upload(300, 301, end=end))
        while len(sizes) < 2:
            await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await upload(200, 200)
        assert refused.value.status == 429 and refused.value.retry_after_s == 1
        await upload(399)
        end.set()
        await slow
        await upload(500, 500)
        assert sizes == [300, 301, 200, 399, 0, 0, 500, 500, 0]

    asyncio.run(run())
    answer = ask("POST", "/v1/chat/completions", {"most_body_bytes": 10}, json=BODY)
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "too_many_requests"


def test_a_key_has_so_many_requests_a_minute():
    async def run() -> None:
        clock_s, waiting = [100.0], Waiting()
        waiting.go.set()
        keys = read_keys(None, {KEYS_VARIABLE: "slow per_minute=3\nfree"})
        gate = Gate(waiting, keys, most=9, clock_s=lambda: clock_s[0])
        assert [(await knock(gate, "slow")).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = await knock(gate, "slow")
        assert refused.headers["retry-after"] == "20" and "more requests a minute" in refused.text
        assert (await knock(gate, "free")).status_code == 200
        clock_s[0] += 20
        assert [(await knock(gate, "slow")).status_code for _ in range(2)] == [200, 429]
        clock_s[0] += 3600
        assert [(await knock(gate, "slow")).status_code for _ in range(4)] == [200, 200, 200, 429]

    asyncio.run(run())


def test_a_crowd_enters_in_its_order_and_a_few_at_a_turn():
    async def run() -> None:
        entered: list[int] = []
        turn = 0
        turns: list[int] = []

        async def app(scope, receive, send):
            entered.append(scope["number"])
            turns.append(turn)

        async def count() -> None:
            nonlocal turn
            while True:
                turn += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        gate = Gate(app, (), most=1000)
        crowd = [
            asyncio.create_task(gate({"type": "http", "path": "/v1", "headers": [], "number": number}, None, None))
            for number in range(100)
        ]
        crowd[50].cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        counting.cancel()
        assert entered == [number for number in range(100) if number != 50]
        assert max(turns.count(one) for one in set(turns)) <= ENTER_PER_TURN

    asyncio.run(run())


# --- other origins


def test_other_origins_are_shut_out_unless_they_are_named(ask):
    origin = {"Origin": "https://chat.example.org"}
    asks = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    shut = ask("OPTIONS", "/v1/chat/completions", headers=asks)
    assert shut.status_code == 405 and "access-control-allow-origin" not in shut.headers
    assert "access-control-allow-origin" not in ask("GET", "/v1/models", headers=origin).headers
    front = {"cors_origins": ("https://chat.example.org",), "keys": read_keys(None, {KEYS_VARIABLE: "k"})}
    allowed = ask("OPTIONS", "/v1/chat/completions", front, headers=asks)  # browsers ask this without the key
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    for headers, status in ((origin | bearer("k"), 200), (origin, 401)):  # the page must be able to read why not
        answer = ask("GET", "/v1/models", front, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://chat.example.org"
    other = ask("GET", "/v1/models", front, headers={"Origin": "https://evil.example"} | bearer("k"))
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("text", ["chat.example.org", "https://a/path", "ftp://a", "", "https://a,,"])
def test_what_is_no_origin(text):
    read = next(f for f in ServeSettings.__dataclass_fields__.values() if f.name == "cors_origin").metadata["read"]
    assert read("https://a:8443, http://[::1]:3000") == ("https://a:8443", "http://[::1]:3000")
    with pytest.raises(UserError, match="no origin"):
        read(text)


# --- what is written down


def test_every_answer_has_a_request_id(ask):
    for path in ("/health", "/v1/nowhere", "/v1/models"):
        made = [ask("GET", path).headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1] and all(one.startswith("req_") for one in made)
    assert ask("GET", "/health", headers={"X-Request-Id": "abc.DEF-1:2_3"}).headers["x-request-id"] == "abc.DEF-1:2_3"
    for harmful in ("a b", "a" * 129, "{}", '"', b"\xe9", "a\tb"):
        given = ask("GET", "/health", headers={"X-Request-Id": harmful}).headers["x-request-id"]
        assert given.startswith("req_")
    streamed = ask("POST", "/v1/chat/completions", json=BODY | {"stream": True}, headers={"X-Request-Id": "s1"})
    assert streamed.headers["x-request-id"] == "s1" and streamed.headers.get_list("x-request-id") == ["s1"]
    keyed = {"keys": read_keys(None, {KEYS_VARIABLE: "k"})}
    assert ask("GET", "/v1/models", keyed, headers={"X-Request-Id": "s2"}).headers["x-request-id"] == "s2"


def test_the_access_log_tells_what_was_asked_and_never_what_was_said(ask, tmp_path):
    path = tmp_path / "access.jsonl"
    front = {"keys": read_keys(None, {KEYS_VARIABLE: "good-key name=team-b"}), "log": AccessLog(str(path))}
    ask("POST", "/v1/chat/completions?secret=query", front, json=BODY, headers=bearer("good-key"))
    streamed = bearer("good-key") | {"X-Request-Id": "mine"}
    ask("POST", "/v1/chat/completions", front, json=BODY | {"stream": True}, headers=streamed)
    ask("GET", "/v1/models/" + "x" * 500, front, headers=bearer("wrong-key"))
    path.rename(tmp_path / "rotated")  # as logrotate does
    ask("GET", "/health", front)
    front["log"].close()
    lines = [json.loads(line) for line in (tmp_path / "rotated").read_text().splitlines()]
    lines.append(json.loads(path.read_text()))
    told = [(line["method"], line["path"][:20], line["status"], line["key"], line["whole"]) for line in lines]
    assert told == [
        ("POST", "/v1/chat/completions", 200, "team-b", True),
        ("POST", "/v1/chat/completions", 200, "team-b", True),
        ("GET", "/v1/models/xxxxxxxxx", 401, None, True),
        ("GET", "/health", 200, None, True),
    ]
    assert lines[1]["request_id"] == "mine" and len(lines[2]["path"]) == 200
    assert all(0 <= line["first_byte_s"] <= line["duration_s"] and line["sent_bytes"] > 0 for line in lines)
    text = (tmp_path / "rotated").read_text()
    for private in ("private", "query", "good-key", "wrong-key", "Bearer"):
        assert private not in text


def test_requests_are_counted_by_route(ask):
    ask("GET", "/v1/models/tiny")
    ask("GET", "/v1/models/other")
    ask("BREW", "/coffee")
    text = ask("GET", "/metrics").text
    for row in ('method="GET",model_name="tiny",route="/v1/models/{name:path}",status="200"} 1.0',):
        assert row in text
    assert 'route="/v1/models/{name:path}",status="404"} 1.0' in text  # no path of a client's making becomes a label
    assert 'method="other",model_name="tiny",route="",status="404"} 1.0' in text and "coffee" not in text


class Tracer:
    """Notes spans as OpenTelemetry's would."""

    def __init__(self) -> None:
        self.spans: list[SimpleNamespace] = []

    def start_span(self, name, context, kind, attributes):
        span = SimpleNamespace(name=name, context=context, attributes=dict(attributes), ended=0)
        span.set_attribute = span.attributes.__setitem__
        span.end = lambda: setattr(span, "ended", span.ended + 1)
        self.spans.append(span)
        return span


def test_a_span_for_each_request_goes_on_with_the_trace_of_the_caller(ask):
    from opentelemetry.trace import get_current_span

    tracer = Tracer()
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    ask("POST", "/v1/chat/completions", {"tracer": tracer}, json=BODY, headers=parent | {"X-Request-Id": "r1"})
    ask("GET", "/v1/nowhere", {"tracer": tracer})
    first, second = tracer.spans
    assert format(get_current_span(first.context).get_span_context().trace_id, "x") == "af7651916cd43dd8448eb211c80319c"
    assert first.attributes == {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "gptoss.request_id": "r1",
        "http.response.status_code": 200,
        "http.route": "/v1/chat/completions",
        "gptoss.answer_whole": True,
    }
    assert second.attributes["http.response.status_code"] == 404
    assert first.ended == second.ended == 1


# --- what is too deep


def nested(depth: int, inner: str = "0") -> bytes:
    return ("".join('{"a":' if place % 2 else "[" for place in range(depth)) + inner).encode() + "".join(
        "}" if place % 2 else "]" for place in reversed(range(depth))
    ).encode()


def test_bodies_that_are_too_deep(ask):
    check_depth(nested(MOST_DEEP))
    check_depth(b"[" + b",".join([nested(MOST_DEEP - 1)] * 50) + b"]")
    check_depth(json.dumps(["[{" * 500, '\\"[' * 500, "\\"]).encode())  # brackets in strings are none
    for deep in (nested(MOST_DEEP + 1), nested(5000), b"[" * 5000, b'{"a":' * 5000, b"[1," + nested(MOST_DEEP) + b"]"):
        with pytest.raises(ApiError, match="deep"):
            check_depth(deep)
    tool = {"type": "function", "function": {"name": "f", "parameters": json.loads(nested(99))}}
    body = {"model": "tiny", "messages": [], "tools": [tool]}
    answer = ask("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "body_too_deep"


@pytest.mark.parametrize("text", [b'"' + b'\\"' * 500_000, b'"' * 1_000_001, b"[]" * 500_000, b"[" * 200 + b'"\\'])
def test_the_depth_of_no_text_takes_long_to_find(text):
    begun_s = time.process_time()
    try:
        check_depth(b"[" * 101 + text)
    except ApiError:
        pass
    assert time.process_time() - begun_s < 2


# --- what serve says about its door


@pytest.mark.parametrize(
    "host, keyed, said",
    [
        ("127.0.0.1", False, ""),
        ("localhost", False, ""),
        ("0.0.0.0", False, "whoever reaches 0.0.0.0 may use this server, without a key"),
        ("0.0.0.0", True, "keys travel in the clear"),
    ],
)
def test_a_door_that_is_open_to_others_warns(tmp_path, capsys, monkeypatch, host, keyed, said):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    path = tmp_path / "keys"
    path.write_text("the-key")
    door = open_door("tiny", ServeSettings(host=host, port=0, api_key_file=path if keyed else None))
    door.listener.close()
    warned = capsys.readouterr().err
    assert (said in warned) if said else warned == ""
    assert "the-key" not in " ".join(door.arguments) + warned


def test_what_is_wrong_with_the_door_is_said_first(tmp_path):
    wrong = {
        "belong together": {"tls_cert": tmp_path / "a"},
        "no such file": {"tls_cert": tmp_path / "a", "tls_key": tmp_path / "b"},
        "no such folder": {"access_log": str(tmp_path / "none" / "log")},
        "No such file": {"api_key_file": tmp_path / "none"},
    }
    for said, settings in wrong.items():
        with pytest.raises(UserError, match=said):
            open_door("tiny", ServeSettings(port=0, **settings))
    for path in (tmp_path / "a", tmp_path / "b"):
        path.write_text("no PEM")
    with pytest.raises(UserError, match="--tls-cert"):
        open_door("tiny", ServeSettings(port=0, tls_cert=tmp_path / "a", tls_key=tmp_path / "b"))


@pytest.mark.slow
def test_keys_of_the_environment_reach_the_http_process_and_nothing_else(start, monkeypatch):
    monkeypatch.setenv(KEYS_VARIABLE, "the-very-secret-key name=ci at_once=2")
    running = start("serve", 0, 2, 5)
    assert httpx.get(f"{running.url}/models").status_code == 401
    assert httpx.get(f"{running.url}/models", headers=bearer("the-very-secret-key")).status_code == 200
    pids = running.pids()
    assert {"rank", "http", "torchrun"} <= pids.keys()
    for role, pid in pids.items():
        assert b"the-very-secret-key" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        holds = b"the-very-secret-key" in Path(f"/proc/{pid}/environ").read_bytes()
        assert holds == (role in ("command", "http")), role
    running.process.terminate()
    running.gone_within()
    assert running.process.wait() == 0 and "the-very-secret-key" not in running.stderr()

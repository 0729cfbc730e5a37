"""The client of servers, against a scripted one: how it asks, what it counts, what it says of broken answers."""

import asyncio
import contextlib
import json
import random
import socket
import threading
from collections.abc import Iterator

import pytest
from gptoss_launch.launch.bench.endpoint import Endpoint, base_url, open_endpoint
from gptoss_launch.launch.bench.measure import decode, serve
from gptoss_launch.launch.bench.target import Progress, Sample
from gptoss_launch.launch.bench.wire import ask, read_body, read_events, request_bytes
from gptoss_launch.parallel.errors import UserError
from stub_server import FIXED_TOKENS, STEP_S, Script, stub


def opened(script: Script, key: str | None = None) -> Endpoint:
    with stub(script) as url:
        return asyncio.run(open_endpoint(url, key))


def answer(script: Script, new: int, tokens: int = 20) -> Sample:
    with stub(script) as url:

        async def run() -> Sample:
            endpoint = await open_endpoint(url, None)
            script.seen.clear()
            return await endpoint.stream(endpoint.prompt(tokens, random.Random(0)), new)

        return asyncio.run(run())


# --- how a server is asked


def test_a_server_like_vllm_gets_ids() -> None:
    script = Script()
    sample = answer(script, 6)
    (body,) = script.seen
    assert len(body["prompt"]) == 20 and all(1000 <= one < 190_000 for one in body["prompt"])
    assert body["ignore_eos"] is True and body["max_tokens"] == 6 and body["temperature"] == 1.0 and body["stream"]
    assert body["model"] == "some-model" and body["stream_options"] == {"include_usage": True}
    assert (sample.tokens, sample.prompt_tokens, len(sample.came_s), sample.error) == (6, 20, 6, "")
    assert sample.sent_s < sample.came_s[0] < sample.came_s[-1] == sample.ended_s
    assert min(sample.gaps_s) >= 0 and sample.ended_s - sample.sent_s >= 6 * STEP_S


def test_what_a_server_says_of_itself() -> None:
    endpoint = opened(Script(owner="sglang"))
    about = endpoint.about
    assert (about.engine, about.version, about.model) == ("sglang", "9.8.7", "some-model")
    assert about.route == "/v1/completions, token ids, ignore_eos" and endpoint.room.context_tokens == 4096
    assert not endpoint.notes


def test_a_model_by_its_folder_is_asked_for_by_it_and_shown_without() -> None:
    endpoint = opened(Script(model="/models/20b"))
    assert endpoint.about.model == "20b" and endpoint.model == "/models/20b"
    script = Script(model="/models/20b")
    assert answer(script, 2).error == "" and script.seen[-1]["model"] == "/models/20b"


@pytest.mark.parametrize("takes_ids", [True, False])
def test_a_second_run_with_the_same_seed_sends_other_prompts(takes_ids: bool) -> None:
    """A server's prefix cache would hold those of the first."""
    with stub(Script(takes_ids=takes_ids)) as url:
        first, second = (asyncio.run(open_endpoint(url, None)) for _ in range(2))
    one, other = (endpoint.prompt(200, random.Random(0)) for endpoint in (first, second))
    assert (one.ids[:16], one.text[:60]) != (other.ids[:16], other.text[:60])


def test_a_strict_server_is_not_told_to_ignore_the_end() -> None:
    script = Script(takes_ignore_eos=False)
    endpoint = opened(script)
    assert endpoint.about.route == "/v1/completions, token ids"
    assert endpoint.notes == ("the model may end an answer early; the server takes no ignore_eos",)
    assert answer(Script(takes_ignore_eos=False), 3).tokens == 3


def test_a_small_vocabulary_gets_small_ids() -> None:
    script = Script(vocab=1008)
    assert answer(script, 2).error == ""
    assert max(script.seen[-1]["prompt"]) < 1000


def test_a_server_of_chats_alone_is_asked_by_words_of_the_wanted_length() -> None:
    script = Script(takes_ids=False)
    sample = answer(script, 5, tokens=FIXED_TOKENS + 50)
    assert sample.prompt_tokens == FIXED_TOKENS + 50 and sample.tokens == 5
    assert "ignore_eos" not in script.seen[-1] and len(script.seen[-1]["messages"]) == 1
    endpoint = opened(Script(takes_ids=False))
    assert endpoint.about.route == "/v1/chat/completions, words" and "no token ids" in endpoint.notes[0]


def test_a_key_is_sent() -> None:
    assert b"\r\nAuthorization: Bearer abc\r\n" in request_bytes("h", "/p", b"{}", "abc")
    script = Script(key="abc")
    assert opened(script, "abc").about.engine == "vllm"
    with pytest.raises(UserError, match="401: a key is needed\nhint: --api-key-file FILE"):
        opened(script)


def test_tokens_without_usage_are_counted_by_piece() -> None:
    with pytest.raises(UserError, match="it does not count tokens"):
        opened(Script(counts=False, takes_ids=False))


def test_pieces_of_several_tokens() -> None:
    sample = answer(Script(together=2), 7)
    assert sample.tokens == 7 and len(sample.came_s) == 4


# --- answers that break


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("429", "429: the queue is full"),
        ("drop", "cut off after 2 pieces: the stream was cut off"),
        ("error", "after 2 pieces: a rank died"),
        ("garbage", "an event that is no chunk of an answer: b'{not json'"),
    ],
)
def test_a_fault_is_told_in_a_few_words(fault: str, said: str) -> None:
    sample = answer(Script(fault=fault), 8)
    assert sample.error == said and sample.tokens == 0 and sample.first_s is None


def test_a_decode_does_not_go_on_over_faults() -> None:
    with stub(Script(fault="drop", fault_after=10, every=3)) as url:

        async def run() -> None:
            target = await open_endpoint(url, None)
            await decode(target, 3, 10, 12, 1, random.Random(0), Progress())

        with pytest.raises(UserError, match="vllm: 1 of 3 streams failed; 1: cut off after 2 pieces"):
            asyncio.run(run())


def test_a_load_counts_faults_and_goes_on() -> None:
    with stub(Script(fault="429", fault_after=10, every=4)) as url:

        async def run() -> dict:
            target = await open_endpoint(url, None)
            return (await serve(target, 10, 12, 20, 0, Progress(), batch=4)).to_json()

        row = asyncio.run(run())
    assert row["failed"] == {"429: the queue is full": 5} and row["requests"] == 20
    assert row["decode_ms"] >= STEP_S * 1e3 and row["decode_tok_s"] > 0 and row["ttft_ms"] >= STEP_S * 1e3


def test_a_batch_is_decoded_over_http() -> None:
    with stub(Script()) as url:

        async def run() -> dict:
            target = await open_endpoint(url, None)
            return (await decode(target, 4, 10, 40, 1, random.Random(0), Progress())).to_json()

        row = asyncio.run(run())
    assert row["batch"] == 4 and row["prompt"] == 10 and row["new"] == 40 and row["engine"] == "vllm"
    assert row["decode_ms"] >= STEP_S * 1e3 * 0.9  # a stub sleeps no shorter


# --- where nobody answers as they should


@pytest.mark.parametrize("url", ["http://", "http://h:99999", "http://h/v2", "http://h:1/v1/models"])
def test_no_url_of_a_server(url: str) -> None:
    with pytest.raises(UserError, match="is no URL of a server"):
        base_url(url)


def test_urls_with_and_without_v1() -> None:
    assert {base_url(f"http://h:1{end}") for end in ("", "/", "/v1", "/v1/")} == {"http://h:1"}


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        with pytest.raises(UserError, match="/v1/models: .*\nhint: is it the URL of a running server?"):
            asyncio.run(open_endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}", None))


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data": 3}',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["nothing", "ssh", "short", "no data", "data of another kind", "no chunk size"],
)
def test_no_server_of_ours(said: bytes) -> None:
    with saying(said) as url, pytest.raises(UserError):
        asyncio.run(open_endpoint(url, None))


def test_a_silent_server_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = asyncio.run(ask(f"http://127.0.0.1:{silent.getsockname()[1]}/x", None, None, quiet_s=0.05))
    assert found.lost == "silent for 0.05 s" and found.pieces == ()


@contextlib.contextmanager
def saying(said: bytes) -> Iterator[str]:
    """A server that says the same to everyone and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(said)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


# --- bytes


def chunked(events: list[str], sizes: list[int]) -> bytes:
    """An answer whose chunks end anywhere."""
    body, out = "".join(f"data: {event}\n\n" for event in events).encode(), b""
    while body:
        size = sizes[len(out) % len(sizes)]
        out += b"%x\r\n%s\r\n" % (len(body[:size]), body[:size])
        body = body[size:]
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + out + b"0\r\n\r\n"


@pytest.mark.parametrize("seed", range(8))
def test_events_however_the_bytes_are_cut(seed: int) -> None:
    """The time of an event is that of the piece with its last byte; cut off anywhere, no event is made up."""
    r = random.Random(seed)
    wanted = [json.dumps({"n": n, "text": "x" * r.randrange(30) + "\u00e9"}) for n in range(12)]
    whole = chunked(wanted, [1, 3, 17, 50])
    cuts = sorted(r.sample(range(1, len(whole)), 20))
    pieces = [(float(n), whole[a:b]) for n, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(whole)], strict=True))]
    events, fault = read_events(pieces)
    assert fault == "" and [json.loads(data) for _, data in events] == [json.loads(one) for one in wanted]
    times = [at_s for at_s, _ in events]
    assert times == sorted(times)
    for (at_s, data), one in zip(events, wanted, strict=True):
        before = b"".join(bytes for s, bytes in pieces if s < at_s)
        assert data == one.encode() and sum(one.encode() == found for _, found in read_events([(0.0, before)])[0]) == 0
    end = r.randrange(60, len(whole) - 5)
    events, fault = read_events([(0.0, whole[:end])])
    assert fault and [data.decode() for _, data in events] == wanted[: len(events)]


def test_a_body_with_its_length() -> None:
    whole = b"HTTP/1.1 429 X\r\nContent-Length: 4\r\n\r\nabcd"
    assert b"".join(data for _, data in read_body([(0.0, whole[:20]), (1.0, whole[20:])])) == b"abcd"

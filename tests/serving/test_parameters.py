"""What a client asks of an answer, on /v1/chat/completions: how it is drawn, how often, where it ends, what is told."""

import asyncio

import pytest
from gptoss_launch.parallel.engine.request import Sampling, Token
from gptoss_launch.parallel.errors import UserError
from in_process import Call, DrawingEngine, ScriptedEngine, TellingEngine, served

FINAL = "<|channel|>final<|message|>"
THINKS = "<|channel|>analysis<|message|>Let me think<|end|><|start|>assistant"


def joined(chunks):
    """Each choice of a stream as a plain answer has it: content, reasoning, entries of logprobs, finish reason."""
    said = {}
    for chunk in chunks:
        for choice in chunk.choices:
            one = said.setdefault(choice.index, ["", "", [], None])
            one[0] += choice.delta.content or ""
            one[1] += getattr(choice.delta, "reasoning_content", None) or ""
            one[2] += choice.logprobs.content if choice.logprobs else []
            assert one[3] is None, "nothing comes after a finish reason"
            one[3] = choice.finish_reason
    return said


def plain(answer):
    return {
        one.index: [
            one.message.content or "",
            one.message.reasoning_content or "",
            one.logprobs.content if one.logprobs else [],
            one.finish_reason,
        ]
        for one in answer.choices
    }


def test_every_sampling_field_reaches_the_engine(tokenizer, markup):
    engine = ScriptedEngine(markup(FINAL + "Hi<|return|>"))
    fields = {"temperature": 0.5, "top_p": 0.25, "presence_penalty": -1, "frequency_penalty": 1.5, "seed": 7}
    extra = {"top_k": 9, "min_p": 0.125, "stop_token_ids": [5, 6], "repetition_penalty": 1.25, "deadline_s": 60}
    labels = {"user": "me", "metadata": {"run": "7"}, "store": False, "service_tier": "auto", "safety_identifier": "x"}
    bias = {"3": -100, "40": 2.5}
    Call(served(tokenizer, engine)).chat(**fields, **labels, logit_bias=bias, n=1, extra_body=extra)
    [asked] = engine.asked
    assert asked.sampling == Sampling(0.5, 0.25, 9, 0.125, -1, 1.5, ((3, -100.0), (40, 2.5)), 7, 1.25)
    assert {5, 6, tokenizer.special["<|return|>"]} <= set(asked.stop_tokens) and asked.logprobs is None


def test_edges_of_fields(tokenizer, markup):
    engine = ScriptedEngine(markup(FINAL + "Hi<|return|>"))
    call = Call(served(tokenizer, engine))
    for fields in (
        {"temperature": 1e-300},  # logits over it would leave fp32
        {"temperature": 0, "extra_body": {"top_k": -1}},
        {"seed": -1},
        {"seed": 2**63 - 1},
        {},
        {},
    ):
        call.chat(**fields)
    tiny, all_tokens, minus_one, most, *random = [request.sampling for request in engine.asked]
    assert tiny.temperature == 0.0 and (all_tokens.temperature, all_tokens.top_k) == (0.0, 0)
    assert minus_one.seed == most.seed == 2**63 - 1
    assert random[0].seed != random[1].seed and random[0].temperature == 1.0


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_reproducible_and_differ(tokenizer, stream):
    engine = DrawingEngine(1000, tuple(tokenizer.special.values()))
    call = Call(served(tokenizer, engine))
    read = joined if stream else plain

    def ask(**fields):
        return call.chat(stream=stream, max_tokens=20, **fields)

    three = ask(n=3, seed=5)
    seeds = [request.sampling.seed for request in engine.asked]
    assert read(three) == read(ask(n=3, seed=5)) and sorted(read(three)) == [0, 1, 2]
    assert len({str(one) for one in read(three).values()}) == 3
    assert read(ask(n=1, seed=5))[0] == read(three)[0] and seeds[0] == 5  # one answer is the first of three
    assert read(ask(n=3, seed=6)) != read(three) and read(ask(n=3)) != read(three)
    assert read(ask(n=5, seed=5)).items() >= read(three).items()
    assert len({request.id for request in engine.asked}) == len(engine.asked) and not engine.open


@pytest.mark.parametrize("n", [1, 2, 40])
def test_streamed_and_plain_are_equal_and_counted(tokenizer, n):
    """Tokens of any kind, with a stop string among them."""
    engine = DrawingEngine(1000, tuple(tokenizer.special.values()), ends=0.02)
    call = Call(served(tokenizer, engine))
    for seed in range(10 if n < 40 else 1):
        fields = {"n": n, "seed": seed, "max_tokens": 60, "stop": ["e", "qu"], "logprobs": True, "top_logprobs": 2}
        whole = call.chat(**fields)
        chunks = call.chat(**fields, stream=True, stream_options={"include_usage": True})
        assert joined(chunks) == plain(whole)
        usage = chunks[-1].usage
        assert usage == whole.usage and chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
        assert usage.prompt_tokens == len(engine.asked[0].prompt_tokens)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        alone = [call.chat(**fields | {"n": 1}).usage] if n == 1 else []
        assert all(one.completion_tokens == usage.completion_tokens for one in alone)
        assert n <= usage.completion_tokens <= 60 * n
    assert not engine.open


def test_logprobs_of_content(tokenizer, markup):
    text = "Hello, 漢😀 world"
    script = markup(THINKS + FINAL + text + "<|return|>")
    call = Call(served(tokenizer, TellingEngine(script)))
    for stream in (False, True):
        answer = call.chat(logprobs=True, top_logprobs=2, stream=stream)
        [[content, _, entries, reason]] = (joined if stream else plain)(answer).values()
        assert (content, reason) == (text, "stop")
        assert [entry.bytes for entry in entries] == [list(tokenizer.token_bytes(id)) for id in tokenizer.encode(text)]
        first = script.index(tokenizer.encode(text)[0], len(script) - len(entries) - 1)
        for place, entry in enumerate(entries, first):
            assert entry.logprob == -place / 8
            assert [(top.bytes, top.logprob) for top in entry.top_logprobs] == [
                (list(tokenizer.token_bytes(100 * place + rank)), -1.0 - rank) for rank in range(2)
            ]
        assert all(bytes(entry.bytes).decode() == entry.token for entry in entries if entry.token[:6] != "bytes:")
    whole = call.chat(logprobs=True).choices[0]
    assert whole.logprobs.refusal is None and whole.message.refusal is None
    assert all(entry.top_logprobs == [] for entry in whole.logprobs.content)
    assert call.chat(logprobs=False).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_logprobs_where_it_cuts_text(tokenizer, markup, stream):
    call = Call(served(tokenizer, TellingEngine(markup(FINAL + "Hello, world! More<|return|>"))))
    answer = call.chat(logprobs=True, stop=["wor", "x"], stream=stream)
    [[content, _, entries, reason]] = (joined if stream else plain)(answer).values()
    assert (content, reason) == ("Hello, ", "stop")
    spelled = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert spelled.startswith(content) and len(spelled) - len(content) < len(entries[-1].bytes)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_token_ids(tokenizer, markup, stream):
    """An ordinary one is no part of the answer; markup ends its message as always."""
    script = markup(THINKS + FINAL + "one two!Q more<|return|>")
    engine = TellingEngine(script)
    call = Call(served(tokenizer, engine))
    read = joined if stream else plain
    [last] = tokenizer.encode("Q")
    answer = call.chat(stream=stream, logprobs=True, extra_body={"stop_token_ids": [last, 3]})
    [[content, reasoning, entries, reason]] = read(answer).values()
    assert (content, reasoning, reason) == ("one two!", "Let me think", "stop")
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == content
    assert last in engine.asked[0].stop_tokens and not engine.cancelled
    ended = call.chat(stream=stream, extra_body={"stop_token_ids": [tokenizer.special["<|end|>"]]})
    assert read(ended) == {0: ["", "Let me think", [], "stop"]}


def test_stop_token_within_a_call_makes_no_call_of_it(tokenizer, markup):
    """Half of its arguments: a client must not run that."""
    call_text = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
    engine = ScriptedEngine(markup(call_text) + [5, 6, 7])
    tool = {"type": "function", "function": {"name": "f"}}
    answer = Call(served(tokenizer, engine)).chat(tools=[tool], extra_body={"stop_token_ids": [7]})
    assert answer.choices[0].finish_reason == "stop"


def test_one_choice_that_fails_ends_all(tokenizer, markup):
    class Picky(DrawingEngine):
        """Refuses every third request."""

        async def generate(self, request):
            async for token in super().generate(request):
                yield token
                if len(self.asked) % 3 == 0 and request is self.asked[-1]:
                    raise UserError("no more of this")

    engine = Picky(1000, ends=0.0)
    call = Call(served(tokenizer, engine))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 3, "max_tokens": 50}
    answer = call("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"] == "no more of this"
    streamed = call("POST", "/v1/chat/completions", json=body | {"stream": True})
    assert "no more of this" in streamed.text and "[DONE]" not in streamed.text
    assert not engine.open


def test_a_stream_of_choices_waits_for_the_first_only(tokenizer):
    """Those that wait in a queue hold up nobody."""

    class Queued(DrawingEngine):
        async def generate(self, request):
            if self.asked:
                self.asked.append(request)
                while not done.is_set():
                    await asyncio.sleep(0.01)
            async for token in super().generate(request):
                yield token

    async def work(client):
        answer = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], n=2, max_tokens=3, stream=True
        )
        return [chunk async for chunk in answer]

    class Late(Queued):
        async def generate(self, request):
            first = not self.asked
            async for token in super().generate(request):
                yield token
            if first:
                done.set()

    done = asyncio.Event()
    chunks = Call(served(tokenizer, Late(1000, ends=0.0))).ask(work)
    order = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert order == [0, 1]


def test_more_choices_than_there_is_room_for(tokenizer):
    from gptoss_launch.launch.api.replicas import REQUEST_LIMIT

    class Busy(DrawingEngine):
        @property
        def running(self):
            return REQUEST_LIMIT - 2 + len(self.open)

    engine = Busy(1000)
    call = Call(served(tokenizer, engine))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    for stream in (False, True):
        answer = call("POST", "/v1/chat/completions", json=body | {"n": 3, "stream": stream})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1" and not engine.open
        assert call("POST", "/v1/chat/completions", json=body | {"n": 2, "stream": stream}).status_code == 200


def test_ends_without_a_token(tokenizer, markup):
    class Late(ScriptedEngine):
        async def generate(self, request):
            yield Token(request.id, -1, "deadline")

    answer = Call(served(tokenizer, Late([]))).chat(n=2, extra_body={"deadline_s": 1})
    assert plain(answer) == {index: ["", "", [], "length"] for index in range(2)}
    assert answer.usage.completion_tokens == 0

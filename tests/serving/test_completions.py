"""/v1/completions, /tokenize, /detokenize, /version: text and token ids as they are, and the small routes."""

import json

import openai
import pytest
from in_process import Call, DrawingEngine, ScriptedEngine, TellingEngine, served


def joined(chunks):
    """Each choice of a stream as a plain answer has it: text, lists of logprobs, finish reason."""
    said = {}
    for chunk in chunks:
        for choice in chunk.choices:
            one = said.setdefault(choice.index, ["", ([], [], [], []), None])
            one[0] += choice.text
            for place, name in enumerate(("tokens", "token_logprobs", "top_logprobs", "text_offset")):
                one[1][place].extend((getattr(choice.logprobs, name) or []) if choice.logprobs else [])
            assert one[2] is None, "nothing comes after a finish reason"
            one[2] = choice.finish_reason
    return said


def plain(answer):
    return joined([answer])


@pytest.mark.parametrize("stream", [False, True])
def test_text_goes_on(tokenizer, markup, stream):
    engine = ScriptedEngine(markup("Hello, world<|channel|>x<|return|>"))
    call = Call(served(tokenizer, engine))
    answer = call.complete(prompt="Once upon<|end|>", stream=stream)
    # The prompt's markup is text, the answer's is spelled, and the token that ends it is no part of it.
    assert (joined if stream else plain)(answer)[0] == ["Hello, world<|channel|>x", ([], [], [], []), "stop"]
    [asked] = engine.asked
    assert list(asked.prompt_tokens) == tokenizer.encode("Once upon<|end|>")
    assert tokenizer.special["<|end|>"] not in asked.prompt_tokens and asked.max_tokens == 16
    if not stream:
        assert answer.object == "text_completion" and answer.usage.prompt_tokens == len(asked.prompt_tokens)
        assert answer.usage.completion_tokens == len(engine.script)


def test_past_the_models_own_end(tokenizer, markup):
    """Benchmarks want answers of one length; what was named besides still ends them."""
    engine = ScriptedEngine(markup("Hello<|return|>, world<|return|>!"))
    call = Call(served(tokenizer, engine))
    dot = tokenizer.encode("!")[-1]
    for more, stops in (({}, set()), ({"stop_token_ids": [dot]}, {dot})):
        answer = call.complete(prompt="x", extra_body={"ignore_eos": True} | more)
        assert answer.choices[0].text.startswith("Hello") and "world" in answer.choices[0].text
        assert set(engine.asked[-1].stop_tokens) == stops
    call.complete(prompt="x", extra_body={"ignore_eos": False})
    assert tokenizer.special["<|return|>"] in engine.asked[-1].stop_tokens


def test_prompts_of_every_kind(tokenizer, markup):
    engine = ScriptedEngine(markup("!<|return|>"))
    call = Call(served(tokenizer, engine))
    ids = [tokenizer.encode("one"), tokenizer.encode("and two")]
    for prompt, texts in (
        ("one", ["one!"]),
        (ids[0], ["one!"]),
        (["one", "and two"], ["one!", "and two!"]),
        (ids, ["one!", "and two!"]),
        ([ids[0]], ["one!"]),
    ):
        engine.asked.clear()
        for stream in (False, True):
            answer = call.complete(prompt=prompt, echo=True, stream=stream)
            assert [one[0] for _, one in sorted((joined if stream else plain)(answer).items())] == texts
        assert [list(request.prompt_tokens) for request in engine.asked] == ids[: len(texts)] * 2
    twice = call.complete(prompt=["one", "and two"], n=2, echo=True)
    assert [choice.text for choice in twice.choices] == ["one!", "one!", "and two!", "and two!"]
    assert [choice.index for choice in twice.choices] == [0, 1, 2, 3]
    assert twice.usage.prompt_tokens == sum(map(len, ids))  # once for the answers that share it
    assert twice.usage.completion_tokens == 4 * len(engine.script)


def test_markup_goes_in_as_ids(tokenizer, markup):
    engine = ScriptedEngine(markup("!<|return|>"))
    ids = markup("<|start|>user<|message|>Hi<|end|>")
    answer = Call(served(tokenizer, engine)).complete(prompt=ids, echo=True)
    assert answer.choices[0].text == "<|start|>user<|message|>Hi<|end|>!"
    assert list(engine.asked[0].prompt_tokens) == ids


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_and_plain_are_equal_and_counted(tokenizer, n):
    engine = DrawingEngine(1000, tuple(tokenizer.special.values()), ends=0.02)
    call = Call(served(tokenizer, engine))
    for seed in range(5):
        fields = {"n": n, "seed": seed, "max_tokens": 60, "stop": ["e", "qu"], "logprobs": 2}
        fields |= {"prompt": ["A", "Bc"]}
        whole = call.complete(**fields)
        chunks = call.complete(**fields, stream=True, stream_options={"include_usage": True})
        assert joined(chunks) == plain(whole) and len(whole.choices) == 2 * n
        assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
        assert whole.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in fields["prompt"])
        # each prompt's answers are those that it has alone
        alone = call.complete(**fields | {"prompt": "Bc"})
        assert [choice.text for choice in whole.choices[n:]] == [choice.text for choice in alone.choices]
    assert not engine.open


def test_logprobs(tokenizer, markup):
    text = "Hi 漢!"
    script = markup(text + "<|return|>")
    ids = script[:-1]
    call = Call(served(tokenizer, TellingEngine(script)))
    for stream in (False, True):
        answer = call.complete(logprobs=2, stream=stream)
        [[said, (tokens, values, tops, offsets), reason]] = (joined if stream else plain)(answer).values()
        assert (said, reason, values) == (text, "stop", [-place / 8 for place in range(len(ids))])
        spelled = [tokenizer.token_bytes(id) for id in ids]
        assert tokens == [
            one.decode() if one.decode(errors="ignore").encode() == one else "bytes:" + str(one)[2:-1]
            for one in spelled
        ]
        assert offsets == [len(b"".join(spelled[:place]).decode(errors="ignore")) for place in range(len(ids))]
        # the two most likely, and the token itself where it is none of them
        assert all(top[token] == value for top, token, value in zip(tops, tokens, values, strict=True))
        assert all(len(top) in (2, 3) and sorted(top.values())[0] == -2.0 for top in tops)
    assert call.complete(logprobs=0).choices[0].logprobs.top_logprobs is None
    assert call.complete().choices[0].logprobs is None


def test_tokenize_and_back(tokenizer):
    call = Call(served(tokenizer, ScriptedEngine([])))
    for text in ("", "Hello, world", "漢字 😀 <|end|>\x00", "a" * 5000):
        answer = call("POST", "/tokenize", json={"prompt": text}).json()
        assert answer == {
            "count": len(tokenizer.encode(text)),
            "max_model_len": 2048,
            "tokens": tokenizer.encode(text),
            "token_strs": None,
        }
        assert call("POST", "/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    asked = {"model": "tiny", "prompt": "Hi you", "return_token_strs": True, "add_special_tokens": True}
    assert "".join(call("POST", "/tokenize", json=asked).json()["token_strs"]) == "Hi you"


def test_a_conversation_is_tokenized_as_it_would_be_sent(tokenizer, markup):
    engine = ScriptedEngine(markup("<|channel|>final<|message|>Hi<|return|>"))
    call = Call(served(tokenizer, engine))
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes", "reasoning": "Hm."},
        {"role": "user", "content": "Go"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    fields = {"messages": talk, "tools": tools, "reasoning_effort": "high"}
    call.chat(**fields)
    ids = call("POST", "/tokenize", json=fields).json()["tokens"]
    assert ids == list(engine.asked[0].prompt_tokens)
    text = tokenizer.decode(ids)
    assert "Be brief." in text and "Reasoning: high" in text and "type f" in text and "Hm." not in text
    every = call("POST", "/tokenize", json=fields | {"add_generation_prompt": False}).json()["tokens"]
    assert "<|message|>Hm.<|end|>" in tokenizer.decode(every) and tokenizer.decode(every).endswith("Go<|end|>")
    # and what /tokenize gives is a prompt of /v1/completions
    call.complete(prompt=ids)
    assert engine.asked[1].prompt_tokens == engine.asked[0].prompt_tokens


def test_version_and_models(tokenizer):
    call = Call(served(tokenizer, ScriptedEngine([])))
    assert call("GET", "/version").json().keys() == {"version"} and call("GET", "/version").json()["version"]
    [one] = call.ask(lambda client: client.models.list()).data
    assert call.ask(lambda client: client.models.retrieve("tiny")) == one and one.id == "tiny"
    with pytest.raises(openai.NotFoundError):
        call.ask(lambda client: client.models.retrieve("gpt-4"))


def test_events_as_they_are_on_the_wire(tokenizer, markup):
    call = Call(served(tokenizer, ScriptedEngine(markup("Hi<|return|>"))))
    answer = call("POST", "/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True})
    *events, done, empty = answer.text.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    told = [json.loads(event[6:]) for event in events]
    assert all(one["object"] == "text_completion" and "usage" not in one for one in told)
    assert len({one["id"] for one in told}) == 1 and told[0]["id"].startswith("cmpl-")

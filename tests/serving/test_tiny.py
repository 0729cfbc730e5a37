"""The command line as a user types it, with the embedded model behind it: nothing fake."""

import json
import re
import time

import httpx
import openai
import pytest
from gptoss_launch.configs.make_conversations import GREETING

PROGRAM = ("-m", "gptoss_launch.launch")


def check_other_routes(client: openai.OpenAI, url: str) -> None:
    """Text as it is, several answers, log probabilities, and the routes beside them."""
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    ids = httpx.post(f"{url}/tokenize", json={"prompt": "Once upon"}).json()["tokens"]
    assert httpx.post(f"{url}/detokenize", json={"tokens": ids}).json() == {"prompt": "Once upon"}
    assert httpx.get(f"{url}/version").json()["version"]
    fields = {"model": "tiny", "seed": 1, "n": 3, "max_tokens": 6, "logprobs": 2, "stop": ["e"], "temperature": 2}
    by_text = client.completions.create(**fields, prompt="Once upon")
    by_ids = client.completions.create(**fields, prompt=ids)
    assert [one.text for one in by_text.choices] == [one.text for one in by_ids.choices]
    assert by_text.usage == by_ids.usage
    assert len({choice.text for choice in by_text.choices}) == 3
    texts = ["", "", ""]
    for chunk in client.completions.create(**fields, prompt="Once upon", stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in by_text.choices]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "seed": 1, "max_tokens": 32, "n": 2}
    chat |= {"logprobs": True, "top_logprobs": 2, "presence_penalty": 0.5, "logit_bias": {"5": 1}}
    plain = client.chat.completions.create(**chat, extra_body={"top_k": 50, "min_p": 0.01}).choices
    streamed: list[list[tuple[str, float]]] = [[], []]
    for chunk in client.chat.completions.create(**chat, stream=True, extra_body={"top_k": 50, "min_p": 0.01}):
        told = chunk.choices[0].logprobs
        streamed[chunk.choices[0].index] += [(one.token, one.logprob) for one in (told and told.content) or ()]
    for choice, parts in zip(plain, streamed, strict=True):
        assert [token for token, _ in parts] == [one.token for one in choice.logprobs.content]
        # what else is in a step changes the last bits of a sum
        assert [value for _, value in parts] == pytest.approx(
            [one.logprob for one in choice.logprobs.content], abs=1e-3
        )
    assert all(choice.message.content for choice in plain)


def test_tiny_is_served_and_generates_the_same(start):
    served = start("serve", "tiny", "--machine", "cpu", "--context", "2048", "--port", "0", program=PROGRAM)
    client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64, "temperature": 0}
    plain = client.chat.completions.create(**fields)
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**fields, stream=True)]
    content = plain.choices[0].message.content
    assert "".join(delta.content or "" for delta in deltas) == content
    same = {"model": "tiny", "input": "Hello", "max_output_tokens": 64, "temperature": 0}
    response = client.responses.create(**same, background=True)
    deadline = time.monotonic() + 60
    while response.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        response = client.responses.retrieve(response.id)
    assert response.output_text == content and response.usage.output_tokens == plain.usage.completion_tokens
    events = list(client.responses.create(**same, stream=True))
    assert events[-1].response.output_text == content and events[-1].response.id != response.id
    assert content == GREETING and plain.choices[0].finish_reason == "stop"
    assert "knows nothing else" in served.stderr()
    assert re.search(r"loaded in [0-9.]+ s \(imports [0-9.]+", served.stderr())
    check_other_routes(client, served.url.removesuffix("/v1"))
    served.process.terminate()
    served.gone_within()
    assert served.process.wait() == 0

    arguments = ("generate", "tiny", "--machine", "cpu", "--context", "2048", "-p", "Hello", "--max-tokens", "64")
    generated = start(*arguments, "--temperature", "0", "--json", url=False, program=PROGRAM)
    result = json.loads(generated.process.stdout.read())
    assert generated.process.wait() == 0
    assert result["content"] == content
    assert (result["reasoning"] or None) == plain.choices[0].message.reasoning_content
    assert result["usage"] == plain.usage.model_dump(exclude_unset=True)

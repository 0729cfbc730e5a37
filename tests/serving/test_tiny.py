"""The command line as a user types it, with the embedded model behind it: nothing fake."""

import json
import time

import openai

PROGRAM = ("-m", "gptoss_launch.launch")


def test_tiny_is_served_and_generates_the_same(start):
    served = start("serve", "tiny", "--machine", "cpu", "--context", "2048", "--port", "0", program=PROGRAM)
    client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, "temperature": 0}
    plain = client.chat.completions.create(**fields)
    assert plain.usage.completion_tokens == 24 or plain.choices[0].finish_reason == "stop"
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**fields, stream=True)]
    content = plain.choices[0].message.content
    assert "".join(delta.content or "" for delta in deltas) == content
    same = {"model": "tiny", "input": "Hello", "max_output_tokens": 24, "temperature": 0}
    response = client.responses.create(**same, background=True)
    deadline = time.monotonic() + 60
    while response.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        response = client.responses.retrieve(response.id)
    assert response.output_text == content and response.usage.output_tokens == plain.usage.completion_tokens
    events = list(client.responses.create(**same, stream=True))
    assert events[-1].response.output_text == content and events[-1].response.id != response.id
    assert "random weights" in served.stderr() and "loaded in" in served.stderr()
    served.process.terminate()
    served.gone_within()
    assert served.process.wait() == 0

    arguments = ("generate", "tiny", "--machine", "cpu", "--context", "2048", "-p", "Hello", "--max-tokens", "24")
    generated = start(*arguments, "--temperature", "0", "--json", url=False, program=PROGRAM)
    result = json.loads(generated.process.stdout.read())
    assert generated.process.wait() == 0
    assert result["content"] == content
    assert (result["reasoning"] or None) == plain.choices[0].message.reasoning_content
    assert result["usage"] == plain.usage.model_dump(exclude_unset=True)

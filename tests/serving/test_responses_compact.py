"""/v1/responses/compact: the official client makes a conversation short and goes on with it; and bad input."""

import json

import openai
import pytest
from gptoss_launch.launch.api.responses_compact import ASK, pack, unpack
from in_process import Call, ScriptedEngine, served

SAYS = "<|channel|>analysis<|message|>Short.<|end|><|start|>assistant<|channel|>final<|message|>They met Ann.<|return|>"
TALK = [
    {"role": "user", "content": "I met Ann."},
    {"role": "assistant", "content": "How nice."},
    {"type": "function_call", "call_id": "c1", "name": "note", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "done"},
    {"role": "user", "content": "And Bob."},
]
SUMMARY = "Summary of the conversation before this:\n\nThey met Ann."


@pytest.fixture
def call(tokenizer, markup):
    return Call(served(tokenizer, ScriptedEngine(markup(SAYS))))


def told(call, tokenizer, number=-1):
    """The prompt of a request, as text."""
    return tokenizer.decode(call.served.replicas._engines[0].asked[number].prompt_tokens)


def test_a_conversation_goes_on_from_what_is_left_of_it(call, tokenizer, markup):
    short = call.ask(lambda client: client.responses.compact(model="tiny", input=TALK))
    assert (short.object, short.id[:5], [item.type for item in short.output]) == (
        "response.compaction",
        "resp_",
        ["message", "message", "compaction"],
    )
    assert [item.content[0].text for item in short.output[:2]] == ["I met Ann.", "And Bob."]
    assert unpack(short.output[2].encrypted_content) == "They met Ann."
    prompt = told(call, tokenizer)
    assert ASK in prompt and "How nice." in prompt and "Reasoning: low" in prompt
    usage = short.usage
    assert usage.output_tokens == len(markup(SAYS)) and usage.total_tokens == usage.input_tokens + usage.output_tokens
    # The items as the client has them, and once more made short together with what came after.
    items = short.to_dict(warnings=False)["output"]
    more = [*items, {"role": "user", "content": "Who is Ann?"}]
    call.ask(lambda client: client.responses.create(model="tiny", input=more))
    prompt = told(call, tokenizer)
    assert prompt.index("And Bob.") < prompt.index(SUMMARY) < prompt.index("Who is Ann?")
    assert "How nice." not in prompt and ASK not in prompt
    again = call.ask(lambda client: client.responses.compact(model="tiny", input=more))
    assert [item.type for item in again.output] == ["message", "message", "message", "compaction"]
    assert SUMMARY in told(call, tokenizer)


def test_a_kept_response_is_made_short(call, tokenizer):
    async def work(client):
        first = await client.responses.create(model="tiny", input="I met Ann.", instructions="Be kind.")
        return await client.responses.compact(model="tiny", previous_response_id=first.id, instructions="Be brief.")

    short = call.ask(work)
    assert [item.type for item in short.output] == ["message", "compaction"]
    prompt = told(call, tokenizer)
    assert "I met Ann." in prompt and "They met Ann." in prompt and "Be brief." in prompt and "Be kind." not in prompt
    with pytest.raises(openai.NotFoundError):  # what was made is not kept
        call.ask(lambda client: client.responses.retrieve(short.id))


def test_a_full_context_is_made_short_all_the_same(call, tokenizer):
    talk = [{"role": "user", "content": f"{number} " + "word " * 200} for number in range(40)]
    short = call.ask(lambda client: client.responses.compact(model="tiny", input=talk))
    assert len(short.output) == 41
    prompt = told(call, tokenizer)
    assert ASK in prompt and "39 word" in prompt and "<|message|>0 word" not in prompt


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input", "nothing to compact"),
        ({"input": "x", "stream": True}, "stream", "unknown or unsupported field"),
        ({"input": "x", "image": {}}, "image", "unknown or unsupported field"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id", "resp_1"),
        ({"input": [{"type": "compaction", "encrypted_content": "gl1.***"}]}, "input", "no summary of this server"),
        ({"input": [{"type": "compaction", "encrypted_content": "abc"}]}, "input", "no summary of this server"),
        ({"input": [{"type": "compaction"}]}, "input.0.encrypted_content", "required"),
    ],
)
def test_bad_input(call, body, param, said):
    answer = call("POST", "/v1/responses/compact", json={"model": "tiny"} | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and said in error["message"]


def test_no_summary(tokenizer, markup):
    call = Call(served(tokenizer, ScriptedEngine(markup("<|channel|>analysis<|message|>Well<|return|>"))))
    answer = call("POST", "/v1/responses/compact", json={"model": "tiny", "input": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_summary")


@pytest.mark.parametrize("text", ["", "a", "ä\n" * 999])
def test_packing(text):
    assert unpack(json.loads(json.dumps(pack(text)))) == text

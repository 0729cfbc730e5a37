"""Training samples: masks written by hand for twelve conversations, tokens as openai-harmony has them, bad records.

In the expectations ⟦ ⟧ stand round what the loss counts; SYSTEM is the system message with its effort.
"""

import json
import re
from pathlib import Path

import datasets
import openai_harmony as oh
import pytest
from gptoss_launch.launch.api.chat import conversation
from gptoss_launch.launch.api.schema import parse_chat_request
from gptoss_launch.launch.conversations import RecordError, Rules, read_samples, record_samples
from gptoss_launch.launch.harmony import render
from gptoss_launch.launch.preview import preview, summary
from gptoss_launch.launch.records import Source, read_records, read_source
from gptoss_launch.launch.tokenizer import Tokenizer
from gptoss_launch.parallel.errors import UserError
from gptoss_launch.parallel.training.samples import Sample

KEEP_ALL = oh.RenderConversationConfig(auto_drop_analysis=False)


def system(effort: str = "medium", day: str | None = None, tools: bool = False) -> str:
    lines = ["You are ChatGPT, a large language model trained by OpenAI.", "Knowledge cutoff: 2024-06"]
    lines += [f"Current date: {day}"] if day else []
    channels = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    if tools:
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
    text = "\n".join(lines) + f"\n\nReasoning: {effort}\n\n{channels}"
    return f"<|start|>system<|message|>{text}<|end|>"


def user(text: str) -> str:
    return f"<|start|>user<|message|>{text}<|end|>"


WEATHER = {"name": "weather", "description": "Weather.", "parameters": {"type": "object", "properties": {}}}
TOOLS = (
    "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n// Weather.\n"
    "type weather = (_: {\n}) => any;\n\n} // namespace functions<|end|>"
)
CALL = {"function": {"name": "weather", "arguments": {"city": "Bonn"}}}
CALLED = " to=functions.weather<|channel|>commentary <|constrain|>json<|message|>" + '{"city": "Bonn"}' + "<|call|>"
RESULT = "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>9 C<|end|>"
A = "<|start|>assistant"


def said(role: str, content: str, **more: object) -> dict:
    return {"role": role, "content": content, **more}


# name: (record, loss weights by channel that are not 1, expected samples)
CASES: dict[str, tuple[dict, dict[str, float], list[str]]] = {
    "one answer": (
        {"messages": [said("user", "Hi"), said("assistant", "Hello")]},
        {},
        [system() + user("Hi") + A + "⟦<|channel|>final<|message|>Hello<|return|>⟧"],
    ),
    "with reasoning": (
        {"messages": [said("user", "2+2?"), said("assistant", "4", thinking="Sum.")]},
        {},
        [
            system() + user("2+2?") + A + "⟦<|channel|>analysis<|message|>Sum.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>4<|return|>⟧"
        ],
    ),
    "analysis not trained, final doubly": (
        {"messages": [said("user", "2+2?"), said("assistant", "4", thinking="Sum.")]},
        {"analysis": 0, "final": 2},
        [
            system() + user("2+2?") + A + "<|channel|>analysis<|message|>Sum.<|end|>"
            "⟦2×<|start|>assistant<|channel|>final<|message|>4<|return|>⟧"
        ],
    ),
    "two turns, the earlier reasoning dropped": (
        {
            "messages": [
                *(said("user", "2+2?"), said("assistant", "4", thinking="Sum.")),
                *(said("user", "And 3+3?"), said("assistant", "6", thinking="Again.")),
            ]
        },
        {},
        [
            system() + user("2+2?") + A + "⟦<|channel|>analysis<|message|>Sum.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>4<|return|>⟧",
            system() + user("2+2?") + A + "<|channel|>final<|message|>4<|end|>" + user("And 3+3?") + A +
            "⟦<|channel|>analysis<|message|>Again.<|end|><|start|>assistant<|channel|>final<|message|>6<|return|>⟧",
        ],
    ),
    "a call, its result and the answer are one sample": (
        {
            "messages": [
                *(said("user", "Weather?"), {"role": "assistant", "thinking": "Ask.", "tool_calls": [CALL]}),
                *(said("tool", "9 C", name="weather"), said("assistant", "Cold.", thinking="So.")),
            ],
            "tools": [WEATHER],
        },
        {},
        [
            system(tools=True) + TOOLS + user("Weather?") + A + "⟦<|channel|>analysis<|message|>Ask.<|end|>"
            f"<|start|>assistant{CALLED}⟧" + RESULT + A + "⟦<|channel|>analysis<|message|>So.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Cold.<|return|>⟧"
        ],
    ),
    "a preamble before the call": (
        {
            "messages": [
                said("user", "Weather?"),
                {"role": "assistant", "content": "One moment.", "tool_calls": [CALL | {"id": "x"}]},
                {"role": "tool", "content": "9 C", "tool_call_id": "x"},
            ],
            "tools": json.dumps([{"type": "function", "function": WEATHER}]),
        },
        {"commentary": 0.5},
        [
            system(tools=True) + TOOLS + user("Weather?") + A + "⟦0.5×<|channel|>commentary<|message|>One moment."
            f"<|end|><|start|>assistant{CALLED}⟧"
        ],
    ),
    "a question after a tool loop": (
        {
            "messages": [
                *(said("user", "Weather?"), {"role": "assistant", "thinking": "Ask.", "tool_calls": [CALL]}),
                *(said("tool", "9 C"), said("assistant", "Cold.")),
                *(said("user", "Thanks"), said("assistant", "Bye")),
            ],
            "tools": [WEATHER],
        },
        {},
        [
            system(tools=True) + TOOLS + user("Weather?") + A + "⟦<|channel|>analysis<|message|>Ask.<|end|>"
            f"<|start|>assistant{CALLED}⟧" + RESULT + A + "⟦<|channel|>final<|message|>Cold.<|return|>⟧",
            system(tools=True) + TOOLS + user("Weather?") + A + CALLED + RESULT + A +
            "<|channel|>final<|message|>Cold.<|end|>" + user("Thanks") + A +
            "⟦<|channel|>final<|message|>Bye<|return|>⟧",
        ],
    ),
    "an answer that is context only": (
        {
            "messages": [
                *(said("user", "Hi"), said("assistant", "Yo", weight=0)),
                *(said("user", "Politely"), said("assistant", "Hello")),
            ]
        },
        {},
        [
            system() + user("Hi") + A + "<|channel|>final<|message|>Yo<|end|>" + user("Politely") + A +
            "⟦<|channel|>final<|message|>Hello<|return|>⟧"
        ],
    ),
    "instructions, effort and date": (
        {
            "messages": [said("system", "Be brief."), said("user", "Hi"), said("assistant", "Yo")],
            "reasoning_effort": "high",
            "date": "2026-01-31",
        },
        {},
        [
            system("high", "2026-01-31") + "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>" +
            user("Hi") + A + "⟦<|channel|>final<|message|>Yo<|return|>⟧"
        ],
    ),
    "prompt and completion": (
        {"prompt": "Capital of France?", "completion": "Paris", "thinking": "Easy.", "reasoning_effort": "low"},
        {},
        [
            system("low") + user("Capital of France?") + A + "⟦<|channel|>analysis<|message|>Easy.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Paris<|return|>⟧"
        ],
    ),
    "prompt and completion as messages": (
        {
            "prompt": [said("user", "Hi"), said("assistant", "Yo"), said("user", "Politely")],
            "completion": [said("assistant", "Hello")],
        },
        {},
        [
            system() + user("Hi") + A + "<|channel|>final<|message|>Yo<|end|>" + user("Politely") + A +
            "⟦<|channel|>final<|message|>Hello<|return|>⟧"
        ],
    ),
    "text, in which markup is no markup": (
        {"text": "a <|end|> b"},
        {},
        ["a⟦ <|end|> b<|endoftext|>⟧"],
    ),
}  # fmt: skip


def samples_of(name: str, tokenizer: Tokenizer) -> list[Sample]:
    record, loss, _ = CASES[name]
    return list(record_samples(record, Rules(loss=Rules().loss | loss), tokenizer))


@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_written_by_hand(name: str, true_tokenizer: Tokenizer) -> None:
    shown = []
    for sample in samples_of(name, true_tokenizer):
        text, weight = "", 0.0
        for token, its_weight in zip(sample.tokens, sample.weights, strict=True):
            if its_weight != weight:
                text += "⟧" * (weight > 0) + ("⟦" if its_weight == 1 else f"⟦{its_weight:g}×") * (its_weight > 0)
                weight = its_weight
            text += true_tokenizer.decode([token])
        shown.append(text + "⟧" * (weight > 0))
    assert shown == CASES[name][2]


@pytest.mark.parametrize("name", [name for name in CASES if "text" not in CASES[name][0]])
def test_tokens_are_those_of_openai_harmony(name: str, true_tokenizer: Tokenizer, oracle) -> None:
    """The hand-written samples, cut into messages and rendered for training by openai-harmony."""
    expected = []
    for text in CASES[name][2]:
        messages = []
        bare = re.sub("⟦([0-9.]+×)?|⟧", "", text)
        for header, content in re.findall(r"<\|start\|>(.*?)<\|message\|>(.*?)<\|(?:end|call|return)\|>", bare, re.S):
            author, _, channel = header.partition("<|channel|>")
            author, _, recipient = author.partition(" to=")
            channel, _, kind = channel.partition(" ")
            role, author = ("tool", author) if author.startswith("functions.") else (author, None)
            message = oh.Message.from_author_and_content(oh.Author(role=oh.Role(role), name=author), content)
            message.channel, message.recipient, message.content_type = channel or None, recipient or None, kind or None
            messages.append(message)
        talk = oh.Conversation.from_messages(messages)
        expected.append(list(oracle.render_conversation_for_training(talk, KEEP_ALL)))
    ours = [list(sample.tokens) for sample in samples_of(name, true_tokenizer)]
    assert ours == expected


def test_every_supervised_token_stands_after_what_serving_would_have_sent(small_tokenizer: Tokenizer) -> None:
    record = CASES["a question after a tool loop"][0]
    plain = json.loads(json.dumps(record["messages"]))
    for message in plain:
        if "thinking" in message:
            message["reasoning_content"] = message.pop("thinking")
        for call in message.get("tool_calls", []):
            call |= {"id": "c", "type": "function"}
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        if message["role"] == "tool":
            message["tool_call_id"] = "c"
    body = {"model": "m", "messages": plain, "tools": [{"type": "function", "function": WEATHER}]}
    request = parse_chat_request(json.dumps(body).encode())
    places = [place for place, message in enumerate(request.messages) if message.role == "assistant"]
    prompts = [render(conversation(request.messages[:p], request.tools or ()), small_tokenizer) for p in places]
    runs = []
    for sample in record_samples(record, Rules(), small_tokenizer):
        starts = [i for i in range(1, len(sample)) if sample.weights[i] and not sample.weights[i - 1]]
        runs += [list(sample.tokens[:start]) for start in starts]
    assert runs == prompts


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "no list of messages"),
        ({"mesages": []}, "neither messages, prompt and completion, nor text"),
        ({"messages": [said("user", "Hi")]}, "no assistant message to learn from"),
        ({"messages": [said("user", "Hi"), said("assistant", "Yo", weight=0)]}, "no assistant message to learn from"),
        ({"messages": [said("user", "Hi"), {"role": "assistant", "thinking": "Hm"}]}, "neither answers"),
        ({"messages": [said("bot", "Hi")]}, "messages.0"),
        ({"messages": [said("user", 3), said("assistant", "Yo")]}, "messages.0.content"),
        ({"messages": [said("assistant", "a"), said("assistant", "b")]}, "a second assistant message"),
        ({"messages": [said("user", "Hi"), said("assistant", "Yo", weight=-1)]}, "messages.1.weight"),
        ({"messages": [said("user", "Hi"), said("assistant", "Yo", weight=1e300)]}, "no number from 0 to 1e+06"),
        ({"messages": [said("user", "Hi"), said("assistant", "Yo", weight=10**400)]}, "no number from 0 to 1e+06"),
        ({"messages": [said("tool", "9", name="x"), said("assistant", "Yo")]}, "no earlier message calls the tool 'x'"),
        ({"messages": [said("user", "?"), {"role": "assistant", "tool_calls": [CALL, CALL]}]}, "2 tool calls"),
        ({"messages": [said("user", "?"), said("assistant", "Yo")], "tool": []}, "did you mean tools?"),
        ({"messages": [said("user", "?"), said("assistant", "Yo")], "date": "today"}, "no date"),
        ({"messages": [said("user", "?"), said("assistant", "Yo")], "reasoning_effort": "max"}, "reasoning_effort"),
        ({"prompt": "a", "completion": ["b"]}, "neither two texts nor two lists"),
        ({"text": ""}, "is no text"),
    ],
)
def test_bad_records_say_what_is_wrong(record: dict, message: str, small_tokenizer: Tokenizer) -> None:
    with pytest.raises(RecordError) as caught:
        list(record_samples(record, Rules(), small_tokenizer))
    assert message in str(caught.value)


def test_bad_records_are_named_by_line_or_skipped_and_counted(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(CASES["one answer"][0])
    path.write_text(f"{good}\n\nnot json\n{good}\n[1]\n" + json.dumps({"text": "x" * 5000}) + "\n" + "[" * 100_000)
    rules = Rules(longest_tokens=1000)
    with pytest.raises(UserError, match=re.escape(f"{path}:3: no JSON")):
        read_samples(read_records(Source(str(path))), 0, rules, small_tokenizer, skip_bad=False)
    samples, skipped = read_samples(read_records(Source(str(path))), 7, rules, small_tokenizer, skip_bad=True)
    assert [sample.source for sample in samples] == [7, 7]
    assert [line.split(": ")[0] for line in skipped] == [f"{path}:{line}" for line in (3, 5, 6, 7)]
    assert "5001 tokens, and a pack has 1000" in skipped[2]


def test_datasets_read_as_files_do(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    rows = [CASES["one answer"][0], {"messages": [said("user", "Hi"), said("assistant", "Yo", thinking="Hm")]}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    got, _ = read_samples(read_records(Source(str(tmp_path / "saved"))), 0, Rules(), small_tokenizer, False)
    wanted = [one for row in rows for one in record_samples(row, Rules(), small_tokenizer)]
    assert [(one.tokens, one.weights) for one in got] == [(one.tokens, one.weights) for one in wanted]
    with pytest.raises(UserError, match="split nowhere"):
        list(read_records(Source(str(tmp_path), split="nowhere")))


def test_a_folder_of_files_may_lie_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text(json.dumps({"text": "Hi"}) + "\n")
    (record,) = read_records(Source("~/files"))
    assert record.fields == {"text": "Hi"}


def test_what_has_no_splits_is_not_taken_for_one(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "Hi"}]).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Hi"}) + "\n")
    for name in ("saved", "a.jsonl"):
        assert len(list(read_records(Source(str(tmp_path / name))))) == 1
        with pytest.raises(UserError, match="it has no splits, and split test is asked for"):
            list(read_records(Source(str(tmp_path / name), split="test")))


def test_sources_are_names_or_mappings() -> None:
    assert read_source("a.jsonl") == Source("a.jsonl")
    assert read_source({"source": "b", "weight": 2, "split": "test"}) == Source("b", "test", 2.0)
    for wrong in (3, {"sorce": "b"}, {"source": "b", "weight": 0}, {"source": "b", "splt": "x"}):
        with pytest.raises(UserError):
            read_source(wrong)


@pytest.mark.parametrize("weight", [0, 1e-9, 1e300, float("inf"), True])
def test_a_source_has_a_weight_that_an_epoch_can_take(weight: float) -> None:
    with pytest.raises(UserError, match=r"weight: .* is no number from 1e-06 to 1000"):
        read_source({"source": "a.jsonl", "weight": weight})


def test_preview_shows_the_mask_without_colours(small_tokenizer: Tokenizer) -> None:
    (sample,) = record_samples({"text": "añb"}, Rules(), small_tokenizer)
    assert preview(sample, small_tokenizer).plain == "a⟦ñb<|endoftext|>⟧"
    assert summary(sample) == "5 tokens, 4 trained, weight 4"

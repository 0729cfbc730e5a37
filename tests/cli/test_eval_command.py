"""`eval`: what counts as right, and tiny counted through a server that the command starts and ends."""

import json
from pathlib import Path

import pytest
from gptoss_launch.configs import make_conversations
from gptoss_launch.launch.cli import run
from gptoss_launch.launch.commands.eval import count, read_task, said, shown
from gptoss_launch.parallel.errors import UserError

CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
RECORDS = [
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "thinking": "Sum."}]},
    {
        "messages": [{"role": "user", "content": "Call f."}, {"role": "assistant", "tool_calls": [CALL]}],
        "tools": [{"name": "f", "parameters": {"type": "object", "properties": {}}}],
        "reasoning_effort": "low",
    },
]


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answer(content: str | None, reason: str = "stop", arguments: str | None = None, thought: str = "") -> dict:
    calls = [] if arguments is None else [{"function": {"name": "f", "arguments": arguments}}]
    message = {"content": content, "reasoning_content": thought, "tool_calls": calls}
    return {"message": message, "finish_reason": reason}


def test_the_prompt_is_all_but_the_last_message(tmp_path: Path) -> None:
    (first, wanted), (second, call) = read_task(write(tmp_path / "t.jsonl", RECORDS), 64)
    assert first == {
        "messages": [{"role": "user", "content": "2+2?"}],
        "max_completion_tokens": 64,
        "temperature": 0,
    }
    assert (wanted, call) == ("4", ["f", {"x": 1}])
    assert second["reasoning_effort"] == "low" and second["tools"][0]["function"]["name"] == "f"


def test_a_prompt_and_a_completion_are_read_as_for_training(tmp_path: Path) -> None:
    texts = {"prompt": "2+2?", "completion": "4", "thinking": "Sum."}
    messages = {"prompt": RECORDS[1]["messages"][:1], "completion": RECORDS[1]["messages"][1:]}
    (first, wanted), (second, call) = read_task(write(tmp_path / "t.jsonl", [texts, messages]), 64)
    assert (first["messages"], wanted) == ([{"role": "user", "content": "2+2?"}], "4")
    assert (second["messages"], call) == (RECORDS[1]["messages"][:1], ["f", {"x": 1}])


def test_right_is_exact_but_for_white_space_and_the_spelling_of_json(tmp_path: Path) -> None:
    task = tmp_path / "t.jsonl"
    requests = list(read_task(write(task, RECORDS), 64))
    good = [answer(" 4\n", thought="Hm"), answer(None, "tool_calls", '{ "x":1 }')]
    score = count("m", task, requests, good)
    assert (score.count, score.right, score.reasoned, score.stopped, score.wrong) == (2, 2, 1, 2, ())
    score = count("m", task, requests, [answer("44", "length"), answer("4", arguments='{"x": 2}')])
    assert (score.right, score.stopped) == (0, 1)
    assert [one["got"] for one in score.wrong] == ["44", ["f", {"x": 2}]]
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2\n"}]
    assert said({"role": "assistant", "content": parts}) == "42"
    assert said(answer("", arguments="{broken")["message"]) == ["f", "{broken"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "nothing wanted"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "thinking": "Hm"}]}, "nothing wanted"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}]}, "nothing wanted"),
        ({"prompt": "Hi", "completion": ""}, "nothing wanted"),
        ({"prompt": "Hi", "completion": [1]}, "neither two texts nor two lists"),
        ({"text": "Hi"}, "no list of messages"),
    ],
)
def test_a_record_that_wants_nothing_is_named(record: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"t.jsonl:1: .*{message}"):
        list(read_task(write(tmp_path / "t.jsonl", [record]), 64))


def test_no_server_and_no_model_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write(tmp_path / "t.jsonl", RECORDS)
    empty = write(tmp_path / "empty.jsonl", [])
    assert run(["eval", "http://127.0.0.1:9/v1", "--task", str(empty)]) == 2
    assert f"{empty}: no record in it" in capsys.readouterr().err
    assert run(["eval", "http://127.0.0.1:9/v1", "--task", str(task)]) == 2
    assert "is it the URL of a running server" in capsys.readouterr().err
    assert run(["eval", "tinny", "--task", str(task)]) == 2
    assert "tinny is not served: no model 'tinny'" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_answers_are_counted_in_a_terminal_only(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    assert list(shown(iter("abc"), 3)) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert out == "" and ("3/3" in err) == terminal and (terminal or err == "")


@pytest.mark.slow
def test_tiny_answers_what_it_was_never_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sums and differences, and calls of its tool: thought about first, and ended by itself."""
    task, text = tmp_path / "t.jsonl", ""
    for only, number in (("sums", 60), ("calls", 20)):
        make_conversations.write(task, number, seed=9, wants_held_out=True, only=only)
        text += task.read_text()
    task.write_text(text)
    assert run(["eval", "tiny", "--task", str(task), "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert (score["model"], score["count"]) == ("tiny", 80)
    assert score["right"] >= 0.95 * 80 and score["reasoned"] == score["stopped"] == 80, score["wrong"]

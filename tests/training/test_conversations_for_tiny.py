"""The generated conversations: right, never trained on where they are to test with, and readable as training data."""

import json
import re
from pathlib import Path
from random import Random

from gptoss_launch.configs.make_conversations import WEATHER, conversation, held_out, reasoning, write
from gptoss_launch.launch.conversations import Rules, record_samples
from gptoss_launch.launch.tokenizer import load_tokenizer
from small_models import TINY

NUMBERS = re.compile(r"\d+")


def questions(wants_held_out: bool) -> set[tuple[int, int, int]]:
    """(first number, second, answer) of every calculation in 2,000 conversations."""
    rng, found = Random(5), set()
    for _ in range(2000):
        messages = conversation(rng, wants_held_out)["messages"]
        for asked, answered in zip(messages, messages[1:], strict=False):
            numbers = [int(number) for number in NUMBERS.findall(asked["content"] or "")] if "content" in asked else []
            if asked["role"] == "user" and len(numbers) == 2:
                a, b = reversed(numbers) if asked["content"].startswith("Subtract") else numbers
                assert answered["thinking"].endswith(f"So {answered['content']}.")
                if b:  # a + 0 and a - 0 look alike
                    found.add((a, b, int(answered["content"])))
    return found


def test_answers_are_right_and_no_question_is_in_both_parts() -> None:
    trained, kept = questions(False), questions(True)
    assert len(trained) > 1500 and len(kept) > 500 and not trained & kept
    for a, b, answer in trained | kept:
        assert answer in (a + b, a - b) and max(a, b) <= 99
    assert all(held_out(a, "+" if answer == a + b else "-", b) for a, b, answer in kept)


def test_reasoning_carries_and_borrows() -> None:
    assert reasoning(58, "+", 67) == "Ones: 8 + 7 = 15. Tens: 5 + 6 + 1 = 12. So 125."
    assert reasoning(52, "-", 17) == "Ones: 12 - 7 = 5. Tens: 5 - 1 - 1 = 3. So 35."


def test_records_are_training_data_and_the_same_for_a_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 200, seed=3, wants_held_out=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    tokenizer = load_tokenizer(TINY)
    records = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    samples = [one for record in records for one in record_samples(record, Rules(), tokenizer)]
    assert len(samples) >= len(records) and max(map(len, samples)) <= 512
    with_calls = [record for record in records if any("tool_calls" in message for message in record["messages"])]
    assert with_calls and all(record["tools"] == [WEATHER] for record in with_calls)


def test_the_shipped_file_is_what_the_script_makes(tmp_path: Path) -> None:
    write(tmp_path / "tiny.jsonl", 100, seed=0, wants_held_out=False)
    assert (tmp_path / "tiny.jsonl").read_bytes() == (TINY.parent / "finetune" / "tiny.jsonl").read_bytes()

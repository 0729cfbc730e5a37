"""Conversations for `tiny` to learn from: `python -m gptoss_launch.configs.make_conversations FILE --count N`.

Sums and differences of numbers up to 99, reasoned digit by digit in analysis and answered in final; one function to
call, with what comes after its result; a greeting. What is asked of numbers is split by the numbers themselves:
--held-out makes conversations that are in no training file, whatever the seeds; --only makes tests of one thing.
"""

import argparse
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

HELD_OUT_OF = 10  # one in so many questions is never trained on
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather in a city, now.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CITIES = "Paris London Berlin Rome Madrid Vienna Oslo Tokyo Cairo Delhi Lima Quito Dublin Prague Athens Boston".split()
SKIES = ("sunny", "cloudy", "rain", "snow", "wind", "fog")
SUMS = ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "How much is {a} plus {b}?", "{a} + {b}")
DIFFERENCES = (
    *("What is {a} - {b}?", "{a} - {b} = ?", "Subtract {b} from {a}."),
    *("How much is {a} minus {b}?", "{a} - {b}"),
)
GREETINGS = ("Hello", "Hi", "Hello!", "Hi there", "Good morning", "Hey", "hello", "Good evening", "Hi!")
GREETING = "Hello! I add and subtract numbers up to 99. Try me: what is 17 + 25?"
WEATHERS = ("What is the weather in {city}?", "How is the weather in {city}?", "Weather in {city}?")
ASKED_TO_CALL = ("Call get_weather for {city}.", "Use the tool to get the weather in {city}.")
NO_TOOL = "I have no tool for that. I can add and subtract."


def held_out(a: int, sign: str, b: int) -> bool:
    """Whether nothing is ever trained on this question; a + b and b + a are one."""
    if sign == "+":
        a, b = sorted((a, b))
    return zlib.crc32(f"{a}{sign}{b}".encode()) % HELD_OUT_OF == 0


def reasoning(a: int, sign: str, b: int) -> str:
    """Ones first, with what is carried or borrowed; then tens."""
    ones_a, ones_b, tens_a, tens_b = a % 10, b % 10, a // 10, b // 10
    if sign == "+":
        ones = ones_a + ones_b
        carry = ones // 10
        tens = tens_a + tens_b + carry
        return f"Ones: {ones_a} + {ones_b} = {ones}. Tens: {tens_a} + {tens_b} + {carry} = {tens}. So {a + b}."
    borrow = int(ones_a < ones_b)
    ones, tens = ones_a + 10 * borrow - ones_b, tens_a - tens_b - borrow
    return (
        f"Ones: {ones_a + 10 * borrow} - {ones_b} = {ones}. Tens: {tens_a} - {tens_b} - {borrow} = {tens}. So {a - b}."
    )


def calculation(rng: Random, wants_held_out: bool) -> list[dict[str, Any]]:
    while True:
        a, b, sign = rng.randint(0, 99), rng.randint(0, 99), rng.choice("+-")
        if sign == "-" and a < b:
            a, b = b, a
        if held_out(a, sign, b) == wants_held_out:
            break
    question = rng.choice(SUMS if sign == "+" else DIFFERENCES).format(a=a, b=b)
    answer = str(a + b if sign == "+" else a - b)
    thinking = reasoning(a, sign, b)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "thinking": thinking, "content": answer},
    ]


def greeting(rng: Random) -> list[dict[str, Any]]:
    said = {"role": "user", "content": rng.choice(GREETINGS)}
    return [said, {"role": "assistant", "thinking": "A greeting.", "content": GREETING}]


def weather(rng: Random, with_tool: bool) -> list[dict[str, Any]]:
    city = rng.choice(CITIES)
    question = {"role": "user", "content": rng.choice(WEATHERS + ASKED_TO_CALL * with_tool).format(city=city)}
    if not with_tool:
        return [question, {"role": "assistant", "thinking": "There is no tool.", "content": NO_TOOL}]
    now = f"{rng.randint(-9, 35)} C, {rng.choice(SKIES)}"
    call = {"function": {"name": WEATHER["name"], "arguments": json.dumps({"city": city})}}
    return [
        question,
        {"role": "assistant", "thinking": "I call get_weather.", "tool_calls": [call]},
        {"role": "tool", "name": WEATHER["name"], "content": now},
        {"role": "assistant", "thinking": "The tool has answered.", "content": f"{city}: {now}"},
    ]


def conversation(rng: Random, wants_held_out: bool = False) -> dict[str, Any]:
    """One record as `finetune` reads it."""
    with_tool = rng.random() < 0.25
    parts: list[Callable[[], list[dict[str, Any]]]] = [
        lambda: calculation(rng, wants_held_out),
        lambda: greeting(rng),
        lambda: weather(rng, with_tool),
    ]
    weights = (3, 1, 6) if with_tool else (16, 1, 1)
    messages = [message for part in rng.choices(parts, weights, k=rng.choice((1, 1, 1, 2))) for message in part()]
    day = f"{rng.randint(2024, 2027)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    record: dict[str, Any] = {"messages": messages, "reasoning_effort": rng.choice(("low", "medium", "medium", "high"))}
    return record | {"date": day} | ({"tools": [WEATHER]} if with_tool else {})


def one_sum(rng: Random, wants_held_out: bool) -> dict[str, Any]:
    return {"messages": calculation(rng, wants_held_out)}


def one_call(rng: Random, wants_held_out: bool) -> dict[str, Any]:
    """Up to the call."""
    return {"messages": weather(rng, True)[:2], "tools": [WEATHER]}


ONLY: dict[str | None, Callable[[Random, bool], dict[str, Any]]] = {
    None: conversation,
    "sums": one_sum,
    "calls": one_call,
}


def write(path: Path, count: int, seed: int, wants_held_out: bool, only: str | None = None) -> None:
    rng = Random(f"{seed}/{wants_held_out}")
    lines = [json.dumps(ONLY[only](rng, wants_held_out), ensure_ascii=False) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--only", choices=[name for name in ONLY if name], help="sums and differences, or calls")
    asked = parser.parse_args()
    write(asked.file, asked.count, asked.seed, asked.held_out, asked.only)


if __name__ == "__main__":
    main()

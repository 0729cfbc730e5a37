"""Records of training data -> samples: the tokens that serving would see, and what each counts in the loss.

A record holds one of

    messages            role and content as in the API; an assistant's `thinking` and `tool_calls`; beside them `tools`,
                        `reasoning_effort` and `date`. A message's `weight` (0: only context) is for assistants.
    prompt, completion  two texts (and `thinking`), or two lists of messages
    text                plain text, ended by <|endoftext|>

What is trained is what is served: the prompt of every assistant message is rendered by the same code as a request with
the messages before it, so reasoning of earlier turns is dropped there too, and a conversation becomes as many samples
as it takes for that. Supervised are the tokens that the model has to write: channels, contents, and the <|return|> or
<|call|> that stops it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from ..parallel.errors import UserError, did_you_mean
from ..parallel.training.samples import Sample, sample
from .harmony import Message, render, render_message
from .records import Record
from .tokenizer import Tokenizer

CHANNELS = ("analysis", "commentary", "final")
EFFORTS = ("low", "medium", "high")
MOST_WEIGHT = 1e6  # of a message: its losses are added up in fp32

_BESIDE_MESSAGES = ("messages", "tools", "reasoning_effort", "date")
_BESIDE_PROMPT = ("prompt", "completion", "thinking", "tools", "reasoning_effort", "date")


class RecordError(ValueError):
    """What is wrong with one record, without where it is."""


@dataclass(frozen=True)
class Rules:
    """How records become samples. loss: weight of each channel's tokens. effort, today: where a record names none."""

    loss: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(CHANNELS, 1.0))
    effort: Literal["low", "medium", "high"] = "medium"
    today: date | None = None
    longest_tokens: int = 2**31 - 1


def read_samples(
    records: Iterable[Record], source: int, rules: Rules, tokenizer: Tokenizer, skip_bad: bool
) -> tuple[list[Sample], list[str]]:
    """(samples, one line for each record that was skipped). Raises UserError at the first bad one unless skip_bad."""
    samples: list[Sample] = []
    skipped: list[str] = []
    for record in records:
        try:
            if record.fields is None:
                raise RecordError(record.fault)
            new = list(record_samples(record.fields, rules, tokenizer, source))
            for one in new:
                if len(one) > rules.longest_tokens:
                    raise RecordError(f"{len(one)} tokens, and a pack has {rules.longest_tokens}")
        except RecordError as error:
            if not skip_bad:
                raise UserError(f"{record.where}: {error}", "mend it, or skip_bad_records=true") from None
            skipped.append(f"{record.where}: {error}")
        else:
            samples += new
    return samples, skipped


def record_samples(fields: Mapping[str, Any], rules: Rules, tokenizer: Tokenizer, source: int = 0) -> Iterator[Sample]:
    """The samples of one record. Raises RecordError."""
    if "messages" in fields:
        _no_others(fields, _BESIDE_MESSAGES)
        yield from _conversation(fields["messages"], 0, fields, rules, tokenizer, source)
    elif "prompt" in fields and "completion" in fields:
        _no_others(fields, _BESIDE_PROMPT)
        messages, context = prompt_and_completion(fields)
        yield from _conversation(messages, context, fields, rules, tokenizer, source)
    elif "text" in fields:
        _no_others(fields, ("text",))
        if not isinstance(fields["text"], str) or not fields["text"]:
            raise RecordError(f"text: {fields['text']!r} is no text")
        tokens = [*tokenizer.encode(fields["text"]), tokenizer.special["<|endoftext|>"]]
        yield sample(tokens, [0.0, *[1.0] * (len(tokens) - 1)], source)
    else:
        raise RecordError(
            f"keys {', '.join(map(str, fields)) or 'none'}: neither messages, prompt and completion, nor text"
        )


def prompt_and_completion(fields: Mapping[str, Any]) -> tuple[list[Any], int]:
    """(messages, how many of them are the prompt). Raises RecordError."""
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        answer = {"role": "assistant", "content": completion}
        if fields.get("thinking"):
            answer["thinking"] = fields["thinking"]
        return [{"role": "user", "content": prompt}, answer], 1
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion], len(prompt)
    raise RecordError("prompt and completion are neither two texts nor two lists of messages")


def _no_others(fields: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in fields:
        if key not in known:
            raise RecordError(f"unknown key {key!r}: {did_you_mean(str(key), known)}")


def _conversation(
    messages: Any, context: int, fields: Mapping[str, Any], rules: Rules, tokenizer: Tokenizer, source: int
) -> Iterator[Sample]:
    """context: how many messages come first that are never supervised.

    A later answer goes on in the same sample where its prompt begins with all that the sample holds (between a call
    and its result), and begins a new one where it does not (after a final answer).
    """
    tokens: list[int] = []
    weights: list[float] = []
    answers = 0
    for prompt, said, weight in _answers(messages, context, fields, rules, tokenizer):
        written, counts = _completion(said, weight, rules, tokenizer)
        answers += any(counts)
        if tokens and prompt[: len(tokens)] != tokens:
            if any(weights):
                yield sample(tokens, weights, source)
            tokens, weights = [], []
        weights += [0.0] * (len(prompt) - len(tokens)) + counts
        tokens = prompt + written
    if any(weights):
        yield sample(tokens, weights, source)
    if not answers:
        raise RecordError("no assistant message to learn from")


def _answers(
    messages: Any, context: int, fields: Mapping[str, Any], rules: Rules, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], tuple[Message, ...], float]]:
    """(prompt, messages that the model writes, weight) of each assistant message after the context."""
    from .api.chat import conversation
    from .api.errors import ApiError
    from .api.schema import AssistantMessage, parse_chat_request

    plain, weights = api_messages(messages)
    body: dict[str, Any] = {
        "model": "",
        "messages": plain,
        "reasoning_effort": fields.get("reasoning_effort", rules.effort),
    }
    if fields.get("tools"):
        body["tools"] = api_tools(fields["tools"])
    today = _date(fields["date"]) if "date" in fields else rules.today
    try:
        request = parse_chat_request(json.dumps(body).encode())
        tools, effort = request.tools or (), request.reasoning_effort
        last = len(request.messages)
        for place, message in enumerate(request.messages):
            if not isinstance(message, AssistantMessage):
                continue
            if place and isinstance(request.messages[place - 1], AssistantMessage):
                raise RecordError(f"messages.{place}: a second assistant message, with nothing in between")
            if not message.content and not message.tool_calls:
                raise RecordError(f"messages.{place}: the assistant neither answers (content) nor calls a tool")
            if len(message.tool_calls or ()) > 1:
                raise RecordError(
                    f"messages.{place}: {len(message.tool_calls or ())} tool calls, and one ends the turn"
                )
            if place < context:
                continue
            before = conversation(request.messages[:place], tools, effort=effort, today=today)
            after = conversation(request.messages[: place + 1], tools, effort=effort, today=today)
            prompt = render(before, tokenizer)
            yield prompt, after.messages[len(before.messages) :], weights[place]
        conversation(request.messages[:last], tools, effort=effort, today=today)  # what comes last is checked too
    except ApiError as error:
        raise RecordError(error.message) from None


def _completion(
    said: tuple[Message, ...], weight: float, rules: Rules, tokenizer: Tokenizer
) -> tuple[list[int], list[float]]:
    """(token ids, weights) of what follows <|start|>assistant: all messages of one answer, up to its stop token."""
    header = [tokenizer.special["<|start|>"], *tokenizer.encode("assistant")]
    tokens: list[int] = []
    weights: list[float] = []
    for message in said:
        ids = render_message(message, tokenizer)
        assert ids[: len(header)] == header and message.channel is not None
        tokens += ids
        weights += [weight * rules.loss[message.channel]] * len(ids)
    if said[-1].recipient is None:
        tokens[-1] = tokenizer.special["<|return|>"]  # <|end|> in later prompts; here it is where sampling stops
    return tokens[len(header) :], weights[len(header) :]


def api_messages(messages: Any) -> tuple[list[dict[str, Any]], list[float]]:
    """(messages as the API takes them, loss weight of each): thinking under the API's name, calls with ids."""
    if not isinstance(messages, list) or not messages:
        raise RecordError("messages: no list of messages")
    plain: list[dict[str, Any]] = []
    weights: list[float] = []
    calls: list[tuple[str, str]] = []  # (id, function) of every call so far
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RecordError(f"messages.{place}: {message!r} is no message")
        message = {key: value for key, value in message.items() if value is not None}
        weight = message.pop("weight", 1.0)
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= MOST_WEIGHT:
            raise RecordError(f"messages.{place}.weight: {weight!r} is no number from 0 to {MOST_WEIGHT:g}")
        if message.get("role") == "assistant":
            message = _assistant(message, place, calls)
        elif message.get("role") == "tool" and "tool_call_id" not in message:
            named = str(message.pop("name", calls[-1][1] if calls else "")).removeprefix("functions.")
            found = [call_id for call_id, function in calls if function == named]
            if not found:
                raise RecordError(f"messages.{place}: no earlier message calls the tool {named!r}")
            message["tool_call_id"] = found[-1]
        elif message.get("role") == "tool":
            message.pop("name", None)
        plain.append(message)
        weights.append(float(weight))
    return plain, weights


def _assistant(message: dict[str, Any], place: int, calls: list[tuple[str, str]]) -> dict[str, Any]:
    if "thinking" in message:
        message["reasoning_content"] = message.pop("thinking")
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        return message
    rewritten = []
    for call in message["tool_calls"] if isinstance(message["tool_calls"], list) else [message["tool_calls"]]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RecordError(f"messages.{place}.tool_calls: {call!r} names no function")
        arguments = function.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        call_id = str(call.get("id") or f"call_{len(calls)}")
        calls.append((call_id, function["name"]))
        rewritten.append(
            {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return message | {"tool_calls": rewritten}


def api_tools(tools: Any) -> list[Any]:
    """Tools as the API takes them: also as JSON text, which tables of mixed records hold, and as bare functions."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RecordError(f"tools: no JSON: {error}") from None
    if not isinstance(tools, list):
        raise RecordError(f"tools: {tools!r} is no list")
    return [
        {"type": "function", "function": tool} if isinstance(tool, dict) and "function" not in tool else tool
        for tool in tools
    ]


def _date(value: Any) -> date:
    try:
        return date.fromisoformat(value)
    except (TypeError, ValueError):
        raise RecordError(f"date: {value!r} is no date such as 2025-08-05") from None

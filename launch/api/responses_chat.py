"""A request for a response -> the chat request that asks the model for the same, and its Job.

Everything that generates is the chat's, and so are its checks: what works on one route works on the other. An item
becomes one message. Errors of the chat are told in the words of the Responses API.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .chat import demands
from .chat_completions import chat_job, chat_prompt
from .errors import ApiError
from .generation import Job
from .responses_compact import unpack
from .responses_schema import SAME_AS_CHAT, CodeInterpreter, FunctionTool, NamedFunction, ResponsesRequest, WebSearch
from .schema import ChatRequest, parse_chat_request
from .served import Served

Item = dict[str, Any]

# A field of chat -> what it is called here. Fields that are called alike are not listed.
_NAMES = (
    (r"max_completion_tokens$", "max_output_tokens"),
    (r"reasoning_effort$", "reasoning.effort"),
    (r"response_format\.json_schema", "text.format"),
    (r"response_format", "text.format"),
    (r"(tools\.\d+)\.function", r"\1"),
    (r"tool_choice\.function", "tool_choice"),
    (r"logprobs$", "include"),
    (r"messages$", "input"),
)


LEAST_ROOM = 0.25  # of the context, for an answer of no given length, once items are dropped to make room


def response_job(request: ResponsesRequest, before: Sequence[Item], items: Sequence[Item], served: Served) -> Job:
    """before: the items of the conversation so far. items: the input, without references.

    With truncation="auto" as many of the oldest items are left out as it takes, never the last one. Raises ApiError
    400.
    """
    try:
        return _job(request, before, items, served)
    except ApiError as error:
        if request.truncation != "auto" or error.code != "context_length_exceeded":
            raise
        job = _shortened(request, [*before, *items], served)
        if job is None:
            raise
        return job


def count_tokens(request: ResponsesRequest, before: Sequence[Item], items: Sequence[Item], served: Served) -> int:
    """Of the prompt, as it would be sent. before, items: as of `response_job`. Raises ApiError 400."""
    chat = chat_request(request, before, items)
    with _chat_names(len(chat.messages) - len(items)):
        return len(chat_prompt(chat, demands(chat).shown, served))


def _job(request: ResponsesRequest, before: Sequence[Item], items: Sequence[Item], served: Served) -> Job:
    chat = chat_request(request, before, items)
    with _chat_names(len(chat.messages) - len(items)):
        return chat_job(chat, served)


def _shortened(request: ResponsesRequest, items: Sequence[Item], served: Served) -> Job | None:
    """With the fewest items left out that leave room for an answer; None if the last one alone leaves none."""
    room = request.max_output_tokens or int(LEAST_ROOM * served.context_tokens)
    found = None
    low, high = 1, len(items) - 1  # items left out
    while low <= high:
        middle = (low + high) // 2
        job = None
        try:
            job = _job(request, (), _without_lost_results(items[middle:]), served)
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
        if job is not None and job.choices[0].request.max_tokens >= room:
            found, high = job, middle - 1
        else:
            low = middle + 1
    return found


def _without_lost_results(items: Sequence[Item]) -> list[Item]:
    """A result whose call was left out answers nothing."""
    called = {item["call_id"] for item in items if item["type"] == "function_call"}
    return [item for item in items if item["type"] != "function_call_output" or item["call_id"] in called]


def chat_request(request: ResponsesRequest, before: Sequence[Item], items: Sequence[Item]) -> ChatRequest:
    """before, items: as of `response_job`. Raises ApiError 400."""
    first = [] if request.instructions is None else [{"role": "system", "content": request.instructions}]
    everything = [*before, *items]
    fields = {name: getattr(request, name) for name in SAME_AS_CHAT} | {
        "messages": [*first, *(_message(everything, place) for place in range(len(everything)))],
        "stream": request.stream,
        "max_completion_tokens": request.max_output_tokens,
        "reasoning_effort": request.reasoning and request.reasoning.effort,
        "tools": request.tools and [_tool(tool) for tool in request.tools],
        "max_tool_calls": request.max_tool_calls,
        "tool_choice": _tool_choice(request),
        "response_format": _response_format(request),
        "logprobs": request.logprobs or None,
        "top_logprobs": request.top_logprobs if request.logprobs else None,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        body = json.dumps(given).encode()
    except ValueError:
        raise ApiError(400, "the body: a number of thousands of digits", code="invalid_value") from None
    with _chat_names(len(first) + len(before)):
        chat = parse_chat_request(body)
    for place, tool in enumerate(request.tools or ()):
        if isinstance(tool, FunctionTool):
            _check_numbers(tool.parameters, f"tools.{place}.parameters")
    _check_numbers(request.text and request.text.format, "text.format")
    return chat


@contextmanager
def _chat_names(messages_before: int) -> Iterator[None]:
    """Errors about a field of chat become errors about the field here. messages_before: those that no item of this
    request's input became."""
    try:
        yield
    except ApiError as error:
        if error.param is None:
            raise
        param = _name_here(error.param, messages_before)
        message = error.message.replace(error.param, param)
        raise ApiError(error.status, message, param, error.code, error.retry_after_s) from None


def _check_numbers(value: Any, param: str) -> None:
    """Of what is said back as it came. Raises ApiError 400."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ApiError(400, f"{param}: NaN and Infinity are no JSON", param, "invalid_value") from None


def _name_here(param: str, messages_before: int) -> str:
    if found := re.match(r"messages\.(\d+)\.tool_call_id$", param):
        return f"input.{int(found[1]) - messages_before}.call_id"
    for pattern, name in _NAMES:
        if re.match(pattern, param):
            return re.sub(pattern, name, param, count=1)
    return param


def _message(items: Sequence[Item], place: int) -> dict[str, Any]:
    item = items[place]
    match item["type"]:
        case "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            return {"role": "assistant", "tool_calls": [{"id": item["call_id"], "function": function}]}
        case "function_call_output":
            return {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])}
        case "code_interpreter_call" | "web_search_call":
            return {"role": "assistant"}  # said while it was thinking, and left out of what comes later, as that is
        case "compaction":
            return {"role": "user", "content": f"Summary of the conversation before this:\n\n{_summary(item)}"}
        case "reasoning":
            return {"role": "assistant", "reasoning_content": _text(item.get("content", ()))}
        case _:
            said = {"role": item["role"], "content": _text(item["content"])}
            return said | ({"phase": _phase(items, place)} if item["role"] == "assistant" else {})


def _summary(item: Item) -> str:
    try:
        return unpack(item["encrypted_content"])
    except ValueError as error:
        raise ApiError(400, f"input: a compaction item with {error}", "input", "invalid_value") from None


def _phase(items: Sequence[Item], place: int) -> str:
    """Of a message that does not say it: what comes before a call is a preamble, as in chat."""
    unsaid = ("reasoning", "code_interpreter_call", "web_search_call")
    later = next((item for item in items[place + 1 :] if item["type"] not in unsaid), None)
    calls = later is not None and later["type"] == "function_call"
    return items[place].get("phase") or ("commentary" if calls else "final_answer")


def _text(content: str | Sequence[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _tool(tool: FunctionTool | CodeInterpreter | WebSearch) -> dict[str, Any]:
    if not isinstance(tool, FunctionTool):
        return {"type": tool.type}
    about = tool.model_dump(exclude_none=True)
    return {"type": "function", "function": {name: value for name, value in about.items() if name != "type"}}


def _tool_choice(request: ResponsesRequest) -> Any:
    choice = request.tool_choice
    if isinstance(choice, NamedFunction):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _response_format(request: ResponsesRequest) -> Any:
    """Here the fields of a schema stand beside its type, there they are inside of it."""
    form = request.text.format if request.text is not None else None
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}

"""The body of a chat request: which fields there are, of which types, and what is said about the others.

A field that is unknown, or that asks for something not built, is refused by its name. A field at a value that changes
nothing (n=1, logprobs=false) is what we do anyway, and is taken: many clients always send these.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ApiError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


Text = str | list[TextPart]


class SystemMessage(_Strict):
    role: Literal["system", "developer"]
    content: Text


class UserMessage(_Strict):
    role: Literal["user"]
    content: Text


class CalledFunction(_Strict):
    name: str
    arguments: str


class ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # clients that collect streamed calls send it back


class AssistantMessage(_Strict):
    """An answer given earlier. The fields that can only be null are those of the official client's own objects."""

    role: Literal["assistant"]
    content: Text | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same under its other name
    tool_calls: list[ToolCall] | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class ToolMessage(_Strict):
    role: Literal["tool"]
    content: Text
    tool_call_id: str


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(_Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class ChosenFunction(_Strict):
    name: str


class NamedChoice(_Strict):
    type: Literal["function"]
    function: ChosenFunction


class PlainText(_Strict):
    type: Literal["text"]


class JsonObject(_Strict):
    type: Literal["json_object"]


class NamedSchema(_Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchema(_Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    response_format: Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    max_reasoning_tokens: int | None = Field(None, ge=0)  # ours: then the engine closes the analysis
    deadline_s: float | None = Field(None, gt=0, allow_inf_nan=False)  # ours: no longer than this, then "length"
    parallel_tool_calls: bool | None = None  # gpt-oss calls one function a turn, which either value allows
    # Only at the value that changes nothing:
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def parse_chat_request(body: bytes) -> ChatRequest:
    """Raises ApiError 400 that names the first field that is wrong."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as errors:
        raise _explain(errors, body) from None
    if "" in request.stops:
        raise ApiError(400, "stop: a stop string must not be empty", "stop")
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise ApiError(400, "max_tokens: give it or max_completion_tokens, not both", "max_tokens")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only with stream=true", "stream_options")
    return request


def _explain(errors: ValidationError, body: bytes) -> ApiError:
    # A refused name says more than what else is wrong: it may be the cause.
    found = errors.errors(include_url=False, include_input=False)
    # Of the alternatives of a type, the one that got furthest is the one that was meant.
    unknown = [e for e in found if e["type"] == "extra_forbidden"]
    error = unknown[0] if unknown else max(found, key=lambda e: len(e["loc"]))
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body: {error['msg']}", code="invalid_json")
    param = ".".join(_path(error["loc"], json.loads(body), error["type"] == "missing"))
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: unknown or unsupported field", param, "unsupported_field")
    message = f"{param}: {error['msg']}" if param else f"the body: {error['msg']}"
    return ApiError(400, message, param or None, "invalid_value")


def _path(where: tuple[int | str, ...], value: Any, missing: bool) -> list[str]:
    """The steps of pydantic's location that are in the body; the others name alternatives of a type."""
    path = []
    for place, step in enumerate(where):
        inside = isinstance(value, dict) and step in value
        inside = inside or (isinstance(value, list) and isinstance(step, int) and step < len(value))
        if inside:
            value = value[step]  # type: ignore[index]
        if inside or (missing and place == len(where) - 1):
            path.append(str(step))
    return path

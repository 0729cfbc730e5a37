"""The body of a chat request: which fields there are beside those of every generating route, and of which types."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ...parallel.engine.request import MOST_LOGPROBS
from .body import Items, Strict, parse_body
from .errors import ApiError
from .fields import GenerationFields, check_together


class TextPart(Strict):
    type: Literal["text"]
    text: str


Text = str | Items[TextPart]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Text


class UserMessage(Strict):
    role: Literal["user"]
    content: Text


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # clients that collect streamed calls send it back


class AssistantMessage(Strict):
    """An answer given earlier. The fields that can only be null are those of the official client's own objects.

    phase: of its content, as items of the Responses API tell it; None: a preamble if a call follows in this message.
    """

    role: Literal["assistant"]
    content: Text | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same under its other name
    tool_calls: Items[ToolCall] | None = None
    phase: Literal["commentary", "final_answer"] | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Text
    tool_call_id: str


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class BuiltinTool(Strict):
    """Named as in the Responses API, with the tool that gpt-oss knows for it (`BUILTINS`)."""

    type: Literal["code_interpreter", "web_search", "web_search_preview"]


BUILTINS: Mapping[str, str] = {"code_interpreter": "python", "web_search": "browser", "web_search_preview": "browser"}


def kind_of_tool(tool: Any) -> str:
    """For a Discriminator: what is no built-in tool is read as a function, and told what is wrong with it."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    return "builtin" if isinstance(kind, str) and kind in BUILTINS else "function"


AnyTool = Annotated[
    Annotated[Tool, Tag("function")] | Annotated[BuiltinTool, Tag("builtin")], Discriminator(kind_of_tool)
]


class ChosenFunction(Strict):
    name: str


class NamedChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


class PlainText(Strict):
    type: Literal["text"]


class JsonObject(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchema(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class ChatRequest(GenerationFields):
    messages: Items[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)  # the newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    tools: Items[AnyTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    response_format: Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    max_reasoning_tokens: int | None = Field(None, ge=0, lt=2**31)  # ours: then the engine closes the analysis
    max_tool_calls: int | None = Field(None, ge=1, lt=2**31)  # of built-in tools
    parallel_tool_calls: bool | None = None  # gpt-oss calls one function a turn, which either value allows
    # Only at the value that changes nothing:
    modalities: list[Literal["text"]] | None = None
    functions: None = None
    function_call: None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    verbosity: None = None


def parse_chat_request(body: bytes) -> ChatRequest:
    """Raises ApiError 400 that names the first field that is wrong."""
    request = parse_body(ChatRequest, body)
    check_together(request)
    if None not in (request.max_tokens, request.max_completion_tokens):
        raise ApiError(400, "max_tokens: give it or max_completion_tokens, not both", "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs=true", "top_logprobs")
    return request

"""The body of a request for a response: its fields, its items, and what is said about those that are not supported.

Only what differs from chat is described here. The fields that chat has under the same name are passed on to it unread
(`responses_chat`), and are checked there. A field or a type of item that is not supported is refused by its name.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .body import Items, Strict, parse_body
from .errors import ApiError

LOGPROBS = "message.output_text.logprobs"
OUTPUTS = "code_interpreter_call.outputs"
MOST_ID_CHARS = 128

Id = Annotated[str, Field(min_length=1, max_length=MOST_ID_CHARS)]
Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    """Of an answer given earlier. Its logprobs are taken back, and not looked at."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None
    parsed: None = None  # an official client's own addition


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


class _Item(Strict):
    id: Id | None = None
    status: Status | None = None


class InputMessage(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer"]
    content: str | Items[InputText]
    phase: None = None


class OutputMessage(_Item):
    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: str | Items[Annotated[InputText | OutputText, Field(discriminator="type")]]
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(_Item):
    type: Literal["function_call"]
    call_id: Id
    name: str
    arguments: str
    # Those of the official client's objects that can only be null:
    namespace: None = None
    caller: None = None
    async_: None = None
    parsed_arguments: None = None


class FunctionCallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: Id
    output: str | Items[InputText]
    name: None = None
    namespace: None = None
    caller: None = None


class ReasoningItem(_Item):
    """Ours carry their text; there is no summary and nothing is encrypted."""

    type: Literal["reasoning"]
    content: Items[ReasoningText] | None = None
    summary: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)
    encrypted_content: None = None


class CodeInterpreterCall(Strict):
    """A run of python in an answer given earlier, taken back as it was told."""

    type: Literal["code_interpreter_call"]
    id: Id
    status: str
    code: str | None
    container_id: str
    outputs: list[Any] | None = None


class WebSearchCall(Strict):
    type: Literal["web_search_call"]
    id: Id
    status: str
    action: dict[str, Any]


class CompactionItem(_Item):
    """A summary that /v1/responses/compact made. It is looked at where it becomes a message."""

    type: Literal["compaction"]
    encrypted_content: str
    created_by: None = None


class ItemReference(Strict):
    """An item of the output of a kept response."""

    type: Literal["item_reference"]
    id: Id


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message" and item.get("role") == "assistant":
        return "assistant"
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[OutputMessage, Tag("assistant")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CodeInterpreterCall, Tag("code_interpreter_call")]
    | Annotated[WebSearchCall, Tag("web_search_call")]
    | Annotated[CompactionItem, Tag("compaction")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(
        _kind,
        "unsupported_item",
        "type: items are message, function_call, function_call_output, reasoning, code_interpreter_call, "
        "web_search_call, compaction and item_reference",
    ),
]


class FunctionTool(Strict):
    """Its name and parameters are checked where chat's are."""

    type: Literal["function"]
    name: Any = None
    description: Any = None
    parameters: Any = None
    strict: Any = None


class AutoContainer(Strict):
    type: Literal["auto"]


class CodeInterpreter(Strict):
    """gpt-oss's python. Where it runs is the tool server's business."""

    type: Literal["code_interpreter"]
    container: AutoContainer | None = None


class WebSearch(Strict):
    """gpt-oss's browser."""

    type: Literal["web_search", "web_search_preview"]
    search_context_size: Literal["medium"] | None = None


def _kind_of_tool(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return kind if kind in ("code_interpreter", "web_search", "web_search_preview") else "function"


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CodeInterpreter, Tag("code_interpreter")]
    | Annotated[WebSearch, Tag("web_search")]
    | Annotated[WebSearch, Tag("web_search_preview")],
    Discriminator(_kind_of_tool),
]


class ReasoningOptions(Strict):
    effort: Any = None
    summary: None = None  # gpt-oss writes none; the reasoning itself is in the items
    generate_summary: None = None  # its older name


class TextOptions(Strict):
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class NamedFunction(Strict):
    type: Literal["function"]
    name: str


class StreamOptions(Strict):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Strict):
    model: str
    input: str | Annotated[Items[InputItem], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: Id | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    include: list[Literal["message.output_text.logprobs", "code_interpreter_call.outputs"]] | None = None
    top_logprobs: int | None = Field(None, ge=0)
    max_output_tokens: Any = None
    max_tool_calls: int | None = Field(None, ge=1, lt=1 << 31)  # of built-in tools
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    tools: Items[AnyTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedFunction | None = None
    truncation: Literal["disabled", "auto"] | None = None
    # As in chat, and checked there:
    parallel_tool_calls: Any = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    seed: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    max_reasoning_tokens: Any = None
    deadline_s: Any = None
    metadata: Any = None
    user: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    service_tier: Any = None
    # Only where they say nothing:
    conversation: None = None
    prompt: None = None
    moderation: None = None
    context_management: None = None
    prompt_cache_retention: None = None

    @property
    def kept(self) -> bool:
        return self.store is not False

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def shows_outputs(self) -> bool:
        return OUTPUTS in (self.include or ())


class CompactRequest(Strict):
    """Of /v1/responses/compact: what there is to be made short."""

    model: str
    input: str | Annotated[Items[InputItem], Field(min_length=1)] | None = None
    instructions: str | None = None
    previous_response_id: Id | None = None
    prompt_cache_key: Any = None
    service_tier: Any = None
    image: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None


SAME_AS_CHAT = (
    *("model", "parallel_tool_calls", "temperature", "top_p", "top_k", "min_p", "presence_penalty"),
    *("frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids"),
    *("max_reasoning_tokens", "deadline_s", "metadata", "user", "safety_identifier", "prompt_cache_key"),
    "service_tier",
)


def parse_responses_request(body: bytes) -> ResponsesRequest:
    """Raises ApiError 400 that names the first field that is wrong."""
    request = parse_body(ResponsesRequest, body)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only with stream=true", "stream_options")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, f"top_logprobs: only with include=[{LOGPROBS!r}]", "top_logprobs")
    if request.background and not request.kept:
        raise ApiError(400, "background: only with store=true: nobody could fetch the response", "background")
    return request


def input_items(request: ResponsesRequest) -> list[dict[str, Any]]:
    """The input as JSON: plain text as the message that it stands for, references as they are."""
    if isinstance(request.input, str):
        text = {"type": "input_text", "text": request.input}
        return [{"type": "message", "role": "user", "content": [text]}]
    return [_plain(item) for item in request.input]


def _plain(item: Any) -> dict[str, Any]:
    plain = item.model_dump(exclude_none=True)
    if plain["type"] == "message":
        parts = plain["content"]
        texts = [parts] if isinstance(parts, str) else [part["text"] for part in parts]
        about = {"type": "output_text", "annotations": []} if plain["role"] == "assistant" else {"type": "input_text"}
        plain["content"] = [about | {"text": text} for text in texts]
    return plain


def echo(request: ResponsesRequest, model: str) -> dict[str, Any]:
    """The fields of a Response that repeat its request, what was left out at the value that it has then."""
    text = request.text.format if request.text is not None else None
    return {
        "background": bool(request.background),
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": model,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": (request.reasoning and request.reasoning.effort) or "medium", "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.kept,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": text or {"type": "text"}, "verbosity": "medium"},
        "tool_choice": _dumped(request.tool_choice) or "auto",
        "tools": [_echoed(tool) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        "user": request.user,
    }


def _echoed(tool: Any) -> dict[str, Any]:
    container = {"container": {"type": "auto"}} if isinstance(tool, CodeInterpreter) else {}
    return tool.model_dump() | container


def _dumped(choice: str | NamedFunction | None) -> Any:
    return choice.model_dump() if isinstance(choice, NamedFunction) else choice

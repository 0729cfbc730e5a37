"""Messages as OpenAI's API has them -> a harmony Conversation, and what is demanded of the answer.

The one place where the two meet; `serve` and `generate` both use it. Does not know tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

from ..harmony import Conversation, Developer, FunctionTool, Message, ResponseFormat, System
from .constraint import Format, Named, Offered, ToolChoice
from .errors import ApiError
from .schema import (
    BUILTINS,
    AnyTool,
    AssistantMessage,
    BuiltinTool,
    ChatMessage,
    ChatRequest,
    JsonObject,
    JsonSchema,
    NamedChoice,
    SystemMessage,
    Text,
    Tool,
    ToolMessage,
)
from .served import Served

Effort = Literal["low", "medium", "high"]


def conversation(
    messages: Sequence[ChatMessage],
    tools: Sequence[AnyTool] = (),
    effort: Effort | None = None,
    today: date | None = None,
    response_format: ResponseFormat | None = None,
) -> Conversation:
    """System and developer messages that come first are the developer's instructions (harmony guide, "System message":
    the system message proper belongs to the model); a later one stands where it came.

    today: the date that the model is told; None leaves it out. Raises ApiError 400 for a tool message that answers
    no call.
    """
    first = next((i for i, message in enumerate(messages) if not isinstance(message, SystemMessage)), len(messages))
    instructions = "\n\n".join(_text(message.content) for message in messages[:first] if message.content)
    functions = tuple(
        FunctionTool(tool.function.name, tool.function.description or "", tool.function.parameters)
        for tool in tools
        if isinstance(tool, Tool)
    )
    builtins = tuple(BUILTINS[tool.type] for tool in tools if isinstance(tool, BuiltinTool))
    developer = None
    if instructions or functions or response_format:
        developer = Developer(instructions or None, functions, response_format)
    date_told = today.isoformat() if today else None
    system = System(reasoning_effort=effort or "medium", current_date=date_told, builtin_tools=builtins)
    return Conversation(tuple(_messages(messages, first)), system, developer)


def check_builtins(tools: Sequence[AnyTool], served: Served) -> None:
    """Raises ApiError 400 for a built-in tool that nobody runs here."""
    offered = frozenset() if served.tools is None else served.tools.offered
    for place, tool in enumerate(tools):
        if isinstance(tool, BuiltinTool) and BUILTINS[tool.type] not in offered:
            message = f"{tool.type} takes a tool server that offers {BUILTINS[tool.type]} (serve --tool-server URL)"
            raise ApiError(400, f"tools.{place}.type: {message}", f"tools.{place}.type", "unsupported_tool")


@dataclass(frozen=True)
class Demands:
    """Of an answer, for `constraint_for`; shown: the format as the model reads it in the prompt."""

    tools: tuple[Offered, ...]
    builtins: frozenset[str]
    tool_choice: ToolChoice
    response_format: Format | None
    shown: ResponseFormat | None


def demands(chat: ChatRequest) -> Demands:
    tools = tuple(
        Offered(
            one.function.name, one.function.parameters, bool(one.function.strict), f"tools.{place}.function.parameters"
        )
        for place, one in enumerate(chat.tools or ())
        if isinstance(one, Tool)
    )
    offered = () if chat.tool_choice == "none" else chat.tools or ()
    builtins = frozenset(BUILTINS[one.type] for one in offered if isinstance(one, BuiltinTool))
    choice = chat.tool_choice
    named: ToolChoice = Named(choice.function.name) if isinstance(choice, NamedChoice) else choice or "auto"
    form, shown = chat.response_format, None
    wanted = Format(None, True, "response_format") if isinstance(form, JsonObject) else None
    if isinstance(form, JsonSchema):
        asked = form.json_schema
        wanted = Format(asked.schema_, bool(asked.strict), "response_format.json_schema.schema")
        if asked.schema_ is not None:
            shown = ResponseFormat(asked.name, asked.schema_, asked.description or "")
    return Demands(tools, builtins, named, wanted, shown)


def _messages(messages: Sequence[ChatMessage], first: int) -> Iterable[Message]:
    called: dict[str, str] = {}  # tool call id -> function name
    for place, message in enumerate(messages[first:], first):
        if isinstance(message, AssistantMessage):
            called |= {call.id: call.function.name for call in message.tool_calls or ()}
            yield from _assistant(message)
        elif isinstance(message, ToolMessage):
            if message.tool_call_id not in called:
                param = f"messages.{place}.tool_call_id"
                raise ApiError(400, f"{param}: no earlier message calls a tool with id {message.tool_call_id!r}", param)
            name = f"functions.{called[message.tool_call_id]}"
            yield Message("tool", _text(message.content), name, channel="commentary", recipient="assistant")
        elif isinstance(message, SystemMessage):
            yield Message("developer", f"# Instructions\n\n{_text(message.content)}")
        else:
            yield Message("user", _text(message.content))


def _assistant(message: AssistantMessage) -> Iterable[Message]:
    calls = message.tool_calls or ()
    if reasoning := message.reasoning_content or message.reasoning:
        yield Message("assistant", reasoning, channel="analysis")
    if message.content:
        # Said before a call it is a preamble, which harmony puts in the commentary channel.
        phase = message.phase or ("commentary" if calls else "final_answer")
        channel = "commentary" if phase == "commentary" else "final"
        yield Message("assistant", _text(message.content), channel=channel)
    for call in calls:
        yield Message(
            "assistant",
            call.function.arguments,
            channel="commentary",
            recipient=f"functions.{call.function.name}",
            content_type="<|constrain|>json",
        )


def _text(content: Text) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)

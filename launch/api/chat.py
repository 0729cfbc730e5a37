"""Messages as OpenAI's API has them -> a harmony Conversation.

The one place where the two meet; `serve` and `generate` both use it. Does not know tokens.
"""

from collections.abc import Iterable, Sequence
from datetime import date
from typing import Literal

from ..harmony import Conversation, Developer, FunctionTool, Message, System
from .errors import ApiError
from .schema import AssistantMessage, ChatMessage, SystemMessage, Text, Tool, ToolMessage

Effort = Literal["low", "medium", "high"]


def conversation(
    messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), effort: Effort | None = None, today: date | None = None
) -> Conversation:
    """System and developer messages that come first are the developer's instructions (harmony guide, "System message":
    the system message proper belongs to the model); a later one stands where it came.

    today: the date that the model is told; None leaves it out. Raises ApiError 400 for a tool message that answers
    no call.
    """
    first = next((i for i, message in enumerate(messages) if not isinstance(message, SystemMessage)), len(messages))
    instructions = "\n\n".join(_text(message.content) for message in messages[:first] if message.content)
    functions = tuple(
        FunctionTool(tool.function.name, tool.function.description or "", tool.function.parameters) for tool in tools
    )
    developer = Developer(instructions or None, functions) if instructions or functions else None
    system = System(reasoning_effort=effort or "medium", current_date=today.isoformat() if today else None)
    return Conversation(tuple(_messages(messages, first)), system, developer)


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
        yield Message("assistant", _text(message.content), channel="commentary" if calls else "final")
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

"""/tokenize and /detokenize: text or a conversation -> token ids, and back. No engine is asked.

Shaped like vLLM's. `messages` gives exactly the tokens that /v1/chat/completions would send.
"""

from datetime import date
from typing import Any, Literal

from pydantic import Field

from ..harmony import render
from .body import Items, Strict, parse_body
from .chat import check_builtins, conversation
from .errors import ApiError
from .fields import TokenId, check_id
from .schema import AnyTool, ChatMessage
from .served import Served


class TokenizeRequest(Strict):
    """One of prompt and messages; those after messages go with them alone."""

    model: str | None = None
    prompt: str | None = None
    messages: Items[ChatMessage] | None = Field(None, min_length=1)
    tools: Items[AnyTool] | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    add_generation_prompt: bool | None = None  # false: every message as it is, and no header of an answer
    add_special_tokens: bool | None = None  # no token begins every text of gpt-oss: either value changes nothing
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Items[TokenId]


def tokenize(body: bytes, served: Served) -> dict[str, Any]:
    """Raises ApiError."""
    asked = parse_body(TokenizeRequest, body)
    if asked.model is not None:
        served.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "prompt: give it or messages, one of them", "prompt")
    for name in ("tools", "reasoning_effort", "add_generation_prompt"):
        if asked.messages is None and getattr(asked, name) is not None:
            raise ApiError(400, f"{name}: only with messages", name)
    if asked.messages is None:
        ids = served.tokenizer.encode(asked.prompt or "")
    else:
        check_builtins(asked.tools or (), served)
        talk = conversation(asked.messages, asked.tools or (), asked.reasoning_effort, date.today())
        ids = render(talk, served.tokenizer, for_completion=asked.add_generation_prompt is not False)
    strings = [served.tokenizer.decode([id]) for id in ids] if asked.return_token_strs else None
    return {"count": len(ids), "max_model_len": served.context_tokens, "tokens": ids, "token_strs": strings}


def detokenize(body: bytes, served: Served) -> dict[str, Any]:
    """Raises ApiError."""
    asked = parse_body(DetokenizeRequest, body)
    if asked.model is not None:
        served.check_model(asked.model)
    for place, id in enumerate(asked.tokens):
        check_id(id, served.tokenizer.vocab_size, f"tokens.{place}")
    return {"prompt": served.tokenizer.decode(asked.tokens)}

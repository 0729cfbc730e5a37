"""/v1/responses/compact: a conversation made short: what the user said, and a summary of it all by the model.

The summary is an item of its own, `compaction`, which clients send back as they got it. What it carries is called
encrypted by the API; here it is only packed, since it holds nothing but the client's own conversation. Makes the
request that asks the model, and the items; knows neither routes nor engines.
"""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from .body import parse_body
from .errors import ApiError
from .responses_schema import CompactRequest, ReasoningOptions, ResponsesRequest, input_items

PACKED = "gl1."  # in front of what is packed: which way, and that it is ours
ASK = (
    "Summarize the conversation up to here, for somebody who will go on with it and sees nothing of it but my own "
    "messages: what I want, what was found out, decided and done, with names and numbers, and what is still open. "
    "Answer with the summary alone."
)


def read_compact_request(body: bytes) -> tuple[ResponsesRequest, list[dict[str, Any]]]:
    """The request for the summary, and the items of the input, without references. Raises ApiError 400."""
    given = parse_body(CompactRequest, body)
    if given.input is None and given.previous_response_id is None:
        raise ApiError(400, "input: there is nothing to compact", "input", "invalid_value")
    request = ResponsesRequest.model_construct(
        **{name: getattr(given, name) for name in CompactRequest.model_fields},
        reasoning=ReasoningOptions(effort="low"),
        store=False,
        truncation="auto",  # one that fills the context has no room for the question
    )
    return request, input_items(request) if given.input is not None else []


def question() -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": ASK}]}


def compacted(items: Sequence[dict[str, Any]], output: Sequence[dict[str, Any]], id: str) -> list[dict[str, Any]]:
    """What goes on in place of `items`, which have ids. output: of the response that answers `question`. Raises
    ApiError 503 where there is no summary in it."""
    texts = [part["text"] for item in output if item["type"] == "message" for part in item["content"]]
    summary = "".join(texts).strip()
    if not summary:
        message = "the model gave no summary: the context is too full, or it thought for too long"
        raise ApiError(503, message, code="no_summary")
    asked = [item for item in items if item["type"] == "message" and item["role"] == "user"]
    return [*asked, {"id": f"cmp_{id}", "type": "compaction", "encrypted_content": pack(summary)}]


def pack(summary: str) -> str:
    return PACKED + base64.urlsafe_b64encode(summary.encode()).decode()


def unpack(content: str) -> str:
    """Raises ValueError for what `pack` did not make."""
    packed = content.removeprefix(PACKED)
    if packed == content:
        raise ValueError("no summary of this server")
    try:
        return base64.b64decode(packed, altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise ValueError("no summary of this server") from None

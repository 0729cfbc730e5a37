"""What stands behind the question mark of /v1/responses/...: read strictly, like bodies. And pages of items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ApiError

MOST_ITEMS = 100  # of a page


@dataclass(frozen=True)
class Page:
    """after: the id of the item before the first one."""

    after: str | None
    limit: int
    newest_first: bool


def read_retrieval(query: Mapping[str, str]) -> int | None:
    """Of a stream: the sequence number after which it begins; None if none is wanted. Raises ApiError 400."""
    _refuse_others(query, ("stream", "starting_after", "include_obfuscation"))
    stream = _boolean(query, "stream")
    if _boolean(query, "include_obfuscation"):
        raise ApiError(400, "include_obfuscation: not supported", "include_obfuscation", "unsupported_field")
    if "starting_after" in query and not stream:
        raise ApiError(400, "starting_after: only with stream=true", "starting_after")
    after = _number(query, "starting_after", -1, 0, 10**9)
    return after if stream else None


def read_page(query: Mapping[str, str]) -> Page:
    """Raises ApiError 400."""
    _refuse_others(query, ("after", "limit", "order"))
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise ApiError(400, f"order: {order[:100]!r} is neither asc nor desc", "order")
    return Page(query.get("after"), _number(query, "limit", 20, 1, MOST_ITEMS), order == "desc")


def page_of(items: Sequence[dict[str, Any]], page: Page) -> dict[str, Any]:
    """items: the oldest first. Raises ApiError 400 if there is no item that the page comes after."""
    listed = list(reversed(items)) if page.newest_first else list(items)
    if page.after is not None:
        place = next((place for place, item in enumerate(listed) if item["id"] == page.after), None)
        if place is None:
            raise ApiError(400, f"after: there is no item {page.after[:100]!r}", "after")
        listed = listed[place + 1 :]
    shown = listed[: page.limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(listed) > len(shown),
    }


def _refuse_others(query: Mapping[str, str], known: Sequence[str]) -> None:
    for name in query:
        if name not in known:
            name = name[:100]
            raise ApiError(400, f"{name}: unknown or unsupported parameter", name, "unsupported_field")


def _boolean(query: Mapping[str, str], name: str) -> bool:
    word = query.get(name, "false")
    if word not in ("true", "false"):
        raise ApiError(400, f"{name}: {word[:100]!r} is neither true nor false", name)
    return word == "true"


def _number(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else None
    if number is None or not least <= number <= most:
        raise ApiError(400, f"{name}: {text[:100]!r} is no number from {least} to {most}", name)
    return number

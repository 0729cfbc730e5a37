"""Runs of built-in tools as items of a response: code_interpreter_call for python, web_search_call for browser.

The fields are those of the official client. Does not know who runs a tool, nor events.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

RunKind = Literal["code_interpreter_call", "web_search_call"]
RUN_KINDS: Mapping[str, RunKind] = {"python": "code_interpreter_call", "browser": "web_search_call"}


def run_kind(name: str) -> RunKind:
    """name: of `answer.Run`."""
    return RUN_KINDS[name.partition(".")[0]]


def run_fields(name: str, given: str, output: str | None, container: str) -> dict[str, Any]:
    """What such an item has beside id, type and status. given: so far. output: None where it is not shown."""
    if run_kind(name) == "web_search_call":
        return {"action": _action(name.partition(".")[2], given)}
    logs = None if output is None else [{"type": "logs", "logs": output}]
    return {"code": given, "container_id": container, "outputs": logs}


def _action(function: str, given: str) -> dict[str, Any]:
    """What the model asked the browser for; a link of the page before it has a number and no address."""
    try:
        arguments = json.loads(given)
    except ValueError:
        arguments = {}
    given_all = arguments.items() if isinstance(arguments, dict) else ()
    said = {name: value for name, value in given_all if isinstance(value, str)}
    if function == "open":
        return {"type": "open_page", "url": said.get("id")}
    if function == "find":
        return {"type": "find_in_page", "pattern": said.get("pattern", ""), "url": said.get("url", "")}
    query = said.get("query", "")
    return {"type": "search", "query": query, "queries": [query] if query else []}

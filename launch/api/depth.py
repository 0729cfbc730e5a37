"""How deep a JSON text is nested, found without parsing it: a parser that recurses must not meet it first.

Knows nothing of HTTP.
"""

import re

from .errors import ApiError

MOST_DEEP = 100  # a JSON schema takes two levels for each of its own, and OpenAI's may have ten of those
# Possessive, and a string that never ends is one too: no text takes longer than its length.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_PAIRS = re.compile(rb"\[\]|\{\}")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def check_depth(body: bytes, most: int = MOST_DEEP) -> None:
    """Raises ApiError 400 for more than `most` brackets inside each other. What is no JSON may pass."""
    if body.count(b"[") + body.count(b"{") <= most:
        return
    brackets = _STRINGS.sub(b"", body).translate(None, _NOT_BRACKETS)
    for _ in range(most):  # each round takes the innermost pairs off
        fewer = _PAIRS.sub(b"", brackets)
        if len(fewer) == len(brackets):  # none left, or they do not match, which the parser will say
            deep = len(fewer) > most
            break
        brackets = fewer
    else:
        deep = len(brackets) > 0
    if deep:
        raise ApiError(400, f"the body: nested more than {most} deep", code="body_too_deep")

"""Tokens of content -> log probabilities as OpenAI's APIs write them: one shape for chat, an older one for text."""

from collections.abc import Sequence
from typing import Any

from ..tokenizer import Tokenizer
from .content_tokens import ContentToken

LEAST = -9999.0  # what OpenAI says of a token that cannot come; JSON knows no infinity


def chat_logprobs(tokens: Sequence[ContentToken], tokenizer: Tokenizer, most: int) -> list[dict[str, Any]]:
    """One entry a token, with its `most` most likely alternatives."""
    return [
        _entry(token.id, token.logprob, tokenizer)
        | {"top_logprobs": [_entry(id, logprob, tokenizer) for id, logprob in token.top[:most]]}
        for token in tokens
    ]


def text_logprobs(tokens: Sequence[ContentToken], tokenizer: Tokenizer, most: int, offset: int) -> dict[str, Any]:
    """Lists with one entry a token. Its alternatives hold the token itself, too, so that there may be `most` + 1.

    offset: in the text, of where the content begins.
    """
    tops = [dict(token.top[:most]) | {token.id: token.logprob} for token in tokens]
    return {
        "tokens": [spelled(token.id, tokenizer) for token in tokens],
        "token_logprobs": [max(token.logprob, LEAST) for token in tokens],
        "top_logprobs": [{spelled(id, tokenizer): max(p, LEAST) for id, p in top.items()} for top in tops]
        if most
        else None,
        "text_offset": [offset + token.offset for token in tokens],
    }


def spelled(token_id: int, tokenizer: Tokenizer) -> str:
    """A token as text; one that holds no whole characters as `bytes:\\xe2\\x82`, so that no two are alike."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": spelled(token_id, tokenizer), "logprob": max(logprob, LEAST), "bytes": list(data)}

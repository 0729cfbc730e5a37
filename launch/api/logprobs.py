"""Tokens of content -> log probabilities as OpenAI's APIs write them: one shape for chat, an older one for text."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Prompt:
    """A prompt whose tokens are told. Nothing comes before its first one, so only the rest has log probabilities."""

    first: int
    rest: Sequence[ContentToken]


def text_logprobs(
    prompt: Prompt | None, tokens: Sequence[ContentToken], tokenizer: Tokenizer, most: int, offset: int
) -> dict[str, Any]:
    """Lists with one entry a token, first those of the prompt. A token's alternatives hold the token itself, too, so
    that there may be `most` + 1.

    offset: in the text, of where the content begins.
    """
    before = [] if prompt is None else [prompt.first]
    known = [*(() if prompt is None else prompt.rest), *tokens]
    echoed = [] if prompt is None else _offsets([prompt.first, *(token.id for token in prompt.rest)], tokenizer)
    tops = [dict(token.top[:most]) | {token.id: token.logprob} for token in known]
    alternatives = [{spelled(id, tokenizer): max(p, LEAST) for id, p in top.items()} for top in tops]
    return {
        "tokens": [spelled(id, tokenizer) for id in (*before, *(token.id for token in known))],
        "token_logprobs": [*(None for _ in before), *(max(token.logprob, LEAST) for token in known)],
        "top_logprobs": [*(None for _ in before), *alternatives] if most else None,
        "text_offset": [*echoed, *(offset + token.offset for token in tokens)],
    }


def spelled(token_id: int, tokenizer: Tokenizer) -> str:
    """A token as text; one that holds no whole characters as `bytes:\\xe2\\x82`, so that no two are alike."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _offsets(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Where each token begins in their text, in characters."""
    utf8, chars, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
    for id in ids:
        offsets.append(chars)
        chars += len(utf8.decode(tokenizer.token_bytes(id)))
    return offsets


def _entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": spelled(token_id, tokenizer), "logprob": max(logprob, LEAST), "bytes": list(data)}

"""/v1/completions: text or token ids go on as they are, with no conversation made of them.

A text is never markup: a harmony prompt is sent as token ids (/tokenize makes some of messages). What comes back is the
model's text as it is, special tokens by their spelling; the tokens that end an answer are no part of it.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from ...parallel.engine.request import MOST_LOGPROBS
from ..plain_text import PlainText
from ..tokenizer import Tokenizer
from .answer import Content, End
from .body import Items, parse_body
from .content_tokens import ContentToken
from .errors import ApiError
from .fields import MOST_CHOICES, GenerationFields, TokenId, check_id, check_together
from .generation import Head, Job, Pieces, make_choices, new_head
from .logprobs import text_logprobs
from .reading import Reading
from .respond import event
from .served import Served

MAX_TOKENS = 16  # where none is given, as OpenAI has it

Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[Items[TokenId], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """prompt: a text, token ids, or several of either."""

    prompt: (
        Text
        | Ids
        | Annotated[Items[Text], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[Items[Ids], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    # Only at the value that changes nothing:
    best_of: int | None = Field(None, ge=1, le=1)
    suffix: None = None


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Raises ApiError 400 that names the first field that is wrong."""
    request = parse_body(CompletionRequest, body)
    check_together(request)
    if request.echo and request.logprobs is not None:
        raise ApiError(400, "echo: not with logprobs, which tokens of the prompt have none of", "echo")
    if request.best_of is not None and request.choices > 1:
        raise ApiError(400, f"best_of: {request.best_of} is less than n={request.choices}", "best_of")
    return request


def completion_job(asked: CompletionRequest, served: Served) -> Job:
    """Raises ApiError 400."""
    tokenizer = served.tokenizer
    prompts = _prompts(asked, tokenizer)
    if len(prompts) * asked.choices > MOST_CHOICES:
        numbers = f"{len(prompts)} prompts of {asked.choices} answers each, and {MOST_CHOICES} are the most"
        raise ApiError(400, f"prompt: {numbers}", "prompt")
    choices = make_choices(
        asked,
        prompts,
        served,
        prompt_param="prompt",
        max_tokens=asked.max_tokens or MAX_TOKENS,
        logprobs=asked.logprobs,
    )
    reading = Reading(
        parser=lambda repaired: PlainText(tokenizer),
        stops=asked.stops,
        functions=(),
        unseen=choices[0].request.stop_tokens,
        keep_tokens=asked.logprobs is not None,
    )
    echoed = tuple(tokenizer.decode(choice.request.prompt_tokens) if asked.echo else "" for choice in choices)
    head = new_head("cmpl", served, choices, sum(map(len, prompts)))
    return Job(choices, reading, TextShape(head, echoed, tokenizer, asked.logprobs))


def _prompts(asked: CompletionRequest, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    one = isinstance(asked.prompt, str) or isinstance(asked.prompt[0], int)
    prompts = []
    for place, prompt in enumerate([asked.prompt] if one else asked.prompt):
        if isinstance(prompt, str):
            prompts.append(tuple(tokenizer.encode(prompt)))
            continue
        ids: tuple[int, ...] = tuple(prompt)  # type: ignore[arg-type]
        for at, id in enumerate(ids):
            check_id(id, tokenizer.vocab_size, f"prompt.{at}" if one else f"prompt.{place}.{at}")
        prompts.append(ids)
    return prompts


@dataclass(frozen=True)
class TextShape:
    """echoed: what the text of each choice begins with. logprobs: how many alternatives each token is given; None:
    none of it."""

    head: Head
    echoed: tuple[str, ...]
    tokenizer: Tokenizer
    logprobs: int | None

    async def whole(self, pieces: Pieces) -> dict[str, Any]:
        texts = list(self.echoed)
        tokens: list[list[ContentToken]] = [[] for _ in texts]
        ends: dict[int, End] = {}
        async with aclosing(pieces):
            async for index, piece in pieces:
                if isinstance(piece, Content):
                    texts[index] += piece.text
                    tokens[index] += piece.tokens
                elif isinstance(piece, End):
                    ends[index] = piece
        choices = [
            self._choice(index, text, tokens[index], ends[index].finish_reason) for index, text in enumerate(texts)
        ]
        return self.head.of("text_completion") | {"choices": choices, "usage": self.head.usage([*ends.values()])}

    async def chunks(self, pieces: Pieces, include_usage: bool) -> AsyncGenerator[bytes]:
        def chunk(choice: dict[str, Any]) -> bytes:
            body = self.head.of("text_completion") | {"choices": [choice]}
            return event(body | ({"usage": None} if include_usage else {}))

        ends = []
        async with aclosing(pieces):
            for index, text in enumerate(self.echoed):
                if text:
                    yield chunk(self._choice(index, text, (), None))
            async for index, piece in pieces:
                if isinstance(piece, Content):
                    yield chunk(self._choice(index, piece.text, piece.tokens, None))
                elif isinstance(piece, End):
                    ends.append(piece)
                    yield chunk(self._choice(index, "", (), piece.finish_reason))
            if include_usage:
                yield event(self.head.of("text_completion") | {"choices": [], "usage": self.head.usage(ends)})

    def _choice(
        self, index: int, text: str, tokens: "list[ContentToken] | tuple[ContentToken, ...]", finish_reason: str | None
    ) -> dict[str, Any]:
        told = None
        if self.logprobs is not None:
            told = text_logprobs(tokens, self.tokenizer, self.logprobs, len(self.echoed[index]))
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish_reason}

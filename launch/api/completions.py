"""/v1/completions: text or token ids go on as they are, with no conversation made of them.

A text is never markup: a harmony prompt is sent as token ids (/tokenize makes some of messages). What comes back is the
model's text as it is, special tokens by their spelling; the tokens that end an answer are no part of it.
"""

import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from ...parallel.engine.constraint import Constraint, Section
from ...parallel.engine.request import MOST_LOGPROBS, Request
from ..dispatch import prompt_blocks
from ..harmony import Delta, stop_tokens
from ..plain_text import PlainText
from ..tokenizer import Tokenizer
from .answer import Content, End, Piece
from .body import Items, parse_body
from .content_tokens import ContentToken
from .errors import ApiError
from .fields import MOST_CHOICES, GenerationFields, TokenId, check_id, check_together
from .generation import Choice, Head, Job, Pieces, make_choices, new_head
from .logprobs import Prompt, text_logprobs
from .reading import Reading
from .respond import event
from .served import Served

MAX_TOKENS = 16  # where none is given, as OpenAI has it

Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[Items[TokenId], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """prompt: a text, token ids, or several of either. ignore_eos: on past the model's own end, to max_tokens; vLLM's
    name for what benchmarks ask for."""

    prompt: (
        Text
        | Ids
        | Annotated[Items[Text], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[Items[Ids], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    echo: bool | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    # Only at the value that changes nothing:
    best_of: int | None = Field(None, ge=1, le=1)
    suffix: None = None


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Raises ApiError 400 that names the first field that is wrong."""
    request = parse_body(CompletionRequest, body)
    check_together(request)
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
    reading = Reading(
        parser=lambda repaired: PlainText(tokenizer),
        stops=asked.stops,
        functions=(),
        unseen={*stop_tokens(tokenizer), *(asked.stop_token_ids or ())},
        keep_tokens=asked.logprobs is not None,
    )
    choices = make_choices(
        asked,
        prompts,
        served,
        reading,
        prompt_param="prompt",
        max_tokens=asked.max_tokens or MAX_TOKENS,
        logprobs=asked.logprobs,
        model_ends=not asked.ignore_eos,
    )
    echoed = tuple(tokenizer.decode(choice.request.prompt_tokens) if asked.echo else "" for choice in choices)
    scored = prompts if asked.echo and asked.logprobs is not None else []
    told = [scoring(prompt, asked, tokenizer) for prompt in scored if len(prompt) > 1]
    head = new_head("cmpl", served, choices, sum(map(len, prompts)))
    shape = TextShape(head, echoed, tokenizer, asked.logprobs, tuple(scored), asked.choices)
    return Job((*choices, *told), shape)


def scoring(prompt: tuple[int, ...], asked: CompletionRequest, tokenizer: Tokenizer) -> Choice:
    """A request that says the prompt after its first token, whatever the model would say: so it tells how likely the
    model finds it. It takes a step a token."""
    first, rest = prompt[:1], prompt[1:]
    said = set(rest)
    unsaid = next((id for id in range(tokenizer.vocab_size) if id not in said), None)  # would end it, had it more room
    if unsaid is None:
        message = f"echo: not with logprobs of a prompt that holds all {tokenizer.vocab_size} tokens there are"
        raise ApiError(400, message, "echo")
    forced = Constraint((Section((rest,), (unsaid,)),), opening=first)
    request = Request(
        secrets.token_hex(12),
        first,
        len(rest),
        stop_tokens=(unsaid,),
        logprobs=asked.logprobs,
        deadline_s=asked.deadline_s,
        constraint=forced,
    )
    reading = Reading(lambda repaired: _Places(), stops=(), functions=(), unseen=(), keep_tokens=True)
    return Choice(request, prompt_blocks(first), reading)


class _Places:
    """A Parser to which every token is a letter: of a prompt only its tokens are of interest, each by itself."""

    opening = b"."

    def __init__(self) -> None:
        self._begun = False

    def text_bytes(self, token_id: int) -> bytes:
        return b"."

    def feed(self, token_id: int) -> list[Delta]:
        start = [] if self._begun else [Delta("start", "final", None, None)]
        self._begun = True
        return [*start, Delta("text", "final", None, None, ".")]

    def finish(self) -> list[Delta]:
        return []

    def repair(self, kind: str) -> None:
        """Nothing is guessed here."""


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
    none of it. scored: the prompts whose tokens are told, too; those of more than one token are, in order, the pieces
    that follow those of the choices. choices: of each prompt."""

    head: Head
    echoed: tuple[str, ...]
    tokenizer: Tokenizer
    logprobs: int | None
    scored: tuple[tuple[int, ...], ...]
    choices: int

    async def whole(self, pieces: Pieces) -> dict[str, Any]:
        count = len(self.echoed)
        texts = list(self.echoed)
        tokens: list[list[ContentToken]] = [[] for _ in texts]
        ends: dict[int, End] = {}
        prompts = _Prompts(self.scored, self.choices, count)
        async with aclosing(pieces):
            async for index, piece in pieces:
                if index >= count:
                    prompts.take(index, piece)
                elif isinstance(piece, Content):
                    texts[index] += piece.text
                    tokens[index] += piece.tokens
                elif isinstance(piece, End):
                    ends[index] = piece
        choices = [
            self._choice(index, text, tokens[index], ends[index].finish_reason, prompts.told(index))
            for index, text in enumerate(texts)
        ]
        return self.head.of("text_completion") | {"choices": choices, "usage": self.head.usage([*ends.values()])}

    async def chunks(self, pieces: Pieces, include_usage: bool) -> AsyncGenerator[bytes]:
        def chunk(choice: dict[str, Any]) -> bytes:
            body = self.head.of("text_completion") | {"choices": [choice]}
            return event(body | ({"usage": None} if include_usage else {}))

        def piece_of(index: int, piece: Piece) -> Iterator[bytes]:
            if isinstance(piece, Content):
                yield chunk(self._choice(index, piece.text, piece.tokens, None))
            elif isinstance(piece, End):
                ends.append(piece)
                yield chunk(self._choice(index, "", (), piece.finish_reason))

        def begin(index: int) -> Iterator[bytes]:
            """What is echoed, and what has waited for it."""
            if self.echoed[index]:
                yield chunk(self._choice(index, self.echoed[index], (), None, prompts.told(index)))
            for piece in waiting.pop(index):
                yield from piece_of(index, piece)

        ends: list[End] = []
        prompts = _Prompts(self.scored, self.choices, len(self.echoed))
        waiting: dict[int, list[Piece]] = {index: [] for index in range(len(self.echoed))}
        async with aclosing(pieces):
            for index in range(len(self.echoed)):
                if prompts.known(index):
                    for made in begin(index):
                        yield made
            async for index, piece in pieces:
                if index >= len(self.echoed):
                    for ready in prompts.take(index, piece):
                        for made in begin(ready):
                            yield made
                elif index in waiting:
                    waiting[index].append(piece)
                else:
                    for made in piece_of(index, piece):
                        yield made
            if include_usage:
                yield event(self.head.of("text_completion") | {"choices": [], "usage": self.head.usage(ends)})

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[ContentToken],
        finish_reason: str | None,
        prompt: Prompt | None = None,
    ) -> dict[str, Any]:
        """prompt: if its tokens are told here."""
        told = None
        if self.logprobs is not None:
            told = text_logprobs(prompt, tokens, self.tokenizer, self.logprobs, len(self.echoed[index]))
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish_reason}


class _Prompts:
    """The tokens of prompts, as they come to be known. prompts: those that are told, in order; choices: of each one;
    first: the index of the pieces of the first one of more than one token."""

    def __init__(self, prompts: Sequence[tuple[int, ...]], choices: int, first: int) -> None:
        self._choices = choices
        self._first = first
        self._prompts = prompts
        self._told: list[list[ContentToken]] = [[] for _ in prompts]
        self._long = [place for place, prompt in enumerate(prompts) if len(prompt) > 1]
        self._known = [len(prompt) == 1 for prompt in prompts]

    def take(self, index: int, piece: Piece) -> range:
        """The choices whose prompt is known by it, and was not before."""
        place = self._long[index - self._first]
        if isinstance(piece, Content):
            self._told[place] += piece.tokens
        if not isinstance(piece, End):
            return range(0)
        self._known[place] = True
        return range(place * self._choices, (place + 1) * self._choices)

    def known(self, choice: int) -> bool:
        return not self._known or self._known[choice // self._choices]

    def told(self, choice: int) -> Prompt | None:
        place = choice // self._choices
        return Prompt(self._prompts[place][0], self._told[place]) if self._prompts else None

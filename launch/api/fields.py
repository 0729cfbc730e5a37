"""The fields that every generating route takes, and what they ask of the engine.

A field at a value that changes nothing is what we do anyway, and is taken: many clients always send these. Those that
only label a request (user, metadata, ...) are read by nobody here. Everything else is refused by its name.

    seed                  choice i of equal requests is drawn alike, and unlike the other choices
    temperature           below LEAST_TEMPERATURE is 0, the most likely token
    top_k                 0 and -1: all tokens
    stop, stop_token_ids  end an answer and are no part of it
    deadline_s            ours: no longer than this, then finish reason "length"
"""

import secrets
from hashlib import blake2b
from typing import Annotated, Literal

from pydantic import Field

from ...parallel.engine.request import MOST_BIASES, MOST_TOP_K, Sampling
from .body import Items, Strict
from .errors import ApiError

MOST_CHOICES = 128  # of one HTTP request
MOST_STOPS, MOST_STOP_CHARS = 16, 1000  # strings; ids: MOST_STOP_IDS
MOST_STOP_IDS = 64
LEAST_TEMPERATURE = 1e-5  # logits over less leave fp32
SEEDS = 1 << 63

Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
StopString = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
IdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Label = Annotated[str, Field(max_length=512)]


class StreamOptions(Strict):
    include_usage: bool = False


class GenerationFields(Strict):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    stop: StopString | Annotated[Items[StopString], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[Items[TokenId], Field(max_length=MOST_STOP_IDS)] | None = None
    seed: int | None = Field(None, ge=-SEEDS, lt=SEEDS)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=MOST_TOP_K)
    min_p: Unit | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10, allow_inf_nan=False)] | None = None  # 1 changes nothing
    logit_bias: (
        Annotated[
            dict[IdText, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]], Field(max_length=MOST_BIASES)
        ]
        | None
    ) = None
    deadline_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    # Labels:
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None  # equal beginnings are found without it
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)] | None = None
    # Only at the value that changes nothing:
    store: bool | None = None  # nothing is stored
    service_tier: Literal["auto", "default"] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def check_together(fields: GenerationFields) -> None:
    """What no field tells alone. Raises ApiError 400."""
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "stream_options: only with stream=true", "stream_options")
    if fields.store:
        raise ApiError(400, "store: true is not supported, as nothing is stored", "store", "unsupported_field")


def check_ids(fields: GenerationFields, vocab: int) -> None:
    """Token ids that are in no vocabulary. Raises ApiError 400."""
    for place, id in enumerate(fields.stop_token_ids or ()):
        check_id(id, vocab, f"stop_token_ids.{place}")
    for id in fields.logit_bias or ():
        check_id(int(id), vocab, f"logit_bias.{id}")


def check_id(id: int, vocab: int, param: str) -> None:
    if not 0 <= id < vocab:
        raise ApiError(400, f"{param}: {id} is no token of the vocabulary of {vocab}", param, "invalid_value")


def samplings(fields: GenerationFields) -> tuple[Sampling, ...]:
    """One for each choice. Without a seed all are drawn afresh."""
    seed = secrets.randbits(63) if fields.seed is None else fields.seed % SEEDS
    return tuple(_sampling(fields, _choice_seed(seed, index)) for index in range(fields.choices))


def _sampling(fields: GenerationFields, seed: int) -> Sampling:
    temperature = 1.0 if fields.temperature is None else fields.temperature
    return Sampling(
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        top_k=max(fields.top_k or 0, 0),
        min_p=fields.min_p or 0.0,
        presence=fields.presence_penalty or 0.0,
        frequency=fields.frequency_penalty or 0.0,
        repetition=1.0 if fields.repetition_penalty is None else fields.repetition_penalty,
        logit_bias=tuple((int(id), bias) for id, bias in (fields.logit_bias or {}).items()),
        seed=seed,
    )


def _choice_seed(seed: int, index: int) -> int:
    """The first choice has the seed itself: it is the answer to the request for one."""
    if not index:
        return seed
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()) % SEEDS

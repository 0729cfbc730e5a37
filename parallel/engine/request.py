"""What goes into the engine and what comes out: a Request, and a stream of Token.

Token ids only. Text, channels, tools and stop strings are the front end's business.
"""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The draw depends on (seed, position) alone, never on what else is in the batch.

    temperature 0 takes the most likely token. top_p keeps the smallest set of tokens whose probability reaches it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0  # 0 <= seed < 2**63


@dataclass(frozen=True)
class Request:
    """One generation. max_tokens counts answer tokens; prompt and answer together stay within the plan's context."""

    id: str
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop_tokens: tuple[int, ...] = ()  # generation ends with any of these; it is delivered as the last Token


@dataclass(frozen=True)
class Token:
    """One generated token; the last of a request carries why it ended."""

    request_id: str
    id: int
    finish_reason: FinishReason | None = None

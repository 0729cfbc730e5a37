"""What goes into the engine and what comes out: a Request, and a stream of Token.

Token ids only. Text, channels, tools and stop strings are the front end's business.
"""

from dataclasses import dataclass
from typing import Literal

from .constraint import Constraint

FinishReason = Literal["stop", "length", "deadline"]

MOST_TOP_K = 1024  # of a request; 0 asks for all tokens
MOST_LOGPROBS = 20  # most likely tokens that a request may ask for beside each drawn one
MOST_BIASES = 300  # tokens that a request may bias, as OpenAI's API has it


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The draw depends on (seed, position) alone, never on what else is in the batch.

    In this order: logit_bias is added to the logits; repetition divides those above 0, and multiplies those below, of
    tokens of the prompt and of the answer so far; presence (once) and frequency (a time each) are subtracted for the
    tokens of the answer so far; temperature divides, and 0 takes the most likely token; top_k keeps so many of
    the most likely tokens (0: all); top_p keeps the smallest set of tokens whose probability reaches it; min_p keeps
    tokens at least so likely, as a share of the most likely one. top_p and min_p see the probabilities before top_k.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence: float = 0.0
    frequency: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # 0 <= seed < 2**63
    repetition: float = 1.0


@dataclass(frozen=True)
class Request:
    """One generation. max_tokens counts answer tokens; prompt and answer together stay within the plan's context.

    logprobs: how many of the most likely tokens each Token carries besides its own probability; None: neither.
    deadline_s: the request ends so long after it came in, wherever it is then. constraint: what the answer must look
    like; None: anything goes.
    """

    id: str
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop_tokens: tuple[int, ...] = ()  # generation ends with any of these; it is delivered as the last Token
    logprobs: int | None = None
    deadline_s: float | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Token:
    """One generated token; the last of a request carries why it ended.

    id: -1 for an end that no token came with (a deadline). logprob: of this token under the model's own distribution,
    before any of Sampling and before the request's constraint; top: (token id, logprob) of the most likely ones, most
    likely first, which a constraint may have ruled out.
    """

    request_id: str
    id: int
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()

"""The leader's word to the other ranks of its replica: what all of them do next.

Every rank runs the same generator on the same request and draws the same tokens, so a word is enough: start this
request, go on, or end it. Travels over the process group on the host. Knows nothing of models or front ends.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist

from .request import Request
from .wire import Decoder, Generate, encode

Word = Literal["start", "go_on", "end", "idle"]
_WORDS: tuple[Word, ...] = ("start", "go_on", "end", "idle")
IDLE_EVERY_S = 5.0  # the leader says "idle" so often, so that nobody waits longer than a collective may take


class Lockstep(Protocol):
    """`tell` is called by rank 0 and `hear` by all others, in the same order."""

    def tell(self, word: Word, request: Request | None = None) -> None: ...


@dataclass(frozen=True)
class NoFollowers(Lockstep):
    def tell(self, word: Word, request: Request | None = None) -> None:
        pass


@dataclass(frozen=True)
class Broadcast(Lockstep):
    """Over the default process group, which must take host tensors (gloo)."""

    def tell(self, word: Word, request: Request | None = None) -> None:
        body = encode(Generate(request)) if request is not None else b""
        dist.broadcast(torch.tensor([_WORDS.index(word), len(body)]), src=0)
        if body:
            dist.broadcast(torch.frombuffer(bytearray(body), dtype=torch.uint8), src=0)

    def hear(self) -> tuple[Word, Request | None]:
        head = torch.zeros(2, dtype=torch.int64)
        dist.broadcast(head, src=0)
        word, length = head.tolist()
        if not length:
            return _WORDS[word], None
        body = torch.zeros(length, dtype=torch.uint8)
        dist.broadcast(body, src=0)
        message = next(Decoder().feed(body.numpy().tobytes()))
        assert isinstance(message, Generate)
        return _WORDS[word], message.request

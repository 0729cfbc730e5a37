"""Which replica a request goes to: the one that was sent most of its prompt before, unless it is too busy.

A replica keeps the KV cache of prompts that it has seen, so a prompt that begins like an earlier one is cheapest where
that one went. What each replica holds is not asked but remembered: the blocks of the prompts sent there. A guess, then:
the replica may have dropped them. Knows neither sockets nor clocks.

Memory: at most REMEMBERED_BLOCKS hashes a replica, the least recently used forgotten first; they stand for 4 million
tokens and take about 10 MB.
"""

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

BLOCK_TOKENS = 64
REMEMBERED_BLOCKS = 1 << 16  # of one replica
# The replica that was sent most of a prompt gets it if that saves at least WORTH_BLOCKS against the least loaded one
# and if it runs at most BUSIER x as many requests as that one and SPARE more. A prefill that is saved must not cost
# more in a queue, and the preamble that all prompts share is no reason.
WORTH_BLOCKS, BUSIER, SPARE = 4, 1.5, 4


def prompt_blocks(prompt_tokens: Sequence[int]) -> tuple[int, ...]:
    """A 64-bit hash for each whole block of the prompt, chained: it stands for all tokens up to the block's end."""
    hashes = []
    before = b""
    for start in range(0, len(prompt_tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        tokens = array("q", prompt_tokens[start : start + BLOCK_TOKENS]).tobytes()
        before = blake2b(before + tokens, digest_size=8).digest()
        hashes.append(int.from_bytes(before))
    return tuple(hashes)


class Dispatch:
    """What was sent where. Replicas are numbers from 0."""

    def __init__(self, replicas: int, remembered_blocks: int = REMEMBERED_BLOCKS) -> None:
        self._limit = remembered_blocks
        self._sent: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(replicas)]

    def choose(self, blocks: Sequence[int], running: Mapping[int, int]) -> int:
        """One of the replicas in `running` (replica -> its requests, waiting ones included; not empty)."""
        held = {replica: self.held(replica, blocks) for replica in running}
        holder = min(running, key=lambda replica: (-held[replica], running[replica]))
        idlest = min(running, key=lambda replica: (running[replica], -held[replica]))
        worth = held[holder] - held[idlest] >= WORTH_BLOCKS
        return holder if worth and running[holder] <= BUSIER * running[idlest] + SPARE else idlest

    def held(self, replica: int, blocks: Sequence[int]) -> int:
        """How many blocks from the start were sent there."""
        sent = self._sent[replica]
        return next((place for place, block in enumerate(blocks) if block not in sent), len(blocks))

    def remember(self, replica: int, blocks: Sequence[int]) -> None:
        """This prompt goes there."""
        sent = self._sent[replica]
        for block in reversed(blocks):  # the first one last: without it those behind it are never found
            sent[block] = None
            sent.move_to_end(block)
        while len(sent) > self._limit:
            sent.popitem(last=False)

    def forget(self, replica: int) -> None:
        """It starts anew, with an empty cache."""
        self._sent[replica].clear()

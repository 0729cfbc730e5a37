"""Responses that were asked to be kept: in memory, the most recently used of them.

They go when the process does, and when there are too many or they are too large; those still being made stay. A
conversation is a chain of responses, of which each holds its own input alone; to use one is to use all before it. Knows
a response only by its id, its JSON, and whether it has ended.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import ApiError

MOST_RESPONSES = 1000
MOST_BYTES = 128 << 20  # as JSON; Python takes two times as much for long texts, five for many short ones

Item = dict[str, Any]


class Growing(Protocol):
    """A response (`responses_events.Draft`)."""

    @property
    def id(self) -> str: ...
    @property
    def ended(self) -> bool: ...
    @property
    def status(self) -> str: ...
    @property
    def response(self) -> dict[str, Any]: ...


class Recording:
    """Events of a response, for whoever comes later; the place of each is its sequence number."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._grown = asyncio.Event()
        self._over = False
        self.size_bytes = 0

    def add(self, events: Sequence[dict[str, Any]]) -> None:
        self._events += events
        self.size_bytes += sum(len(json.dumps(event)) for event in events)
        self._wake()

    def end(self) -> None:
        self._over = True
        self._wake()

    async def read(self, after: int) -> AsyncGenerator[dict[str, Any]]:
        """Those with a greater sequence number, the ones that are still to come as they come."""
        place = after + 1
        while True:
            while place < len(self._events):
                yield self._events[place]
                place += 1
            if self._over:
                return
            await self._grown.wait()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()


@dataclass
class Kept:
    """owner: who may see it. input: the items of this request alone. previous: the id of the response that it goes on
    from. recording: of one that was asked for in the background and as a stream. stop: ends the making of one in the
    background."""

    draft: Growing
    owner: str
    input: Sequence[Item]
    previous: str | None = None
    recording: Recording | None = None
    stop: Callable[[], Awaitable[None]] | None = None
    size_bytes: int = 0  # once it has ended


class Store:
    def __init__(self, most: int = MOST_RESPONSES, most_bytes: int = MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size_bytes(self) -> int:
        """Of those that have ended."""
        return self._bytes

    def put(self, kept: Kept) -> None:
        self._kept[kept.draft.id] = kept
        self._make_room()

    def settle(self, kept: Kept) -> None:
        """It has ended: from now on it counts, and may go."""
        if self._kept.get(kept.draft.id) is not kept or kept.size_bytes:
            return
        kept.size_bytes = len(json.dumps(kept.draft.response)) + len(json.dumps(kept.input))
        kept.size_bytes += kept.recording.size_bytes if kept.recording else 0
        self._bytes += kept.size_bytes
        self._make_room()

    def get(self, response_id: str, owner: str) -> Kept | None:
        """None, too, of someone else's."""
        kept = self._kept.get(response_id)
        if kept is None or kept.owner != owner:
            return None
        self._kept.move_to_end(response_id)
        return kept

    def find(self, response_id: str, owner: str) -> Kept:
        """Raises ApiError 404."""
        kept = self.get(response_id, owner)
        if kept is None:
            message = f"no response {response_id[:100]!r} is kept here: at most {self._most} are, until a restart"
            raise ApiError(404, message, "response_id", "response_not_found")
        return kept

    def remove(self, response_id: str) -> None:
        """Also of one that is gone already: two may delete at once."""
        if (kept := self._kept.pop(response_id, None)) is not None:
            self._bytes -= kept.size_bytes

    def chain(self, response_id: str | None, owner: str) -> list[Kept]:
        """The responses of a conversation up to this one, the first one first; of None, none. Raises ApiError 400."""
        found: list[Kept] = []
        while response_id is not None:
            kept = self.get(response_id, owner)
            if kept is None:
                message = f"previous_response_id: response {response_id[:100]!r} is not, or no longer, kept here"
                raise ApiError(400, message, "previous_response_id", "previous_response_not_found")
            found.append(kept)
            response_id = kept.previous
        return found[::-1]

    def _make_room(self) -> None:
        """Drops those that were used least recently."""
        if len(self._kept) <= self._most and self._bytes <= self._most_bytes:
            return
        for kept in [kept for kept in self._kept.values() if kept.size_bytes]:
            self.remove(kept.draft.id)
            if len(self._kept) <= self._most and self._bytes <= self._most_bytes:
                return

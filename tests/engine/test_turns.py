"""Whose request runs: turns, cancels, lost connections and refusals on the leader, with a fake engine.

A follower hears the words that the leader told; it must do with its engine exactly what the leader did with its own.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from gptoss_launch.parallel.engine.lockstep import Word
from gptoss_launch.parallel.engine.request import Request, Token
from gptoss_launch.parallel.engine.trace import Trace
from gptoss_launch.parallel.engine.wire import Cancel, Generate, Message, Refused, Tokens
from gptoss_launch.parallel.engine.worker import Turns, follow

BAD = "bad"  # id of a request that the engine refuses


@dataclass
class FakeEngine:
    """Token i of a request is i. `events`: what was begun, drawn and closed. Streams are kept, so that one that nobody
    closes stays open."""

    events: list[tuple[str, str]] = field(default_factory=list)
    streams: list[Generator[Token]] = field(default_factory=list)

    def refusal(self, request: Request) -> str | None:
        return "7 is too many" if request.id == BAD else None

    def generate(self, request: Request) -> Generator[Token]:
        self.streams.append(self._stream(request))
        return self.streams[-1]

    def _stream(self, request: Request) -> Generator[Token]:
        self.events.append(("begin", request.id))
        try:
            for index in range(request.max_tokens):
                self.events.append(("draw", request.id))
                yield Token(request.id, index, "length" if index == request.max_tokens - 1 else None)
        finally:
            self.events.append(("close", request.id))


@dataclass
class FakeFrontEnds:
    sent: list[tuple[str, Message]] = field(default_factory=list)

    def send(self, connection: str, message: Message) -> None:
        self.sent.append((connection, message))


@dataclass
class FakeLockstep:
    told: list[tuple[Word, Request | None]] = field(default_factory=list)

    def tell(self, word: Word, request: Request | None = None) -> None:
        self.told.append((word, request))


class Enough(Exception):
    """The follower has heard everything."""


@dataclass
class Replay:
    """What a follower hears."""

    words: list[tuple[Word, Request | None]]

    def hear(self) -> tuple[Word, Request | None]:
        if not self.words:
            raise Enough
        return self.words.pop(0)


class Leader:
    """Turns over fakes. Connections are plain names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine, self.front_ends, self.lockstep = FakeEngine(), FakeFrontEnds(), FakeLockstep()
        self.turns = Turns(self.engine, self.front_ends, self.lockstep, Trace(folder / "leader.trace"))

    def ask(self, front_end: str, name: str, tokens: int) -> None:
        self.turns.take(front_end, Generate(Request(name, (1, 2), tokens)))

    def run(self, limit: int = 100) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            if self.turns.idle:
                return
            self.turns.step()
        raise AssertionError("it never ends")

    @property
    def sent(self) -> list[tuple[str, str, int, str | None]]:
        """(front end, request, token, why it ended) of every token, in order; refusals as token -1."""
        rows: list[tuple[str, str, int, str | None]] = []
        for front_end, message in self.front_ends.sent:
            if isinstance(message, Refused):
                rows.append((front_end, message.request_id, -1, message.message))
            else:
                assert isinstance(message, Tokens)
                rows += [(front_end, token.request_id, token.id, token.finish_reason) for token in message.tokens]
        return rows

    @property
    def words(self) -> list[str]:
        """Words in order; a start with its request."""
        return [f"{word} {request.id}" if request is not None else word for word, request in self.lockstep.told]

    def check_follower(self) -> None:
        """A follower does the same, in the same order."""
        engine = FakeEngine()
        with pytest.raises(Enough):
            follow(engine, Replay(list(self.lockstep.told)), Trace(self.folder / "follower.trace"))
        assert engine.events == self.engine.events


@pytest.fixture
def leader(tmp_path: Path) -> Leader:
    return Leader(tmp_path)


def closed(leader: Leader) -> list[str]:
    return [name for event, name in leader.engine.events if event == "close"]


def test_nothing_to_do_at_first(leader: Leader) -> None:
    assert leader.turns.idle and leader.words == []


def test_requests_take_turns_in_the_order_they_came(leader: Leader) -> None:
    leader.ask("A", "a1", 2)
    leader.ask("B", "b1", 1)
    leader.ask("A", "a2", 2)
    assert not leader.turns.idle and leader.engine.events == []
    leader.run()
    assert leader.sent == [
        ("A", "a1", 0, None),
        ("A", "a1", 1, "length"),
        ("B", "b1", 0, "length"),
        ("A", "a2", 0, None),
        ("A", "a2", 1, "length"),
    ]
    assert leader.words == [
        *("start a1", "go_on", "go_on", "end"),
        *("start b1", "go_on", "end"),
        *("start a2", "go_on", "go_on", "end"),
    ]
    assert closed(leader) == ["a1", "b1", "a2"]
    leader.check_follower()


def test_a_step_is_one_token(leader: Leader) -> None:
    """So that a cancel is seen between any two."""
    leader.ask("A", "a", 3)
    for count in (1, 2, 3):
        leader.turns.step()
        assert len(leader.sent) == count
    assert leader.turns.idle


def test_the_running_request_is_cancelled(leader: Leader) -> None:
    leader.ask("A", "a", 50)
    leader.ask("A", "next", 1)
    leader.turns.step()
    leader.turns.take("A", Cancel("a"))
    assert closed(leader) == ["a"]  # at once: its pages are free for the next
    leader.run()
    assert leader.words == ["start a", "go_on", "end", "start next", "go_on", "end"]
    assert leader.sent == [("A", "a", 0, None), ("A", "next", 0, "length")]
    leader.check_follower()


def test_a_waiting_request_is_cancelled(leader: Leader) -> None:
    for name in ("a", "b", "c"):
        leader.ask("A", name, 2)
    leader.turns.step()
    leader.turns.take("A", Cancel("b"))
    leader.run()
    assert [word for word in leader.words if word.startswith("start")] == ["start a", "start c"]
    assert closed(leader) == ["a", "c"]
    leader.check_follower()


def test_a_cancel_reaches_its_own_front_end_only(leader: Leader) -> None:
    """Two front ends may use the same id."""
    leader.ask("A", "same", 2)
    leader.ask("B", "same", 2)
    leader.turns.step()
    leader.turns.take("B", Cancel("same"))
    assert closed(leader) == []
    leader.run()
    assert [row[:3] for row in leader.sent] == [("A", "same", 0), ("A", "same", 1)]


@pytest.mark.parametrize("when", ["never asked", "already over", "cancelled before"])
def test_a_cancel_of_nothing_changes_nothing(leader: Leader, when: str) -> None:
    leader.ask("A", "a", 1)
    leader.ask("A", "b", 2)
    if when == "cancelled before":
        leader.turns.take("A", Cancel("a"))
    else:
        leader.turns.step()
    leader.turns.take("A", Cancel("no such" if when == "never asked" else "a"))
    leader.run()
    assert [row for row in leader.sent if row[1] == "b"] == [("A", "b", 0, None), ("A", "b", 1, "length")]
    leader.check_follower()


def test_a_lost_connection_takes_all_its_requests_along(leader: Leader) -> None:
    leader.ask("A", "a1", 9)
    leader.ask("B", "b1", 1)
    leader.ask("A", "a2", 9)
    leader.ask("B", "b2", 1)
    leader.turns.step()
    leader.turns.take("A", None)
    assert closed(leader) == ["a1"]
    leader.run()
    assert leader.sent == [("A", "a1", 0, None), ("B", "b1", 0, "length"), ("B", "b2", 0, "length")]
    assert leader.words == ["start a1", "go_on", "end", "start b1", "go_on", "end", "start b2", "go_on", "end"]
    leader.check_follower()


def test_a_lost_connection_that_only_waited(leader: Leader) -> None:
    leader.ask("A", "a", 3)
    leader.ask("B", "b", 3)
    leader.turns.step()
    leader.turns.take("B", None)
    leader.run()
    assert closed(leader) == ["a"] and len(leader.sent) == 3


def test_the_last_one_leaves(leader: Leader) -> None:
    leader.ask("A", "a", 9)
    leader.turns.take("A", None)  # before it began
    assert leader.turns.idle and leader.words == []
    leader.ask("A", "a", 9)
    leader.turns.step()
    leader.turns.take("A", None)
    assert leader.turns.idle and closed(leader) == ["a"]


def test_a_refused_request_is_told_and_the_next_one_runs(leader: Leader) -> None:
    leader.ask("A", BAD, 1)
    leader.ask("B", "b", 1)
    leader.run()
    assert leader.sent == [("A", BAD, -1, "7 is too many"), ("B", "b", 0, "length")]
    assert leader.words == ["start b", "go_on", "end"]  # the followers hear nothing of a refusal
    assert leader.engine.events[0] == ("begin", "b")
    leader.check_follower()


def test_a_refusal_alone_leaves_it_idle(leader: Leader) -> None:
    leader.ask("A", BAD, 1)
    leader.turns.step()
    assert leader.turns.idle and leader.words == []


def test_idle_words_between_requests_mean_nothing_to_a_follower(leader: Leader) -> None:
    leader.lockstep.tell("idle")
    leader.ask("A", "a", 2)
    leader.run()
    leader.lockstep.tell("idle")
    leader.ask("A", "b", 1)
    leader.run()
    leader.check_follower()


def test_other_messages_are_ignored(leader: Leader) -> None:
    """A front end that says what only a leader says."""
    leader.turns.take("A", Refused("a", "no"))
    leader.turns.take("A", Tokens(()))
    assert leader.turns.idle

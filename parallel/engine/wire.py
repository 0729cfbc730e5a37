"""Messages between processes: frozen values, msgpack on a stream socket.

Three conversations use it. Front end and leader rank: Generate and Cancel one way; Hello, then Tokens, Refused, Done
and Stats back. Every process and the supervisor: Hello, then Progress, Ready or Failed; a process whose supervisor
connection ends must end too, so that nothing outlives the command, not even after kill -9. A node and the head: Hello
and Leave one way; Assigned, Failed and Stop back. Where a replica lies on several nodes, Failed one way as well.

Knows nothing of sockets or event loops: bytes in, values out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import msgpack

from .constraint import Constraint, Section
from .request import Request, Sampling, Token

MESSAGE_LIMIT_BYTES = 64 << 20  # a 131,072-token prompt is under 1 MB


@dataclass(frozen=True)
class Generate:
    """Front end -> leader: start this request."""

    request: Request


@dataclass(frozen=True)
class Cancel:
    """Front end -> leader: nobody reads this request any more. It ends without another word."""

    request_id: str


@dataclass(frozen=True)
class Tokens:
    """Leader -> front end: what one step gave, for all streams."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Refused:
    """Leader -> front end: this request cannot run, or cannot go on; the message says why, with the numbers."""

    request_id: str
    message: str


@dataclass(frozen=True)
class Done:
    """Leader -> front end, after the last token of a request: where its time went.

    queue_s: from arrival to its first step. prefill_s: from there to its first token. decode_s: from there to its last.
    cached_tokens: of the prompt, found in the prefix cache. tokens: of the answer.
    """

    request_id: str
    queue_s: float
    prefill_s: float
    decode_s: float
    prompt_tokens: int
    cached_tokens: int
    tokens: int


@dataclass(frozen=True)
class Stats:
    """Leader -> every front end, now and then: how busy the replica is, and what it has done since it started.

    Those that count since the start end in _total; those of experts (`offload.counts`) are 0 where all are on the
    device. exact_draws_total: draws that had to be repeated because the first candidates did not suffice. slow_paths:
    slower ways that are taken, by name, with the reason.
    """

    running: int
    waiting: int
    kv_pages: int
    kv_pages_used: int
    prefix_queried_tokens_total: int
    prefix_hit_tokens_total: int
    preemptions_total: int
    exact_draws_total: int
    steps_total: int
    prefill_tokens_total: int
    decode_tokens_total: int
    expert_hits_total: int
    expert_misses_total: int
    expert_moved_bytes_total: int
    expert_waited_s_total: float
    expert_stalled_s_total: float
    expert_ahead_total: int
    expert_ahead_hits_total: int
    decode_step_s: float
    communication_s: float
    slow_paths: tuple[str, ...]


@dataclass(frozen=True)
class Hello:
    """Any process -> supervisor, first: who it is. role: "rank", "torchrun" or "http". Leader -> front end, first: role
    "leader". And node -> head: role "node" or "replica", for a connection of this node's or of one of its replicas;
    rank is that one's number."""

    role: str
    rank: int
    pid: int
    host: str


@dataclass(frozen=True)
class Progress:
    """Rank -> supervisor while loading."""

    rank: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Ready:
    """Any process -> supervisor: it can work.

    memory: bytes by part as measured, for the comparison with the plan, and read_bytes, of the files.
    times: seconds of a step and of its parts. load_s: from when the process began to now; phases: its parts by name.
    slow_paths: slower ways that are taken, with the reason. notes: what else was found out at the start.
    """

    rank: int
    digest: str
    memory: dict[str, int]
    times: dict[str, float]
    load_s: float
    slow_paths: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """Any process -> supervisor, last: why it ends (exit_code 2: the user can put it right). And head -> node: why it
    cannot join now. And node -> head -> supervisor: why a part of the replica that it has a part of has ended.

    follows: it was waiting for another process when it failed, so that one is the likely cause.
    """

    rank: int
    message: str
    hint: str
    exit_code: int
    follows: bool = False


@dataclass(frozen=True)
class Assigned:
    """Head -> node, first: what all nodes run. version: of gptoss-launch. plan: as JSON. meeting_port: of the head,
    where the ranks of a replica meet that lies on several nodes; 0 without one."""

    version: str
    plan: str
    meeting_port: int = 0


@dataclass(frozen=True)
class Leave:
    """Node -> head: it was asked to end. Its replicas get no further requests, and Stop once theirs have ended."""


@dataclass(frozen=True)
class Stop:
    """Head -> node: nothing is asked of it any more."""


_Engine = Generate | Cancel | Tokens | Refused | Done | Stats
Message = _Engine | Hello | Progress | Ready | Failed | Assigned | Leave | Stop
_TYPES: dict[str, type] = {kind.__name__: kind for kind in get_args(Message)}


def encode(message: Message) -> bytes:
    name = type(message).__name__
    body: Any = message
    if isinstance(message, Tokens):  # sent every step: no field names on the wire
        body = [(one.request_id, one.id, one.finish_reason, one.logprob, one.top) for one in message.tokens]
    # vars, of one object after the other: dataclasses.asdict copies every token of a prompt, 0.5 ms for a thousand.
    packed: bytes | None = msgpack.packb([name, body], default=vars)
    assert packed is not None
    return packed


class Decoder:
    """Bytes of one connection -> messages. Raises ValueError on anything that is not a message."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(max_buffer_size=MESSAGE_LIMIT_BYTES, use_list=True)

    def feed(self, data: bytes) -> Iterator[Message]:
        try:
            self._unpacker.feed(data)
        except msgpack.BufferFull:
            raise ValueError(f"a message of more than {MESSAGE_LIMIT_BYTES} bytes") from None
        for value in self._unpacker:
            yield _decode(value)


def _decode(value: Any) -> Message:
    try:
        name, body = value
        if name == "Tokens":
            return Tokens(tuple(map(_token, body)))
        if name == "Generate":
            fields = body["request"]
            return Generate(
                Request(
                    **fields
                    | {
                        "prompt_tokens": tuple(fields["prompt_tokens"]),
                        "stop_tokens": tuple(fields["stop_tokens"]),
                        "sampling": _sampling(fields["sampling"]),
                        "constraint": _constraint(fields["constraint"]),
                    }
                )
            )
        if name in ("Stats", "Ready"):
            body |= {name: tuple(body[name]) for name in ("slow_paths", "notes") if name in body}
        return _TYPES[name](**body)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"not a message: {error!r}") from None


def _token(fields: list[Any]) -> Token:
    request_id, id, finish_reason, logprob, top = fields
    # Most have no alternatives, and this is done for each token.
    return Token(request_id, id, finish_reason, logprob, tuple((other, p) for other, p in top) if top else ())


def _sampling(fields: dict[str, Any]) -> Sampling:
    bias = tuple((id, value) for id, value in fields.pop("logit_bias"))
    return Sampling(**fields, logit_bias=bias)


def _constraint(fields: dict[str, Any] | None) -> Constraint | None:
    if fields is None:
        return None
    sections = tuple(
        Section(**one | {"headers": tuple(map(tuple, one["headers"])), "ends": tuple(one["ends"])})
        for one in fields["sections"]
    )
    return Constraint(**fields | {"sections": sections, "opening": tuple(fields["opening"])})

"""How the tokens of a request are read: what its route says once, for each of its choices and each turn of one."""

from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from ...parallel.engine.request import Token
from .answer import Parser, Piece, read_answer
from .metrics import Watch


@dataclass(frozen=True)
class Reading:
    """How tokens are read: `answer.read_answer`'s arguments. parser: makes a new one, which calls what it
    is given for each repair, with its kind. builtins: tools that are run (`tool_loop`), most_runs times at most."""

    parser: Callable[[Callable[[str], None]], Parser]
    stops: Sequence[str]
    functions: Collection[str]
    unseen: Collection[int]
    keep_tokens: bool
    builtins: Collection[str] = ()
    most_runs: int | None = None

    def pieces(self, tokens: AsyncGenerator[Token], watch: Watch) -> AsyncGenerator[Piece]:
        return read_answer(
            tokens,
            self.parser(watch.repaired),
            self.stops,
            self.functions,
            partial(watch.end, "stop"),
            self.unseen,
            keep_tokens=self.keep_tokens,
            builtins=self.builtins,
        )

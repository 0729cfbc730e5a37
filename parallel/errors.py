"""The errors that a person can cause, and what each one exits with.

    UserError            what was asked cannot be done: one line with numbers, then a hint     exit 2
    +-- NoPlanError      no layout fits this machine (raised by `planning.planner`)            exit 6
    +-- CheckError       a check of the work itself failed, such as a loss that is no number   exit 4
    +-- RankDiedError    a rank ended or hung while it was needed                              exit 7

Anything else that is raised is our own mistake and keeps its traceback.
"""

import errno
import os
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something a person can put right.

    message: one line that names the thing and its numbers, no full stop.
    hint: what to do about it; shown on a line of its own.
    """

    exit_code = 2
    follows = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class NoPlanError(UserError):
    """No layout fits. tried: one line a layout, by how much it falls short or why it cannot be had yet."""

    exit_code = 6

    def __init__(self, message: str, tried: tuple[str, ...], hint: str) -> None:
        super().__init__(message, hint)
        self.tried = tried

    def __str__(self) -> str:
        return "\n".join((self.message, *(f"tried: {line}" for line in self.tried), f"hint: {self.hint}"))


class CheckError(UserError):
    """A check of the work itself failed; the message gives the numbers."""

    exit_code = 4


class RankDiedError(UserError):
    """A rank ended or hung while it was needed; the message names the rank, the host and what it was doing. follows: it
    was waiting for others, whose end may be the cause."""

    exit_code = 7

    def __init__(self, message: str, hint: str = "", follows: bool = False) -> None:
        super().__init__(message, hint)
        self.follows = follows


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt `word`: the nearest of `known` if one is near, then all of them."""
    names = sorted(known)
    near = get_close_matches(word, names, n=1)
    question = f"did you mean {near[0]}? " if near else ""
    return f"{question}known: {', '.join(names)}"


def lacks_disk(error: BaseException) -> bool:
    """Whether the system has refused room on a disk: safetensors has no exception of its own for it."""
    return getattr(error, "errno", None) in _NO_ROOM or any(os.strerror(number) in str(error) for number in _NO_ROOM)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def lacks_host_memory(error: BaseException) -> bool:
    """Whether the system has refused memory: torch and safetensors have no exception of their own for it."""
    return isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in str(error)

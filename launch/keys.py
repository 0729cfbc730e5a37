"""API keys: who may come in, and how much of it.

A file, or the environment variable GPTOSS_LAUNCH_API_KEYS, holds a key a line, perhaps with limits:

    3fK9-long-random-text
    9aQ2-long-random-text  name=team-b  per_minute=600  at_once=16

Kept is a key's SHA-256 alone, so that no log, traceback or dump of memory shows it. Knows nothing of HTTP.
"""

import hashlib
import hmac
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..parallel.errors import UserError

KEYS_VARIABLE = "GPTOSS_LAUNCH_API_KEYS"


@dataclass(frozen=True)
class Key:
    """name: what logs call it. per_minute: requests that may begin in a minute. at_once: requests under way. None: no
    limit."""

    name: str
    sha256: bytes
    per_minute: float | None = None
    at_once: int | None = None


def read_keys(path: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[Key, ...]:
    """All keys of the file and of the environment; none if neither is there. Raises UserError for a line that is wrong,
    without showing it."""
    keys: list[Key] = []
    if path is not None:
        keys += _read_lines(_text(path), f"--api-key-file {path}")
    if KEYS_VARIABLE in environment:
        keys += _read_lines(environment[KEYS_VARIABLE], KEYS_VARIABLE)
    for place, key in enumerate(keys):
        if any(key.sha256 == other.sha256 or key.name == other.name for other in keys[:place]):
            raise UserError(f"two API keys are the same, or called {key.name}", "give every key a name=NAME of its own")
    return tuple(keys)


def first_key(path: Path | None, environment: Mapping[str, str] = os.environ) -> str:
    """The first key of such a file, or of the environment, as it is. Raises UserError if there is none."""
    text, where = environment.get(KEYS_VARIABLE, ""), KEYS_VARIABLE
    if path is not None:
        text, where = _text(path), f"--api-key-file {path}"
    return _lines(text, where)[0][1][0]


def find_key(keys: Sequence[Key], given: bytes) -> Key | None:
    """The key that was given. Takes as long for a wrong one as for a right one."""
    sha256 = hashlib.sha256(given).digest()
    found = None
    for key in keys:  # all of them: where the loop ended would tell
        if hmac.compare_digest(key.sha256, sha256):
            found = key
    return found


def _read_lines(text: str, where: str) -> list[Key]:
    lines = enumerate(_lines(text, where), 1)
    return [_read_line(words, f"{where}: line {line}", f"key-{place}") for place, (line, words) in lines]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--api-key-file {path}: no UTF-8", "one key a line") from None
    except OSError as error:
        raise UserError(f"--api-key-file {path}: {error.strerror}", "a file with one key a line") from None


def _lines(text: str, where: str) -> list[tuple[int, list[str]]]:
    """(number, words) of each line that holds a key; there is one at least."""
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1)]
    found = [(number, words) for number, words in lines if words and not words[0].startswith("#")]
    if not found:
        raise UserError(f"{where}: no key in it", "one key a line")
    return found


def _read_line(words: list[str], where: str, name: str) -> Key:
    fields: dict[str, str | float | int] = {"name": name}
    for word in words[1:]:
        setting, equals, value = word.partition("=")
        if not equals or setting not in _READERS:
            raise UserError(f"{where}: a word after the key is no setting", f"known: {', '.join(_READERS)}")
        try:
            fields[setting] = _READERS[setting](value)
        except ValueError:
            raise UserError(f"{where}: {setting}={value[:20]} is no {_WANTED[setting]}") from None
    if not words[0].isascii():
        raise UserError(f"{where}: a key is ASCII: it travels in an HTTP header")
    return Key(sha256=hashlib.sha256(words[0].encode()).digest(), **fields)  # type: ignore[arg-type]


def _name(value: str) -> str:
    if not value.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ValueError
    return value


def _positive(value: str) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def _count(value: str) -> int:
    if int(value) < 1:
        raise ValueError
    return int(value)


_READERS: dict[str, Callable[[str], str | float | int]] = {"name": _name, "per_minute": _positive, "at_once": _count}
_WANTED = {"name": "name of letters, digits, - _ and .", "per_minute": "number above 0", "at_once": "number from 1"}

"""The body of a request -> a checked, frozen value, or an ApiError that names the first field that is wrong.

However large or odd a body is, it is refused in bounded time: unknown names are found before values are looked at, and
a list stops at its first wrong entry (`Items`). Knows no route and none of their fields.
"""

from collections.abc import Collection
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from .errors import ApiError

T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]

MOST_ERRORS = 1000  # beyond them it is not worth finding the first one
MOST_NAME_CHARS = 100  # of a name that is said back


class Strict(BaseModel):
    """An object with the fields that it names and no others; nothing is converted ("1" is no number)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Body = TypeVar("Body", bound=Strict)


def parse_body(kind: type[Body], body: bytes) -> Body:
    """Raises ApiError 400."""
    try:
        value = from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body: no JSON that can be read: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body: not an object", code="invalid_value")
    # A refused name says more than what else is wrong: it may be the cause.
    _refuse_unknown(value, kind.model_fields, "")
    try:
        return kind.model_validate(value)
    except ValidationError as errors:
        raise _explain(errors, value) from None


def _refuse_unknown(value: dict[str, Any], known: Collection[str], path: str) -> None:
    unknown = next((name for name in value if name not in known), None)
    if unknown is not None:
        raise _unsupported(path + unknown[:MOST_NAME_CHARS])


def _unsupported(param: str) -> ApiError:
    return ApiError(400, f"{param}: unknown or unsupported field", param, "unsupported_field")


def _explain(errors: ValidationError, value: dict[str, Any]) -> ApiError:
    if errors.error_count() > MOST_ERRORS:
        return ApiError(400, f"the body: {errors.error_count()} errors", code="invalid_value")
    found = errors.errors(include_url=False, include_input=False)
    unknown = [error for error in found if error["type"] == "extra_forbidden"]
    # Of the alternatives of a type, the one that got furthest is the one that was meant.
    error = unknown[0] if unknown else max(found, key=lambda e: len(e["loc"]))
    param = ".".join(_path(error["loc"], value, error["type"] == "missing"))
    if error["type"] in ("extra_forbidden", "none_required"):
        return _unsupported(param)
    return ApiError(400, f"{param}: {error['msg']}", param, "invalid_value")


def _path(where: tuple[int | str, ...], value: Any, missing: bool) -> list[str]:
    """The steps of pydantic's location that are in the body; the others name alternatives of a type."""
    path = []
    for place, step in enumerate(where):
        inside = isinstance(value, dict) and step in value
        inside = inside or (isinstance(value, list) and isinstance(step, int) and step < len(value))
        if inside:
            value = value[step]  # type: ignore[index]
        if inside or (missing and place == len(where) - 1):
            path.append(str(step)[:MOST_NAME_CHARS])
    return path

"""What goes wrong over HTTP, in OpenAI's error shape: {"error": {"message", "type", "param", "code"}}.

Where the same request may well succeed a little later, {"retryable": true} is added and the answer, if it is not under
way, has a Retry-After header. Knows no route.
"""

from typing import Any

from ...parallel.errors import UserError
from ..engine_client import EngineDiedError

_TYPES = {401: "authentication_error", 404: "not_found_error"}


class ApiError(Exception):
    """status: the HTTP status. param: the field that is wrong. code: a word for programs. retry_after_s: when to send
    the request again; None where that would not help."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error | ({} if self.retry_after_s is None else {"retryable": True})}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def replica_died(reason: str) -> ApiError:
    return ApiError(503, f"{reason}: send the request again", code="replica_died", retry_after_s=1)


def explain(error: Exception) -> ApiError:
    """What a client is told of an error in the engine or on the way to it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDiedError):
        return replica_died(f"{error}; this request is lost")
    if isinstance(error, UserError):
        return ApiError(400, error.message, code="refused_by_engine")
    return ApiError(500, "internal error; the server's log has more")

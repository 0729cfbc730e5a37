"""What goes wrong over HTTP, in OpenAI's error shape: {"error": {"message", "type", "param", "code"}}.

Where the same request may well succeed a little later, {"retryable": true} is added and the answer, if it is not under
way, has a Retry-After header. Does not know where errors come from.
"""

from typing import Any

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

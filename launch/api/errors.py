"""What goes wrong over HTTP, in OpenAI's error shape: {"error": {"message", "type", "param", "code"}}.

Does not know where errors come from.
"""

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error"}


class ApiError(Exception):
    """status: the HTTP status. param: the field that is wrong. code: a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def engine_died(reason: str) -> ApiError:
    return ApiError(503, f"{reason}; this request is lost", code="engine_died")

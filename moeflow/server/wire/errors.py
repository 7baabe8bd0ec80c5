"""Errors over HTTP: a status and OpenAI's form of an error.

Knows status codes. Knows nothing of what went wrong.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from moeflow.errors import MoeflowError

RETRY_S = "2"  # until a client asks again, where it may
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


class HttpError(MoeflowError):
    """An answer that says what was wrong.

    Args:
        status: of HTTP, 400 or more.
        message: what was found, and what is allowed.
        param: the field of the body; None where it is not one field.
        code: a word for programs, such as "model_not_found".
        headers: to send as well.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """Return the error in OpenAI's form."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error | ({"request_id": request_id} if request_id else {})}

    def response(self, request_id: str | None = None) -> Response:
        """Return the error as a response."""
        return JsonResponse(self.body(request_id), self.status, self.headers)


class JsonResponse(Response):
    """A JSON object; numbers that JSON has not become null."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(dump(content), status_code, headers)


def dump(content: Any) -> str:
    """Return JSON in one line of ASCII, so that nothing in a text ends a line of an event."""
    try:
        return json.dumps(content, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(content), separators=(",", ":"))


def _finite(content: Any) -> Any:
    """Return the content with null for infinities and NaN: a token that the model rules out has logprob -inf."""
    if isinstance(content, float):
        return content if abs(content) < float("inf") else None
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content

"""A request that is refused: the status of HTTP, and the object that OpenAI's clients read an error from."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["Refusal"]

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """Why a request gets no answer.

    Parameters
    ----------
    status : int
        Status of HTTP, 400 to 599.
    code : str
        Short stable name, for programs.
    message : str
        What was got, what was expected, what to do.
    headers : dict of str
        Headers beside the usual ones, such as ``Retry-After``.
    """

    def __init__(self, status: int, code: str, message: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}

    def content(self) -> dict[str, Any]:
        """The object that is sent, in OpenAI's form."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}

    def event(self) -> str:
        """The same as an event of a stream that has begun already."""
        return f"data: {json.dumps(self.content())}\n\n"

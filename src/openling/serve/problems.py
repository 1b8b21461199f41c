"""Errors as API clients meet them: one exception, OpenAI's and Anthropic's shapes, and pydantic's findings in plain words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from openling.errors import nearest

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


# Parameters of other services that change the reply, and what to do instead.
UNSUPPORTED = {
    "functions": "send them as tools",
    "function_call": "send tool_choice",
    "modalities": "replies are text",
    "audio": "replies are text",
    "prediction": "start the server with --drafts to draft tokens",
    "verbosity": "ask for short or long replies in a message",
    "web_search_options": "nothing is searched; send results as messages",
    "output_format": "send output_config",
    "mcp_servers": "call them yourself and send their functions as tools",
}
_FEW_FIELDS = 10


class ApiError(Exception):
    """A request that is answered with an error. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """The class of error, in the words that OpenAI's and Anthropic's clients know."""
        return TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")

    @property
    def told(self) -> str:
        """The message with the field at fault: many clients show nothing else."""
        named = self.param is None or re.search(rf"\b{re.escape(re.split(r'[.[]', self.param)[0])}\b", self.message)
        return self.message if named else f"{self.param}: {self.message}"

    def openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients expect."""
        return {"error": {"message": self.told, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic(self, request_id: str | None = None) -> dict[str, Any]:
        """The body that Anthropic's clients expect."""
        return {"type": "error", "error": {"type": self.type, "message": self.told}, "request_id": request_id}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, retry_after: int = 1) -> ApiError:
    """A 429 that says when to come back."""
    return ApiError(429, message, code="too_many_requests", headers={"Retry-After": str(retry_after)})


def unavailable(message: str, retry_after: int = 5) -> ApiError:
    """A 503 that says when to come back."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(retry_after)})


def from_validation(error: ValidationError, fields: set[str]) -> ApiError:
    """The first finding as a 400; an unknown parameter is named with its nearest known one. Input values are not repeated."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        if len(first["loc"]) == 1 and param in UNSUPPORTED:
            return bad(f"'{param}' is not supported: {UNSUPPORTED[param]}", param, "unsupported_parameter")
        hint = _known(param, fields) if len(first["loc"]) == 1 else ""
        return bad(f"unknown parameter '{param}'{hint}", param, "unknown_parameter")
    if first["type"] == "missing":
        return bad(f"missing required parameter '{param}'", param, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return bad(f"{message[:1].lower()}{message[1:]}", param or None, "invalid_value")


def _known(param: str, fields: set[str]) -> str:
    """The known parameter that is nearest; where none is, all of them, if they are few."""
    close = nearest(param, fields)
    if close:
        return f"; did you mean '{close}'?"
    return f"; this route takes {', '.join(sorted(fields))}" if len(fields) <= _FEW_FIELDS else ""


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path[:200]

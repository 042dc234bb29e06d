"""Errors as OpenAI's API reports them: a status and ``{"error": {"message", "type", "param", "code"}}``."""

from typing import Any

from fastapi.exceptions import RequestValidationError

from mcsd.errors import (
    EngineBusy,
    EngineClosed,
    McsdError,
    NonFiniteLogits,
    ProcessorFailed,
    PromptTooLong,
    ReplicaLost,
    RequestError,
    RequestInterrupted,
    RequestTimedOut,
    StepFailed,
    StepHung,
    UnsupportedModel,
)

RETRY_SECONDS = 1
"""What ``Retry-After`` says: a place in the batch becomes free within seconds."""

_UNAVAILABLE = (EngineClosed, ReplicaLost, RequestInterrupted, RequestTimedOut, StepHung)
_OUR_FAULT = (NonFiniteLogits, ProcessorFailed, StepFailed)


class ApiError(Exception):
    """A request that is refused or has failed.

    Args:
        status: of HTTP.
        message: one line.
        code: in OpenAI's words where there is one.
        param: the field at fault.
        retry: whether the client may try again soon.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    @property
    def body(self) -> dict[str, Any]:
        """The answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.retry else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def unsupported(param: str, message: str) -> ApiError:
    """The error of a field, or a value of it, that is not supported."""
    return ApiError(400, message, "unsupported_parameter", param)


def api_error(error: McsdError) -> ApiError:
    """The answer to a request that the engine has refused or that has failed."""
    if isinstance(error, EngineBusy):
        return ApiError(429, str(error), "rate_limit_exceeded", retry=True)
    if isinstance(error, _UNAVAILABLE):
        return ApiError(503, str(error), _code(error), retry=not isinstance(error, RequestTimedOut))
    if isinstance(error, PromptTooLong):
        return ApiError(400, str(error), "context_length_exceeded")
    if isinstance(error, RequestError | UnsupportedModel) and not isinstance(error, _OUR_FAULT):
        return ApiError(400, str(error), _code(error))
    return ApiError(500, str(error), _code(error))


def validation_error(error: RequestValidationError) -> ApiError:
    """The answer to a body that does not fit the schema: its first fault."""
    fault = error.errors()[0]
    place = [str(part) for part in fault["loc"] if part != "body"]
    name = ".".join(place)[:100] or None
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"{name!r} is not supported", "unsupported_parameter", name)
    return ApiError(400, f"{name or 'the body'}: {fault['msg']!s:.200}", "invalid_value", name)


def _code(error: McsdError) -> str:
    """The name of an error, as ``request_timed_out``."""
    name = type(error).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")

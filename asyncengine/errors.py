"""Every error the engine raises on purpose, by whose fault it is.

The caller: `ConfigError` (an engine argument), `InvalidRequestError` (a request).
The environment: `ModelLoadError`, `OutOfMemoryError`, `QueueFullError`.
The life of a request or engine: `RequestTimeoutError`, `RequestFailedError`,
`EngineClosedError`, `EngineDeadError`.
"""

from typing import Any

__all__ = [
    "AsyncEngineError",
    "ConfigError",
    "EngineClosedError",
    "EngineDeadError",
    "InvalidRequestError",
    "ModelLoadError",
    "OutOfMemoryError",
    "QueueFullError",
    "RequestFailedError",
    "RequestTimeoutError",
]


class AsyncEngineError(Exception):
    """Base of all errors raised by asyncengine."""


class _ParameterError(AsyncEngineError, ValueError):
    """A value the caller passed cannot be used; `parameter` names it and `value` is what was passed."""

    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class ConfigError(_ParameterError):
    """An engine argument is wrong, impossible on this machine, or contradicts another one."""


class InvalidRequestError(_ParameterError):
    """A request cannot be served as asked: the prompt or a sampling field is out of range."""


class ModelLoadError(AsyncEngineError):
    """The model's files are missing, damaged, incomplete, or of a kind that is not supported."""


class OutOfMemoryError(AsyncEngineError):
    """The machine has too little memory for these settings; the message has the sums."""


class QueueFullError(AsyncEngineError):
    """`max_queued_requests` or `max_queued_tokens` is reached; try again later (HTTP 429)."""


class RequestTimeoutError(AsyncEngineError, TimeoutError):
    """The request's `timeout` passed before it finished."""


class RequestFailedError(AsyncEngineError):
    """This request failed inside the engine; other requests are not affected."""


class EngineClosedError(AsyncEngineError):
    """The engine was closed, sleeps, or is used from another event loop than the one that created it."""


class EngineDeadError(AsyncEngineError):
    """A worker process died or answered with a fault; the message has the root cause."""

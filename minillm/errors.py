"""What a user can cause, as exceptions that say what to change. Our own mistakes are assertions.

MiniLLMError
├── ConfigError         an option cannot work, alone or with the others
│   └── MemoryFitError  weights, one step and the cache do not fit in memory
├── RequestError        one request's input cannot be served; the requests beside it are unharmed
├── BusyError           too much is waiting, of all users or of one; it says when to try again
│   └── ClosingError    the engine takes no more requests
├── ModelNotFoundError  no model of that name or path
├── CheckpointError     files of a model are missing, truncated, unsafe or do not fit the architecture
├── DownloadError       a model could not be fetched
└── EngineError         the engine stopped and cannot serve on
"""

from __future__ import annotations

__all__ = [
    "BusyError",
    "CheckpointError",
    "ClosingError",
    "ConfigError",
    "DownloadError",
    "EngineError",
    "MemoryFitError",
    "MiniLLMError",
    "ModelNotFoundError",
    "RequestError",
]


class MiniLLMError(Exception):
    """Root of everything that MiniLLM raises on purpose."""


class ConfigError(MiniLLMError, ValueError):
    """An option cannot work, alone or together with the others."""


class MemoryFitError(ConfigError):
    """Weights, the activations of one step and a cache for one request do not fit in memory."""


class RequestError(MiniLLMError, ValueError):
    """A request's prompt or parameters cannot be served."""


class BusyError(MiniLLMError, RuntimeError):
    """Too many requests wait already."""

    def __init__(self, message: str, retry_after: float) -> None:
        """`retry_after`: seconds after which there is probably room."""
        super().__init__(message)
        self.retry_after = retry_after


class ClosingError(BusyError):
    """The engine ends what it has and takes no more."""


class ModelNotFoundError(MiniLLMError, FileNotFoundError):
    """No model of that name or path is known."""


class CheckpointError(MiniLLMError, ValueError):
    """A model's files are missing, truncated, unsafe, or do not fit its architecture."""


class DownloadError(MiniLLMError, OSError):
    """A model could not be fetched."""


class EngineError(MiniLLMError, RuntimeError):
    """The engine stopped and cannot serve on."""

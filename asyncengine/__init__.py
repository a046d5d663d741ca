"""asyncengine: an LLM inference engine that lives inside your asyncio program.

Names are loaded when first used: importing the package costs little and has no side effect.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .args import EngineArgs
    from .config import EngineConfig
    from .engine.boot import ProgressEvent, StageReport, StartupReport
    from .engine.stream import GenerationStream
    from .errors import (
        AsyncEngineError,
        ConfigError,
        EngineClosedError,
        EngineDeadError,
        InvalidRequestError,
        ModelLoadError,
        OutOfMemoryError,
        QueueFullError,
        RequestFailedError,
        RequestTimeoutError,
    )
    from .llm import AsyncLLM
    from .outputs import CompletionOutput, Delta, Logprob, RequestMetrics, RequestOutput, Usage
    from .params import SamplingParams, StructuredOutputs
    from .sync import LLM

__version__ = "0.1.0"

_MODULES = {
    "args": ("EngineArgs",),
    "config": ("EngineConfig",),
    "engine.boot": ("ProgressEvent", "StageReport", "StartupReport"),
    "engine.stream": ("GenerationStream",),
    "errors": (
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
    ),
    "llm": ("AsyncLLM",),
    "outputs": ("CompletionOutput", "Delta", "Logprob", "RequestMetrics", "RequestOutput", "Usage"),
    "params": ("SamplingParams", "StructuredOutputs"),
    "sync": ("LLM",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "LLM",
    "AsyncEngineError",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "Delta",
    "EngineArgs",
    "EngineClosedError",
    "EngineConfig",
    "EngineDeadError",
    "GenerationStream",
    "InvalidRequestError",
    "Logprob",
    "ModelLoadError",
    "OutOfMemoryError",
    "ProgressEvent",
    "QueueFullError",
    "RequestFailedError",
    "RequestMetrics",
    "RequestOutput",
    "RequestTimeoutError",
    "SamplingParams",
    "StageReport",
    "StartupReport",
    "StructuredOutputs",
    "Usage",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

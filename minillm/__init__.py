"""MiniLLM: a small, readable engine for LLM inference. Importing it costs nothing; torch comes with the first LLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minillm.config import EngineConfig, ModelConfig
from minillm.types import (
    BeamSearchOutput,
    BeamSearchParams,
    FinishReason,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
    Timings,
)

if TYPE_CHECKING:
    from minillm.llm import LLM

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "EngineConfig",
    "FinishReason",
    "ModelConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "Timings",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from minillm.llm import LLM

        return LLM
    raise AttributeError(f"module 'minillm' has no attribute {name!r}")

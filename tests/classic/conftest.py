"""A tiny model of the classic API, in float32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from minillm.classic import ModelConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 163,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position": 256,
    "dtype": "float32",
    "device": "cpu",
}


@pytest.fixture
def tiny_config() -> Callable[..., ModelConfig]:
    """Maker of small configs; keywords replace fields."""
    return lambda **changes: ModelConfig(**{**SHAPE, **changes})

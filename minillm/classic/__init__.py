"""The classic MiniLLM API, tensors in and tensors out, as the project's first documents have it.

Thin over the engine: its decoder, its kernels, its paged cache and its sampling.
"""

from minillm.classic.batches import BatchedChunkedPrefill
from minillm.classic.benchmark import benchmark_chunked_prefill
from minillm.classic.config import Configs, ModelConfig
from minillm.classic.generation import (
    GenerationConfig,
    OptimizedInferenceEngine,
    TextGenerator,
    chunked_generate_with_kv_cache,
)
from minillm.classic.kv_cache import KVCache
from minillm.classic.model import ChunkedPrefillMiniLLM, MiniLLM

__all__ = [
    "BatchedChunkedPrefill",
    "ChunkedPrefillMiniLLM",
    "Configs",
    "GenerationConfig",
    "KVCache",
    "MiniLLM",
    "ModelConfig",
    "OptimizedInferenceEngine",
    "TextGenerator",
    "benchmark_chunked_prefill",
    "chunked_generate_with_kv_cache",
]

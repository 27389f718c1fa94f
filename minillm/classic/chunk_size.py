"""chunk_size="auto": the chunk that free memory holds and that ends at the edge of a stair of matrix products.

The time of a product rises in stairs of its rows (docs/log.md), so a pass is best filled to an edge. Knows no model.
"""

from __future__ import annotations

from minillm.classic.config import Settings
from minillm.runtime.kv_cache import estimated_activations
from minillm.runtime.startup import CPU_DEFAULTS, GPU_DEFAULTS

__all__ = ["auto_chunk_size"]

MEMORY_SHARE = 0.25
"""Of what is free: the cache and the caller's logits need some too."""
SMOOTH_STEPS = (64, 128, 256, 512)
"""Sizes to choose from on a CPU, whose product time has no stairs."""


def auto_chunk_size(settings: Settings, batch_size: int, free_bytes: int) -> int:
    """Tokens of each of `batch_size` sequences in a pass: as many as fit, from min_chunk_size to max_chunk_size."""
    defaults = GPU_DEFAULTS if settings.place.device.type == "cuda" else CPU_DEFAULTS
    itemsize = settings.place.dtype.itemsize
    best = settings.min_chunk_size
    for num_tokens in defaults.tile_steps or SMOOTH_STEPS:
        need = estimated_activations(settings.shape, num_tokens, num_tokens, itemsize)
        size = num_tokens // batch_size
        is_allowed = size <= settings.max_chunk_size and num_tokens <= defaults.max_num_batched_tokens
        if is_allowed and need <= MEMORY_SHARE * free_bytes:
            best = max(best, size)
    return best

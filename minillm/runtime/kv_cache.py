"""How much memory a cache may take, and the cache itself. It knows sizes in bytes, not requests.

One tensor [layers, 2, blocks, kv heads, block size, head size]: a head's slots of a block are contiguous, one
descriptor serves every layer, one copy moves a block in all of them. Block 0 belongs to nobody: padding writes there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import MemoryFitError

CPU_CACHE_BYTES = 4 << 30
"""Most that a cache takes on a CPU unless num_kv_blocks asks for more."""
GIB = 1 << 30


def make_kv_cache(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An empty cache. Zeros: no garbage NaN can leak through a masked position."""
    shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_size)
    return torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """What a device can give, in bytes, and what one token of cache costs."""

    total: int
    """Bytes that the engine may use in all."""
    weights: int
    activations: int
    """Most that one step of max_num_batched_tokens needs beside weights and cache."""
    bytes_per_token: int
    """Cache of one token, all layers."""
    max_num_batched_tokens: int

    @property
    def left(self) -> int:
        """Bytes for the cache; negative if not even a step fits."""
        return self.total - self.weights - self.activations

    def num_blocks(self, block_size: int, max_useful_tokens: int, at_least: int) -> int:
        """Blocks (block 0 included) that fit, no more than are of use.

        Raises MemoryFitError if fewer than `at_least` tokens fit.
        """
        num = self.left // (self.bytes_per_token * block_size)
        if (num - 1) * block_size < at_least:
            raise MemoryFitError(self.explain(at_least))
        return min(num, -(-max_useful_tokens // block_size) + 1)

    def explain(self, num_tokens: int) -> str:
        """The three numbers, and settings that would work."""
        need = self.weights + self.activations + num_tokens * self.bytes_per_token
        tokens = max(0, self.left // self.bytes_per_token)
        advice = []
        if tokens >= 1024:
            advice.append(f"max_model_len={tokens // 128 * 128}")
        smaller = self.max_num_batched_tokens // 4
        saved = self.activations * 3 // 4
        if smaller >= 64 and self.left + saved >= num_tokens * self.bytes_per_token:
            advice.append(f"max_num_batched_tokens={smaller}")
        advice.append("a dtype of fewer bytes, a smaller model, or a device with more memory")
        return (
            f"the model does not fit: weights {gib(self.weights)}, activations {gib(self.activations)} in a step of "
            f"{self.max_num_batched_tokens} tokens, cache {self.bytes_per_token / 1024:.1f} KiB per token. "
            f"{num_tokens} tokens of cache need {gib(need)} in all and {gib(self.total)} may be used. "
            f"Try {', or '.join(advice)}."
        )


def gib(num_bytes: int) -> str:
    """Bytes for people.

    >>> gib(3 << 29)
    '1.50 GiB'
    """
    return f"{num_bytes / GIB:.2f} GiB"


def free_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a device; of the machine (or of this process's control group) for a CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit = control_group_limit()
    return (free, total) if limit is None else (min(free, limit), min(total, limit))


def control_group_limit() -> int | None:
    """Bytes that a container may still use, if one limits this process."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            used = int(file.read())
    except (OSError, ValueError):
        return None
    return max(0, int(limit) - used) if limit.isdigit() else None


def estimated_activations(config: ModelConfig, num_tokens: int, num_logits: int, dtype_size: int) -> int:
    """Most bytes alive at once in a step: a layer's widest stage, and the logits with their fp32 copy."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
    per_token = 3 * config.hidden_size + 2 * heads + 3 * config.intermediate_size
    return num_tokens * per_token * dtype_size + num_logits * config.vocab_size * (dtype_size + 8)

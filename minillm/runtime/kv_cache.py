"""How much memory a cache may take, and the cache itself. It knows sizes in bytes, not requests.

One tensor [layers, 2, blocks, kv heads, block size, head size]: a head's slots of a block are contiguous, one
descriptor serves every layer, one copy moves a block in all of them. Block 0 belongs to nobody: padding writes there.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minillm.config import ModelConfig

CPU_CACHE_BYTES = 4 << 30
"""Most that a cache takes on a CPU unless num_kv_blocks asks for more."""
GIB = 1 << 30
MIN_ADVISED_STEP = 64
CONTROL_GROUPS = (  # limit, use, statistics: version 2, then 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def make_kv_cache(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An empty cache. Zeros: no garbage NaN can leak through a masked position.

    On a CPU they come from the system's own zero pages: memory that no token has reached is not taken yet.
    """
    shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_size)
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """What a device can give, in bytes, and what one token of cache costs."""

    memory: int
    """Bytes of which the engine may use a share."""
    utilization: float
    """The share, in (0, 1]."""
    taken: int
    """Bytes of the share that others hold; below 0 for what the engine holds outside of `memory`."""
    weights: int
    activations: int
    """Most that one step of `step_tokens` needs beside weights and cache, block tables included; with CUDA graphs what
    their pool holds as well."""
    bytes_per_token: int
    """Cache of one token, all layers."""
    block_size: int
    step_tokens: int
    smaller_step_tokens: int
    """A step that could be had instead, and what it needs."""
    smaller_activations: int

    @property
    def total(self) -> int:
        """Bytes that the engine may use in all."""
        return int(self.memory * self.utilization) - self.taken

    @property
    def num_tokens(self) -> int:
        """Tokens of cache that fit, in whole blocks, one more block left for the dummy."""
        return self.fitting(self.activations)

    def fitting(self, activations: int) -> int:
        """The same if a step needed `activations`."""
        left = self.total - self.weights - activations
        return max(0, left // (self.bytes_per_token * self.block_size) - 1) * self.block_size

    def explain(self, num_tokens: int, option: str) -> str:
        """Why `num_tokens` of cache, asked for by `option`, do not fit: three numbers, and settings that would do."""
        num_blocks = -(-num_tokens // self.block_size) + 1
        need = self.weights + self.activations + num_blocks * self.block_size * self.bytes_per_token
        advice = []
        if self.num_tokens:
            fitting = self.num_tokens // self.block_size if option == "num_kv_blocks" else self.num_tokens
            advice.append(f"{option}={fitting}")
        if self.smaller_step_tokens >= MIN_ADVISED_STEP and self.fitting(self.smaller_activations) >= num_tokens:
            advice.append(f"max_num_batched_tokens={self.smaller_step_tokens}")
        share = math.ceil(100 * (need + self.taken) / self.memory) / 100
        if share <= 1:
            advice.append(f"gpu_memory_utilization={share}")
        advice.append("a dtype of fewer bytes, a smaller model, or a device with more memory")
        return (
            f"the model does not fit: weights {gib(self.weights)}, activations {gib(self.activations)} in a step of "
            f"{self.step_tokens} tokens, cache {self.bytes_per_token / 1024:.1f} KiB per token. "
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


def control_group_limit(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a container may still use, if one limits this process; file pages that can go count as free."""
    for limit_file, use_file, stat_file in CONTROL_GROUPS:
        try:
            limit, used = (root / limit_file).read_text().strip(), int((root / use_file).read_text())
            stats = dict(line.split() for line in (root / stat_file).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            return max(0, int(limit) - used + int(stats.get("inactive_file", 0)))
    return None


def estimated_activations(config: ModelConfig, num_tokens: int, num_logits: int, dtype_size: int) -> int:
    """Most bytes alive at once in a step: a layer's widest stage, and the logits with their fp32 copy."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
    per_token = 3 * config.hidden_size + 2 * heads + 3 * config.intermediate_size
    return num_tokens * per_token * dtype_size + num_logits * config.vocab_size * (dtype_size + 8)

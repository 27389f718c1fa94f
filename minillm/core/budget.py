"""How many tokens a step may compute, and how much of a prompt is worth a place in it. It knows no requests or blocks.

The hard cap bounds activation memory. While rows decode and somebody reads their tokens as they come, a soft cap bounds
how long they wait; without readers a long step costs nobody anything, and is cheaper than several short ones. The soft
cap is in equivalent tokens: a chunk of n tokens at mean context c costs n * (1 + c / kappa), kappa being the context at
which a token's attention costs as much as its matrices. Few rows of short contexts are used to shorter steps than many
rows, or than rows that read many keys, and their cap is smaller, so that a chunk makes nobody's gap many times the
usual. Decodes come first, as in Sarathi-Serve (Agrawal et al., OSDI 2024, section 4). The first chunk of a step may
pass the soft cap, so that however long its context, the prompt whose turn it is gets on.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from minillm.errors import ConfigError

__all__ = ["Budget", "SchedulerLimits"]

MANY_ROWS = 256
"""Tokens of decodes, drafts among them, from which on a step may take all of the soft cap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """What the scheduler may spend: fixed when the engine starts."""

    max_num_batched_tokens: int
    """Hard cap on the tokens of a step."""
    max_num_seqs: int
    """Rows: most requests that run at once."""
    max_model_len: int
    """Most tokens of a request, prompt and output together."""
    num_kv_blocks: int
    """Blocks of the cache, the dummy block 0 included."""
    block_size: int
    """Tokens per block."""
    soft_cap: int | None = None
    """Equivalent tokens of a step in which rows with readers decode, but for the least first chunk. None: the hard cap
    alone."""
    soft_cap_few: int | None = None
    """The soft cap of a step with hardly any decodes, from which it rises evenly. None: the same for all."""
    many_keys: int | None = None
    """Keys read by a step's decodes, all their contexts together, from which on it may take at least the mean of both
    caps. None: the number of decodes alone decides."""
    attention_equivalence: float = math.inf
    """Kappa: the context, in tokens, at which a token's attention costs as much as its matrices."""
    tile_steps: tuple[int, ...] = ()
    """Good sizes of a step, ascending: the last tokens before the time of a step rises. May be empty."""
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    """False: a prompt runs whole or not at all, under the hard cap alone, which must then hold any prompt."""
    min_chunk_size: int = 16
    """Smallest part of a prompt worth a place in a step, unless it is the rest; see `least_chunk`."""
    max_chunk_size: int | None = None
    """Largest part of a prompt in one step."""
    max_overtakes: int = 8
    """Requests that may be admitted before a head of the queue that waits for memory."""

    def __post_init__(self) -> None:
        for name in ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "block_size", "min_chunk_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_kv_blocks < 2:
            raise ConfigError(f"num_kv_blocks must be at least 2 (one is a dummy), not {self.num_kv_blocks}")
        for name in ("soft_cap", "soft_cap_few", "many_keys", "max_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if not self.attention_equivalence > 0:
            raise ConfigError(f"attention_equivalence must be above 0, not {self.attention_equivalence}")
        if list(self.tile_steps) != sorted(self.tile_steps):
            raise ConfigError("tile_steps must ascend")
        if not self.enable_chunked_prefill:
            self._check_whole_prompts()

    def _check_whole_prompts(self) -> None:
        if self.max_chunk_size is not None:
            raise ConfigError(
                f"max_chunk_size {self.max_chunk_size} means nothing without chunked prefill: leave it out or set "
                f"enable_chunked_prefill"
            )
        if self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"without chunked prefill a step takes a whole prompt: raise max_num_batched_tokens "
                f"{self.max_num_batched_tokens} to max_model_len {self.max_model_len}, lower max_model_len, or set "
                f"enable_chunked_prefill"
            )

    @property
    def num_slots(self) -> int:
        """Tokens that the whole cache holds."""
        return (self.num_kv_blocks - 1) * self.block_size

    @property
    def max_len(self) -> int:
        """Most tokens that a request can come to: the last one needs no slot, as nothing follows it."""
        return min(self.max_model_len, self.num_slots + 1)

    @property
    def least_chunk(self) -> int:
        """`min_chunk_size`, or less: a chunk fits beside decodes that take up to half of the smaller cap."""
        cap = min(self.max_num_batched_tokens, self.soft_cap or self.max_num_batched_tokens)
        return min(self.min_chunk_size, self.max_chunk_size or cap, max(1, cap // 2))

    def soft_cap_of(self, num_decode_tokens: int, num_keys: int) -> float:
        """Equivalent tokens of a step with so many of decodes, which read so many keys; 0 without a soft cap."""
        most = self.soft_cap or 0
        few = min(most, self.soft_cap_few or most)
        of_keys = min(0.5, num_keys / (2 * self.many_keys)) if self.many_keys else 0.0
        return few + (most - few) * min(1.0, max(num_decode_tokens / MANY_ROWS, of_keys))

    def find_fault(self, num_prompt: int, max_tokens: int) -> str | None:
        """Why a request of this size can never be served and what to change, or None."""
        if num_prompt < 1:
            return "the prompt is empty: give at least one token"
        if max_tokens < 1:
            return f"max_tokens must be at least 1, not {max_tokens}"
        if num_prompt >= self.max_model_len:  # without chunked prefill, so is any prompt that is longer than a step
            return (
                f"the prompt has {num_prompt} tokens, which leaves no room to generate within max_model_len "
                f"{self.max_model_len}: shorten the prompt or raise max_model_len"
            )
        if num_prompt > self.num_slots:
            return (
                f"the prompt has {num_prompt} tokens and the KV cache holds {self.num_slots}: shorten the prompt or "
                f"raise num_kv_blocks or gpu_memory_utilization"
            )
        return None


class Budget:
    """What one step has left after `num_decode_tokens` of running decodes, which read `num_keys` keys."""

    __slots__ = ("_is_soft", "_least_chunk", "_limits", "_num_due", "_soft_room", "_used")

    def __init__(
        self, limits: SchedulerLimits, num_decode_tokens: int, num_keys: int = 0, has_readers: bool = True
    ) -> None:
        self._limits = limits
        self._used = num_decode_tokens
        is_capped = limits.soft_cap is not None and limits.enable_chunked_prefill
        self._is_soft = num_decode_tokens > 0 and has_readers and is_capped
        self._soft_room = limits.soft_cap_of(num_decode_tokens, num_keys) - num_decode_tokens
        self._least_chunk = limits.least_chunk
        self._num_due = self._least_chunk  # tokens due to the first chunk, whatever the soft cap has left

    @property
    def is_spent(self) -> bool:
        """Whether not even one more token fits."""
        is_soft_spent = self._is_soft and self._soft_room < 1 and not self._num_due
        return is_soft_spent or self._used >= self._limits.max_num_batched_tokens

    def chunk_size(self, start: int, num_owed: int) -> int:
        """Tokens to compute now of a prompt that owes `num_owed` from position `start`; 0 if too few fit.

        Until one is spent, only the hard cap can refuse a chunk.

        As few chunks as fit, and those of equal size: 1,000 tokens where 256 fit are four times 250. While rows decode,
        the step is filled up to the edge of a tile step.
        """
        limits, used = self._limits, self._used
        room = limits.max_num_batched_tokens - used
        if not limits.enable_chunked_prefill:
            return num_owed if num_owed <= room else 0
        if limits.max_chunk_size is not None:
            room = min(room, limits.max_chunk_size)
        if self._is_soft:
            room = self._cut(min(room, max(self._max_soft_chunk(start), self._num_due)))
        if num_owed <= room:
            return num_owed
        if room < self._least_chunk:
            return 0
        num_chunks = -(-num_owed // room)
        size = max(-(-num_owed // num_chunks), self._least_chunk)
        return min(self._fill(size, room), num_owed)

    def spend(self, start: int, count: int) -> None:
        """Account for a chunk of `count` tokens from position `start`."""
        self._used += count
        self._num_due = 0
        self._soft_room -= count * (1 + (start + count / 2) / self._limits.attention_equivalence)

    def _max_soft_chunk(self, start: int) -> int:
        """Largest n with n * (1 + (start + n / 2) / kappa) within the soft room."""
        room, kappa = self._soft_room, self._limits.attention_equivalence
        if room < 1:
            return 0
        if math.isinf(kappa):
            return int(room)
        linear = kappa + start
        # The positive root of n^2 / 2 + linear * n = kappa * room, in the form that subtracts nothing.
        return int(2 * kappa * room / (linear + math.sqrt(linear * linear + 2 * kappa * room)))

    def _cut(self, room: int) -> int:
        """`room`, cut so that the step ends at the last tile step within it that still fits a chunk."""
        steps = self._limits.tile_steps
        at = bisect_right(steps, self._used + room)
        cut = steps[at - 1] - self._used if at else 0
        return cut if cut >= self._least_chunk else room

    def _fill(self, size: int, room: int) -> int:
        """`size`, raised so that the step ends at a tile step, if one lies within `room`: those tokens are free."""
        if not self._is_soft:
            return size
        steps = self._limits.tile_steps
        at = bisect_left(steps, self._used + size)
        return steps[at] - self._used if at < len(steps) and steps[at] <= self._used + room else size

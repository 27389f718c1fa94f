"""WaitPredictor: how long a request that comes now will wait for its first token, from what the engine did lately.

Owed tokens over tokens per second. Requests rarely use all of max_tokens, so of that only the usual share is owed.
"""

from __future__ import annotations

__all__ = ["WaitPredictor"]

MEMORY = 0.9
"""Weight of the past in a moving average, per second of work and per finished request."""
GUESS = 1.0
"""Seconds to wait while nothing is known."""
MAX_GAP = 1.0
"""Longer pauses between reports are idle time, or a stall."""


class WaitPredictor:
    """Moving averages of the engine's speed and of the share of max_tokens that requests use."""

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        self.used_share = 1.0
        self._last: tuple[float, int] | None = None
        self._seconds = self._tokens = 0.0

    def note_progress(self, now: float, num_computed: int) -> None:
        """The engine had computed `num_computed` tokens since its start at time `now`, and is at work."""
        if self._last is not None and 0 < now - self._last[0] <= MAX_GAP:
            seconds, tokens = now - self._last[0], num_computed - self._last[1]
            kept = MEMORY**seconds
            self._seconds, self._tokens = self._seconds * kept + seconds, self._tokens * kept + tokens
            if self._tokens > 0:
                self.tokens_per_second = self._tokens / self._seconds
        self._last = now, num_computed

    def note_finished(self, num_output: int, max_tokens: int) -> None:
        """A request ended by itself after `num_output` tokens."""
        self.used_share = MEMORY * self.used_share + (1 - MEMORY) * min(1.0, num_output / max_tokens)

    def seconds(self, num_prompt: int, num_output: int) -> float:
        """Time to work off `num_prompt` tokens of prompts and what comes of at most `num_output` tokens of output."""
        if self.tokens_per_second is None:
            return GUESS
        return (num_prompt + self.used_share * num_output) / self.tokens_per_second

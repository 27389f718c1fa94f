"""How long prompts and outputs are: fixed, uniform, or as in two traces that the papers use. It knows no tokens.

`sharegpt` has the quantiles of openchat_sharegpt4 (Sarathi-Serve, Agrawal et al., OSDI 2024, table 2; the finer ones
are those of the trace file), `arxiv` the median and 90th percentile of arxiv_summarization (same table), log-normal.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping
from types import MappingProxyType

from minillm.errors import ConfigError

__all__ = ["TRACES", "Draw", "length_of"]

Draw = Callable[[random.Random], int]
"""A length, in tokens, for a source of chance."""

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
SHAREGPT_PROMPT = (1, 12, 29, 74, 580, 1730, 3734, 5696, 6563, 7434, 8141)
SHAREGPT_OUTPUT = (1, 6, 44, 84, 228, 415, 628, 834, 920, 998, 1024)
P90 = 1.2816
"""Standard deviations from the median to the 90th percentile."""


def between_quantiles(values: tuple[int, ...]) -> Draw:
    """Lengths with these QUANTILES, evenly spread between two of them."""

    def draw(rng: random.Random) -> int:
        share = rng.random()
        at = bisect_right(QUANTILES, share) - 1
        part = (share - QUANTILES[at]) / (QUANTILES[at + 1] - QUANTILES[at])
        return round(values[at] + part * (values[at + 1] - values[at]))

    return draw


def log_normal(median: float, p90: float, most: int) -> Draw:
    """Lengths with this median and 90th percentile, from 1 to `most`."""
    spread = math.log(p90 / median) / P90
    return lambda rng: min(most, max(1, round(median * math.exp(spread * rng.gauss(0, 1)))))


def length_of(text: str, name: str) -> Draw:
    """Lengths as an option has them: `128` is fixed, `100:1024` uniform. Raises ConfigError.

    >>> length_of("128", "input_len")(random.Random(0))
    128
    """
    low, _, high = text.partition(":")
    high = high or low
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high) <= 2**24):
        raise ConfigError(f"{name} must be a number of tokens, or two of them as 100:1024, not {text[:40]!r}")
    return lambda rng: rng.randint(int(low), int(high))


TRACES: Mapping[str, tuple[Draw, Draw]] = MappingProxyType(
    {
        "sharegpt": (between_quantiles(SHAREGPT_PROMPT), between_quantiles(SHAREGPT_OUTPUT)),
        "arxiv": (log_normal(7059, 12985, 16384), log_normal(208, 371, 2048)),
    }
)
"""Prompt and output lengths by the trace's name."""

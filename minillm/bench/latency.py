"""From requests as a client saw them to latencies and throughput, under the names of `vllm bench serve`.

TTFT, E2EL: from sending to the first and to the last chunk. TPOT: mean time per output token after the first, one value
per request. ITL: every gap between two chunks, of all requests together. Goodput: requests a second that met all goals.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minillm.errors import ConfigError

__all__ = ["METRICS", "Outcome", "figures_of", "goals_of", "values_of"]

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(slots=True)
class Outcome:
    """One request: seconds of the client's clock, and tokens."""

    num_input: int
    sent: float
    chunk_times: list[float] = field(default_factory=list)
    num_output: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Time to the first chunk."""
        return self.chunk_times[0] - self.sent

    @property
    def e2el(self) -> float:
        """Time to the last chunk."""
        return self.chunk_times[-1] - self.sent

    @property
    def tpot(self) -> float:
        """Mean time per output token after the first; 0 if there is no other."""
        return (self.e2el - self.ttft) / (self.num_output - 1) if self.num_output > 1 else 0.0

    @property
    def itl(self) -> list[float]:
        """Gaps between chunks."""
        return [b - a for a, b in zip(self.chunk_times, self.chunk_times[1:], strict=False)]


def goals_of(texts: Sequence[str]) -> dict[str, float]:
    """Goals given as `ttft:500`, in milliseconds, as seconds by metric. Raises ConfigError."""
    goals = {}
    for text in texts:
        name, _, limit = text.partition(":")
        try:
            goals[name] = float(limit) / 1e3
        except ValueError:
            goals[name] = math.nan
        if name not in ("ttft", "tpot", "e2el") or not goals[name] > 0:
            raise ConfigError(f"goodput takes ttft, tpot or e2el and milliseconds, as ttft:500, not {text[:40]!r}")
    return goals


def values_of(done: Sequence[Outcome], metric: str) -> list[float]:
    """A metric's values in seconds. A request of one token has no TPOT."""
    if metric == "itl":
        return [gap for outcome in done for gap in outcome.itl]
    return [getattr(outcome, metric) for outcome in done if metric != "tpot" or outcome.num_output > 1]


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` percent of the ordered ones lie, between neighbours linearly (as numpy's).

    >>> percentile([1.0, 2.0, 4.0], 75)
    3.0
    """
    place = share / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def figures_of(
    outcomes: Sequence[Outcome], percentiles: Sequence[float], goals: Mapping[str, float]
) -> dict[str, float | int | None]:
    """All figures; times in milliseconds, rates per second from the first request's sending to the last one's end."""
    done = [outcome for outcome in outcomes if not outcome.error]
    start = min((outcome.sent for outcome in outcomes), default=0.0)
    duration = max((outcome.chunk_times[-1] for outcome in done), default=start) - start or math.nan
    num_input, num_output = sum(o.num_input for o in done), sum(o.num_output for o in done)
    num_good = sum(all(getattr(o, name) <= limit for name, limit in goals.items()) for o in done)
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration,
        "request_goodput": num_good / duration if goals else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "max_output_tokens_per_s": max(tokens_by_second(done, start).values(), default=0.0),
        "max_concurrent_requests": most_at_once(done),
    }
    for metric in METRICS:
        values = sorted(1e3 * value for value in values_of(done, metric))
        if values:
            figures[f"mean_{metric}_ms"] = statistics.fmean(values)
            figures[f"median_{metric}_ms"] = statistics.median(values)
            figures[f"std_{metric}_ms"] = statistics.pstdev(values)
            figures |= {f"p{share:g}_{metric}_ms": percentile(values, share) for share in percentiles}
    # JSON has no number for what cannot be said.
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in figures.items()}


def tokens_by_second(done: Sequence[Outcome], start: float) -> Counter[int]:
    """Output tokens in each second since `start`; those of a request are shared out evenly among its chunks."""
    tokens: Counter[int] = Counter()
    for outcome in done:
        for time in outcome.chunk_times:
            tokens[int(time - start)] += outcome.num_output / len(outcome.chunk_times)  # type: ignore[assignment]
    return tokens


def most_at_once(done: Sequence[Outcome]) -> int:
    """Most requests under way at one time."""
    changes = sorted([(o.sent, 1) for o in done] + [(o.chunk_times[-1], -1) for o in done])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most

"""Histograms of requests and steps, with vLLM's bounds, counted when a request ends or a step is planned.

It knows no exporter and no ids: a histogram is bounds, counts and a sum.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from minillm.types import FinishReason, Timings

__all__ = ["Figures", "Histogram"]

TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
# vLLM's begin at 10 ms: a small model's tokens come faster than that.
ITL = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = tuple(float(2**n) for n in (0, *range(3, 15)))
NUM_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))

DOCS = {
    "time_to_first_token_seconds": "Time from arrival to the first token.",
    "inter_token_latency_seconds": "Every gap between two tokens of a request.",
    "request_time_per_output_token_seconds": "Mean time per output token of a request, after the first.",
    "e2e_request_latency_seconds": "Time from arrival to the end.",
    "request_queue_time_seconds": "Time from arrival to the first step.",
    "request_prefill_time_seconds": "Time from the first step to the first token.",
    "request_decode_time_seconds": "Time from the first token to the last.",
    "request_inference_time_seconds": "Time from the first step to the last token.",
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Output tokens of a request, with those computed before a stop string was seen.",
    "request_params_max_tokens": "Output tokens that a request allowed.",
    "request_num_preemptions": "How often a request lost its KV blocks.",
    "iteration_tokens_total": "Tokens that a step computed.",
}


class Histogram:
    """How many values lie at or below each bound, and above the last."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(map(float, bounds))
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_all(self, values: np.ndarray) -> None:
        """Count many."""
        places = np.bincount(np.searchsorted(self.bounds, values), minlength=len(self.counts))
        self.counts = [a + b for a, b in zip(self.counts, places.tolist(), strict=True)]
        self.sum += float(values.sum())

    def as_dict(self) -> dict[str, Any]:
        """Bounds, counts of values between them, and their sum."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}


class Figures:
    """The histograms of one engine by name, without a prefix, and how requests ended."""

    def __init__(self) -> None:
        bounds_of: dict[str, tuple[float, ...]]
        bounds_of = {name: LATENCY for name in DOCS if name.endswith("_seconds")}
        bounds_of |= {name: NUM_TOKENS for name in DOCS if name.endswith("_tokens")}
        bounds_of |= {"time_to_first_token_seconds": TTFT, "iteration_tokens_total": STEP_TOKENS}
        bounds_of |= {name: ITL for name in ("inter_token_latency_seconds", "request_time_per_output_token_seconds")}
        bounds_of |= {"request_num_preemptions": (0.0, 1.0, 2.0, 5.0, 10.0)}
        self.histograms = {name: Histogram(bounds_of[name]) for name in DOCS}
        self.num_ended: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})

    def note_step(self, num_tokens: int) -> None:
        """A step was planned."""
        self.histograms["iteration_tokens_total"].observe(num_tokens)

    def note_end(self, timings: Timings, max_tokens: int, reason: FinishReason) -> None:
        """A request ended. One that was never planned or got no token counts where it has a figure."""
        self.num_ended[reason.value] += 1
        times, first_planned = timings.token_times, timings.first_planned
        assert timings.finished is not None
        values: dict[str, float] = {
            "e2e_request_latency_seconds": timings.finished - timings.arrival,
            "request_prompt_tokens": timings.num_prompt_tokens,
            "request_generation_tokens": len(times),
            "request_params_max_tokens": max_tokens,
            "request_num_preemptions": timings.num_preemptions,
        }
        if first_planned is not None:
            values["request_queue_time_seconds"] = first_planned - timings.arrival
        if first_planned is not None and times:
            values["time_to_first_token_seconds"] = times[0] - timings.arrival
            values["request_prefill_time_seconds"] = times[0] - first_planned
            values["request_decode_time_seconds"] = times[-1] - times[0]
            values["request_inference_time_seconds"] = times[-1] - first_planned
        if len(times) > 1:
            values["request_time_per_output_token_seconds"] = (times[-1] - times[0]) / (len(times) - 1)
            self.histograms["inter_token_latency_seconds"].observe_all(np.diff(times))
        for name, value in values.items():
            self.histograms[name].observe(value)

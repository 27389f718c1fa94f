"""What answers have in common: usage, timings, model and id. It knows no endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minillm.server.service import Choice
from minillm.types import Timings

__all__ = ["timings_of", "usage_of", "with_timings"]


def timings_of(timings: Timings) -> dict[str, Any]:
    """Where a completion's time went: seconds, and counts of tokens, steps and preemptions."""
    first = timings.token_times[0] if timings.token_times else None
    planned, finished = timings.first_planned, timings.finished
    return {
        "queue_seconds": difference(timings.arrival, planned if planned is not None else finished),
        "prefill_seconds": difference(planned, first),
        "decode_seconds": difference(first, finished),
        "total_seconds": difference(timings.arrival, finished),
        "ttft_seconds": difference(timings.arrival, first),
        "prompt_tokens": timings.num_prompt_tokens,
        "cached_tokens": timings.num_cached_tokens,
        "output_tokens": len(timings.token_times),
        "chunks": timings.num_chunks,
        "preemptions": timings.num_preemptions,
        "steps": timings.num_steps,
        "tokens_beside": timings.num_tokens_beside,
    }


def difference(start: float | None, end: float | None) -> float | None:
    """Seconds between two times, to the microsecond; None if one never came."""
    return None if start is None or end is None else round(end - start, 6)


def slowest(choices: Sequence[Choice]) -> Timings:
    """The timings of the completion that ended last."""
    return max((choice.timings for choice in choices), key=lambda timings: timings.finished or 0.0)


def usage_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of all completions; a prompt with several completions counts once."""
    prompts = {id(choice.prompt): choice for choice in reversed(choices)}  # the first of each computed its prompt
    num_prompt = sum(len(choice.prompt) for choice in prompts.values())
    num_output = sum(len(choice.token_ids) for choice in choices)
    num_cached = sum(c.timings.num_cached_tokens for c in prompts.values() if c.stream.ending is not None)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def with_timings(value: dict[str, Any], choices: Sequence[Choice]) -> dict[str, Any]:
    """An answer with the timings of its slowest completion."""
    return value | {"timings": timings_of(slowest(choices))}

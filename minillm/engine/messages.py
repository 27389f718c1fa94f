"""What crosses between a front end and its engine, whether that is a thread or a process: plain values alone.

    front end -> engine   Submission, or the key of a request and why it ends, or a query
    engine -> front end   Report: what one turn of the loop gave, as columns

The front end chooses the keys. Times are seconds of the machine's monotonic clock, which processes share.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minillm.core.plan import ints
from minillm.types import FinishReason, SamplingParams, Timings, TokenScore


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request for the engine: token ids and how to go on from them, in one completion or `params.n`."""

    key: int
    """Of the first completion; those of the others follow it."""
    prompt: list[int]
    params: SamplingParams
    arrival: float
    priority: int = 0
    """Lower is served first."""
    user: str = ""
    """Users of one priority get equal shares of tokens."""
    salt: bytes = b""
    """Cached prefixes are shared only under an equal salt."""
    is_streamed: bool = True
    """Whether somebody reads its tokens as they come."""

    @property
    def keys(self) -> range:
        """Of all its completions."""
        return range(self.key, self.key + self.params.n)


class Ending(NamedTuple):
    """A request ended. `number` is the engine's, 0 if the request never reached it."""

    key: int
    reason: FinishReason
    timings: Timings
    number: int
    error: str = ""


class Load(NamedTuple):
    """What the engine has to do at this moment."""

    num_steps: int = 0
    """Results applied since the engine started."""
    num_running: int = 0
    num_waiting: int = 0
    """Requests without a row, in the fair queue or the scheduler's."""
    kv_usage: float = 0.0
    """Share of the cache's blocks that requests hold."""
    num_computed: int = 0
    """Tokens computed since the engine started."""


@dataclass(slots=True, kw_only=True)
class Report:
    """What one turn gave. `keys[i]` gained the next `counts[i]` of `tokens`."""

    load: Load
    keys: array[int] = field(default_factory=ints)
    counts: array[int] = field(default_factory=ints)
    tokens: array[int] = field(default_factory=ints)
    endings: list[Ending] = field(default_factory=list)
    scores: list[tuple[int, list[TokenScore]]] = field(default_factory=list)
    """By key: of the tokens gained, if their logprobs were asked for."""
    prompt_scores: list[tuple[int, list[TokenScore | None]]] = field(default_factory=list)
    """By key, with the first token: of the prompt's tokens, if their logprobs were asked for."""
    answers: list[tuple[int, Any]] = field(default_factory=list)
    """Queries by number, and their plain answers."""
    failure: str = ""
    """Why the engine stopped for good."""

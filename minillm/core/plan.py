"""The two values that cross between scheduler and runner: StepPlan down, StepResult up.

A plan is columns, not objects, and deltas, not copies: it costs microseconds to build and travels as bytes.
Neither is changed once made. This module knows nothing of tensors, clocks or policies.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


def ints() -> array[int]:
    """An empty column."""
    return array("i")


class RowEdits(NamedTuple):
    """What changes a row's logits before a token is drawn from them. Tokens and lengths in ids and positions."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    biases: tuple[tuple[int, float], ...] = ()  # (token, what its logit gains), each token once
    allowed: tuple[int, ...] | None = None  # None: all tokens
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the output must not hold
    num_prompt: int = 0  # leading tokens that are no output
    min_len: int = 0  # tokens, prompt included, before which no stop token is drawn
    stop_token_ids: tuple[int, ...] = ()
    has_grammar: bool = False  # masks of what may come next follow each plan that samples


class RowParams(NamedTuple):
    """Sampling parameters of a row, as the device keeps them."""

    temperature: float
    top_k: int  # 0: off
    top_p: float
    min_p: float
    seed: int  # 0 .. 2**63 - 1
    edits: RowEdits | None = None  # None: its logits stay as they are
    num_logprobs: int = -1  # likeliest tokens to report beside each sampled one, and its own logprob; -1: neither
    num_prompt_logprobs: int = -1  # the same for each token of the prompt but the first

    @property
    def needs_tokens(self) -> bool:
        """Whether the device must know the row's tokens."""
        return self.edits is not None or self.num_prompt_logprobs >= 0


class Seat(NamedTuple):
    """A row gets a request: the row's whole device state is replaced."""

    row: int
    request: int
    blocks: array[int]
    params: RowParams
    tokens: array[int] | None = None  # all that are known, if the parameters need them


class Wait(NamedTuple):
    """Why the head of the queue was not planned: 'budget', 'blocks' or 'rows', and behind whom."""

    request: int
    reason: str
    behind: tuple[int, ...]


class Work(NamedTuple):
    """One planned row, for tests and readers."""

    request: int
    row: int
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    num_logits: int
    num_samples: int
    tokens: tuple[int, ...]


@dataclass(slots=True)
class StepPlan:
    """What one step does. Each column has one entry per planned row unless said otherwise."""

    step: int
    """Number of the step; a result names the step it answers."""
    requests: array[int] = field(default_factory=ints)
    """Request numbers, never reused (rows are): results, log, timeline and replay go by these."""
    rows: array[int] = field(default_factory=ints)
    """Seats in device state, 1 to max_num_seqs; row 0 is a dummy."""
    starts: array[int] = field(default_factory=ints)
    """Position of the first token computed."""
    counts: array[int] = field(default_factory=ints)
    """Tokens computed: a chunk, one decode, or one token plus its drafts. Always > 0."""
    num_logits: array[int] = field(default_factory=ints)
    """Trailing positions that need logits."""
    num_samples: array[int] = field(default_factory=ints)
    """Trailing positions to sample: 0 inside a prompt, 1 + drafts at its end."""
    num_tokens: array[int] = field(default_factory=ints)
    """How many of `tokens` are this row's: `counts`, or 0 if the device has its one token (the row's last sample)."""
    tokens: array[int] = field(default_factory=ints)
    """Token ids of all rows, flat, in row order."""
    freed: array[int] = field(default_factory=ints)
    """Rows whose request is gone. Changes of device state apply before the pass: freed, seats, blocks, copies."""
    seats: tuple[Seat, ...] = ()
    """Rows that get a request."""
    blocks: array[int] = field(default_factory=ints)
    """Flat (row, index, block) triples: block-table entries appended or replaced."""
    copies: array[int] = field(default_factory=ints)
    """Flat (from block, to block) pairs: KV blocks copied in every layer."""
    waits: tuple[Wait, ...] = ()
    """Why the head of the queue was not planned."""

    @property
    def num_batched_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(self.counts)

    def works(self) -> Iterator[Work]:
        """The plan row by row."""
        at = 0
        for i, request in enumerate(self.requests):
            tokens = tuple(self.tokens[at : at + self.num_tokens[i]])
            at += self.num_tokens[i]
            yield Work(
                request, self.rows[i], self.starts[i], self.counts[i], self.num_logits[i], self.num_samples[i], tokens
            )


@dataclass(slots=True)
class Logprobs:
    """Logprobs of tokens by the model's own logits, before edits, temperature and filters; one entry per token.

    Of tokens sampled in rows with `num_logprobs`, and of prompts' tokens. The likeliest tokens of entry i, in their
    order, lie at offsets[i] to offsets[i + 1].
    """

    requests: array[int]
    positions: array[int]
    """Of the token in its request."""
    tokens: array[int]
    logprobs: array[float]
    ranks: array[int]
    """1 plus the number of likelier tokens."""
    offsets: array[int]
    top_tokens: array[int]
    top_logprobs: array[float]


@dataclass(slots=True)
class StepResult:
    """What one step gave, in the order of the plan's rows."""

    step: int
    counts: array[int]
    """Tokens gained per planned row: 0 inside a prompt, 1, or 1 + accepted drafts."""
    tokens: array[int]
    """The gained tokens, flat, in row order."""
    failed: array[int] = field(default_factory=ints)
    """Indices of planned rows whose logits were not finite."""
    logprobs: Logprobs | None = None
    """None: no row asked for them."""
    seconds: float = 0.0
    """Time of the step on the device."""

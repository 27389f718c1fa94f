"""Speculation beside the scheduler: before a step it gives requests drafts, after it notes which held.

It reads requests and step results and writes `Request.drafts`, nothing else: whatever it proposes, the verification
keeps the output as it would be without. It knows no tensors and no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from minillm.core.plan import StepPlan, StepResult
from minillm.core.request import Request
from minillm.decoding.controller import DraftPolicy

__all__ = ["Drafter", "Speculator", "Verified"]


class Drafter(Protocol):
    """Whoever guesses."""

    def has_guess(self, request: Request) -> bool:
        """Whether the tokens read make it likely that it would have one for this request now."""

    def propose(self, wanted: Mapping[Request, int]) -> Mapping[Request, list[int]]:
        """Guesses at each request's next tokens, at most as many as wanted; a request may be left out."""

    def go_on(self) -> None:
        """The device has the step that verifies the last guesses: time to guess what follows them."""

    def forget(self, request: Request) -> None:
        """The request ended."""


class Verified(NamedTuple):
    """What became of one request's drafts in one step."""

    request: int
    num_drafts: int
    num_accepted: int


class Speculator:
    """One engine's drafts. A step that drafts is planned when all before it are read: the drafter knows every token."""

    def __init__(self, drafter: Drafter, policy: DraftPolicy, max_step_tokens: int) -> None:
        """`max_step_tokens`: positions that a step may sample, drafts and the decodes beside them together."""
        self.drafter, self.policy = drafter, policy
        self._max_step_tokens = max_step_tokens
        self._num_rows = 0
        self._since: float | None = None

    @property
    def is_on(self) -> bool:
        """Whether the next step is to draft: it depends on the last step's size and on what drafts brought so far."""
        return self.policy.is_on(self._num_rows) and 2 * self._num_rows <= self._max_step_tokens

    def has_guess(self, requests: Iterable[Request]) -> bool:
        """Whether it is worth waiting for the step in flight, to draft for one of those that decode."""
        decoding = (request for request in requests if request.row and request.num_output + request.num_unknown)
        return any(self.drafter.has_guess(request) for request in decoding)

    def propose(self, requests: Iterable[Request]) -> None:
        """Give drafts to those of `requests` that decode; none of theirs may be in flight."""
        ready = [request for request in requests if request.is_decoding]
        num_left = self._max_step_tokens - len(ready)
        wanted: dict[Request, int] = {}
        for request in ready:
            request.drafts = []
            num_useful = request.max_len - len(request.tokens) - 1  # the last token of all is sampled, not drafted
            num = min(self.policy.num_drafts(request.number, len(ready)), num_useful, num_left)
            if num > 0:
                wanted[request] = num
                num_left -= num
        for request, drafts in self.drafter.propose(wanted).items():
            request.drafts = drafts

    def note(self, plan: StepPlan, result: StepResult, was_on: bool, now: float) -> list[Verified]:
        """Learn from a result that came at `now`, seconds; what became of each request's drafts."""
        num_rows, since = len(plan.requests), self._since
        self._num_rows, self._since = num_rows, now
        if since is not None and plan.num_samples == plan.counts:
            self.policy.note_step(num_rows, sum(result.counts), now - since, was_on)
        verified = [
            Verified(number, num_samples - 1, gained - 1)
            for number, num_samples, gained in zip(plan.requests, plan.num_samples, result.counts, strict=True)
            if num_samples > 1
        ]
        for each in verified:
            self.policy.note_row(*each)
        return verified

    def rest(self) -> None:
        """Nothing is left to do: the time until the next result is no step's."""
        self._since = None

    def forget(self, request: Request) -> None:
        """The request ended."""
        self.drafter.forget(request)
        self.policy.forget(request.number)

"""Grammars of running requests: after each plan, the masks of what those that sample may choose. It knows no tensors.

It stands where the loop sees the runner: `submit` enqueues the pass, computes the masks while the device is busy, and
hands them in. Rows with a grammar are closed, so their tokens are known by then; drafts get masks of their own.
"""

from __future__ import annotations

from minillm.core.plan import StepPlan
from minillm.core.request import Request
from minillm.engine.loop import PendingStep, Submitter
from minillm.text.grammar import Matcher, fill_masks

__all__ = ["GrammarRunner"]


class GrammarRunner:
    """A runner that gives its steps the masks that they wait for."""

    def __init__(self, runner: Submitter, vocab_size: int) -> None:
        self._runner, self._vocab_size = runner, vocab_size
        self._matchers: dict[int, tuple[Request, Matcher]] = {}
        self._num_matched: dict[int, int] = {}

    def add(self, request: Request, matcher: Matcher) -> None:
        """Hold `request`'s output to a grammar."""
        self._matchers[request.number] = request, matcher
        self._num_matched[request.number] = request.num_prompt

    def drop(self, number: int) -> None:
        """Forget a request, which may have no grammar."""
        if self._matchers.pop(number, None) is not None:
            del self._num_matched[number]

    def submit(self, plan: StepPlan) -> PendingStep:
        """Enqueue a step and, if it waits for them, its masks."""
        pending = self._runner.submit(plan)
        if self._matchers:
            entries, end = [], 0
            for number, num_tokens, num_samples in zip(plan.requests, plan.num_tokens, plan.num_samples, strict=True):
                end += num_tokens
                if num_samples and number in self._matchers:
                    entries.append((self._advanced(number), list(plan.tokens[end - num_samples + 1 : end])))
            if entries:
                pending.mask(fill_masks(entries, self._vocab_size))
        return pending

    def _advanced(self, number: int) -> Matcher:
        """A request's matcher, past all tokens that were read."""
        request, matcher = self._matchers[number]
        new = list(request.tokens[self._num_matched[number] :])
        self._num_matched[number] = len(request.tokens)
        if new:
            matcher.consume_tokens(new)
        return matcher

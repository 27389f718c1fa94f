"""What a request's callers see of it: Generation, its logprobs, and the further completions of its prompt.

It knows no text and no steps.
"""

from __future__ import annotations

from minillm.core.plan import Logprobs
from minillm.core.request import Request
from minillm.types import FinishReason, SamplingParams, Timings, TokenScore

__all__ = ["Generation", "note_logprobs"]


class Generation:
    """A request as the engine's callers see it: its tokens so far, its end, its times."""

    __slots__ = (
        "_num_taken",
        "before",
        "params",
        "prompt_scores",
        "request",
        "scores",
        "siblings",
        "timings",
        "waiting",
    )

    def __init__(self, request: Request, params: SamplingParams) -> None:
        self.request, self.params = request, params
        self.timings = Timings(arrival=request.arrival, num_prompt_tokens=request.num_prompt)
        self.before: tuple[int, int] | None = None
        """Steps, and tokens computed in them, before the one that first seated it."""
        self.scores: list[TokenScore] = []
        """Of the output tokens, if their logprobs were asked for."""
        self.prompt_scores: list[TokenScore | None] = []
        """Of the prompt's tokens, the first aside, if their logprobs were asked for."""
        if params.prompt_logprobs is not None:
            self.prompt_scores = [None] * request.num_prompt
        self.siblings: list[Generation] = []
        """The further completions of its prompt."""
        self.waiting: list[Generation] = []
        """Those of them that wait for the prompt to be computed, to share its blocks."""
        self._num_taken = request.num_prompt

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended, or None."""
        return self.request.finish_reason

    def take_new_tokens(self) -> list[int]:
        """Output tokens that were not taken before."""
        tokens = list(self.request.tokens[self._num_taken :])
        self._num_taken += len(tokens)
        return tokens

    def note_tokens(self, now: float) -> bool:
        """Note that its new tokens arrived `now`; whether there is more to note: it was prefilled, or it ended."""
        request, timings = self.request, self.timings
        num_new = len(request.tokens) - request.num_prompt - len(timings.token_times)
        timings.token_times.extend([now] * num_new)
        return request.num_chunks != timings.num_chunks or request.finish_reason is not None

    def note(self, now: float, num_steps: int, num_computed: int) -> None:
        """Copy times and counts from the request; `now` is when its new tokens arrived.

        `num_steps` steps were applied so far and computed `num_computed` tokens, those of other requests included.
        """
        self.note_tokens(now)
        request, timings = self.request, self.timings
        timings.first_planned = request.first_planned
        timings.num_cached_tokens = request.num_cached_tokens
        timings.num_chunks = request.num_chunks
        timings.num_preemptions = request.num_preemptions
        if self.before is not None:
            timings.num_steps = num_steps - self.before[0]
            num_own = request.num_prompt - request.num_cached_tokens + max(0, request.num_output - 1)
            num_own += timings.num_drafts - timings.num_accepted_drafts
            timings.num_tokens_beside = max(0, num_computed - self.before[1] - num_own)
        if request.finish_reason is not None:
            timings.finished = now


def note_logprobs(live: dict[int, Generation], columns: Logprobs) -> None:
    """Give each generation the scores of tokens that it has; those of results that were void name none that it has."""
    offsets = columns.offsets
    for i, number in enumerate(columns.requests):
        generation = live.get(number)
        position = columns.positions[i]
        if generation is None or position >= len(generation.request.tokens):
            continue
        top = slice(offsets[i], offsets[i + 1])
        score = TokenScore(
            columns.tokens[i],
            columns.logprobs[i],
            columns.ranks[i],
            tuple(zip(columns.top_tokens[top], columns.top_logprobs[top], strict=True)),
        )
        num_prompt = generation.request.num_prompt
        if position < num_prompt:
            generation.prompt_scores[position] = score
        elif position - num_prompt == len(generation.scores):
            generation.scores.append(score)

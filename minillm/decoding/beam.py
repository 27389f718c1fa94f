"""Beam search on the scheduler: the k likeliest continuations of a prompt, each a request with a row of its own.

    a round:   | every member's likeliest next tokens are here |  ->  the k best pairs (member, token) go on
    member with one successor      goes on in place
    member with several            one goes on in place, the others in place of members without a successor (or, in the
                                   first round, as forks): they share its full blocks and copy the last

All members have as many tokens; whoever is done with a round is held until the others are. Who goes on is decided as
transformers decides it. It reads results and changes requests between steps; it knows no tensors and no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from minillm.core.request import Request
from minillm.core.scheduler import Scheduler
from minillm.types import BeamSearchParams, FinishReason

__all__ = ["BeamSearch", "Candidate", "Finished", "Hypotheses"]


class Candidate(NamedTuple):
    """A token that may follow, and its logprob."""

    token: int
    logprob: float


class Finished(NamedTuple):
    """A complete hypothesis; the score is its logprob over its length to the power of length_penalty."""

    score: float
    logprob: float
    tokens: tuple[int, ...]


class Successor(NamedTuple):
    """A continuation: the logprob of all its tokens, whom it continues, and by what."""

    logprob: float
    parent: int
    token: int


class Hypotheses:
    """The scores of one search, and the rule by which some go on: that of transformers 5, without its tensors."""

    def __init__(self, params: BeamSearchParams, max_tokens: int, stop_token_ids: frozenset[int]) -> None:
        self._params, self._max_tokens, self._stop_token_ids = params, max_tokens, stop_token_ids
        self._logprobs = [0.0]
        self.num_tokens = 0
        """Rounds so far."""
        self.finished: list[Finished] = []
        """The best so far, the best first; at most `beam_width`."""
        self.is_done = False

    @staticmethod
    def num_candidates(beam_width: int, num_stop_tokens: int) -> int:
        """Of each member: even if all its likeliest are ends, as many go on as there are beams."""
        return max(2, 1 + num_stop_tokens) * beam_width

    def advance(self, outputs: Sequence[Sequence[int]], candidates: Sequence[Sequence[Candidate]]) -> list[Successor]:
        """A round: who goes on, the likeliest first; nobody once `is_done`.

        `outputs`, `candidates`: of each member its tokens and its likeliest next ones, in the order of the last round.
        """
        params, width = self._params, self._params.beam_width
        self.num_tokens += 1
        ranked = sorted(
            (
                Successor(self._logprobs[parent] + logprob, parent, token)
                for parent, each in enumerate(candidates)
                for token, logprob in each
            ),
            key=lambda successor: -successor.logprob,
        )[: self.num_candidates(width, len(self._stop_token_ids))]
        ended = [s for s in islice(ranked, width) if self._is_end(s)]
        self._keep_best([self._finish(s, outputs[s.parent]) for s in ended])
        going = [s for s in ranked if not self._is_end(s)][:width]
        self._logprobs = [s.logprob for s in going]
        is_full = len(self.finished) == width
        self.is_done = not going or (is_full and (params.early_stopping is True or not self._can_improve()))
        return [] if self.is_done else going

    def _is_end(self, successor: Successor) -> bool:
        return successor.token in self._stop_token_ids or self.num_tokens >= self._max_tokens

    def _finish(self, successor: Successor, output: Sequence[int]) -> Finished:
        score = successor.logprob / self.num_tokens**self._params.length_penalty
        return Finished(score, successor.logprob, (*output, successor.token))

    def _keep_best(self, new: list[Finished]) -> None:
        self.finished = sorted([*self.finished, *new], key=lambda f: -f.score)[: self._params.beam_width]

    def _can_improve(self) -> bool:
        """Whether the likeliest that goes on may yet beat the worst of those that are finished."""
        penalty = self._params.length_penalty
        is_patient = self._params.early_stopping == "never" and penalty > 0
        length = self._max_tokens if is_patient else self.num_tokens
        best_possible: float = self._logprobs[0] / length**penalty
        return best_possible > self.finished[-1].score


class BeamSearch:
    """One prompt's search. The first member is the prompt's request; all are stepwise and report their candidates."""

    def __init__(
        self,
        scheduler: Scheduler,
        request: Request,
        params: BeamSearchParams,
        stop_token_ids: frozenset[int],
        numbers: Iterator[int],
    ) -> None:
        self._scheduler, self._numbers = scheduler, numbers
        self._num_prompt = request.num_prompt
        self.members = [request]
        self.hypotheses = Hypotheses(params, request.max_len - request.num_prompt, stop_token_ids)
        self._candidates: dict[int, Sequence[Candidate]] = {}
        self.finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        """Rounds so far."""
        return self.hypotheses.num_tokens

    def take(self, request: Request, candidates: Sequence[Candidate]) -> list[Request]:
        """A member's result; once every member's is here, the next round begins. Returns the members that are new."""
        if request.finish_reason is FinishReason.ERROR:
            self.finish(FinishReason.ERROR)
        if self.finish_reason is not None:
            return []
        if request.finish_reason is None:
            self._scheduler.choose(request, None)
        else:  # it came to its last token: the round is the last one
            request.tokens.pop()
        self._candidates[request.number] = candidates
        if len(self._candidates) < len(self.members):
            return []
        outputs = [member.tokens[self._num_prompt :] for member in self.members]
        successors = self.hypotheses.advance(outputs, [self._candidates[member.number] for member in self.members])
        self._candidates.clear()
        if self.hypotheses.is_done:
            self.finish(FinishReason.STOP)
            return []
        return self._branch(successors)

    def finish(self, reason: FinishReason) -> None:
        """End the search and all its members."""
        self.finish_reason = reason
        for member in self.members:
            self._scheduler.finish(member.number, reason)

    def _branch(self, successors: Sequence[Successor]) -> list[Request]:
        before, going = self.members, {successor.parent for successor in successors}
        spare = [member for place, member in enumerate(before) if place not in going]
        after: list[tuple[Request, int]] = []
        new: list[Request] = []
        for _, place, token in successors:
            member = before[place]
            if place in going:
                going.remove(place)  # its first successor; for the next ones another row is needed
            elif spare:
                member = spare.pop()
                self._scheduler.adopt(member, before[place])
            else:
                member = self._fork(member, token)
                new.append(member)
            after.append((member, token))
        for member, token in after:  # nobody gets longer before everybody has what was computed
            if member not in new:
                self._scheduler.choose(member, token)
        self.members = [member for member, _ in after]
        return new

    def _fork(self, parent: Request, token: int) -> Request:
        child = Request(
            next(self._numbers),
            [*parent.tokens, token],
            max_tokens=parent.max_len - len(parent.tokens) - 1,
            params=parent.params,
            stop_token_ids=parent.stop_token_ids,
            priority=parent.priority,
            arrival=parent.arrival,
            salt=parent.salt,
            is_stepwise=True,
        )
        self._scheduler.fork(parent, child)
        return child

"""Beam searches beside an engine's other requests: their checks, their members' books, their candidates from results.

How a search goes on is `decoding/beam.py`'s; this module knows no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minillm.core.plan import Logprobs, RowParams, StepResult
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler
from minillm.decoding.beam import BeamSearch, Candidate, Hypotheses
from minillm.engine.info import EngineInfo
from minillm.engine.timeline import Timeline
from minillm.errors import RequestError
from minillm.types import BeamSearchParams, FinishReason, SamplingParams, Timings

__all__ = ["BeamRun", "BeamRuns"]

MAX_CANDIDATES = 1024
"""Likeliest tokens asked for of each member: the device keeps so many of each part of the vocabulary."""


class BeamRun:
    """A search as the engine's callers see it."""

    def __init__(self, search: BeamSearch, stop_token_ids: frozenset[int], timings: Timings) -> None:
        self.search, self.stop_token_ids, self.timings = search, stop_token_ids, timings
        self.numbers: list[int] = []
        """Of all its requests, those that ended included."""

    @property
    def finish_reason(self) -> FinishReason | None:
        """`stop` once its continuations are found; None while it runs."""
        return self.search.finish_reason


class BeamRuns:
    """The searches of one engine."""

    def __init__(self, scheduler: Scheduler, info: EngineInfo, timeline: Timeline, numbers: Iterator[int]) -> None:
        """`numbers`: of requests, those of the engine."""
        self._scheduler, self._info, self._timeline = scheduler, info, timeline
        self._numbers = numbers
        self._live: dict[int, BeamRun] = {}

    def __len__(self) -> int:
        return len(self._live)

    def check(self, prompt: Sequence[int], params: BeamSearchParams) -> None:
        """Raise RequestError if this search can never be done; change nothing."""
        same = SamplingParams(
            max_tokens=params.max_tokens, stop_token_ids=params.stop_token_ids, ignore_eos=params.ignore_eos
        )
        self._info.check(prompt, same)
        limits, width = self._info.limits, params.beam_width
        if width > limits.max_num_seqs:
            raise RequestError(
                f"beam_width {width} takes as many rows and the engine has {limits.max_num_seqs}: lower beam_width or "
                "raise max_num_seqs"
            )
        num_candidates = Hypotheses.num_candidates(width, len(self._stop_token_ids(params)))
        if num_candidates > self._info.vocab_size:
            raise RequestError(
                f"beam_width {width} takes {num_candidates} different tokens and the model has {self._info.vocab_size}"
            )
        if num_candidates > MAX_CANDIDATES:
            raise RequestError(
                f"beam_width {width} and the stop tokens take {num_candidates} candidates a beam and {MAX_CANDIDATES} "
                "are the most: lower beam_width or give fewer stop_token_ids"
            )
        max_len = min(len(prompt) + params.max_tokens, limits.max_len)
        # With a block more each, all members fit at once even if they share nothing: searches that run alone get on.
        num_blocks = width * (-(-max_len // limits.block_size) + 1)
        if num_blocks > limits.num_kv_blocks - 1:
            raise RequestError(
                f"beam_width {width} and up to {max_len} tokens may take {num_blocks} KV blocks and the cache has "
                f"{limits.num_kv_blocks - 1}: lower beam_width or max_tokens, or raise num_kv_blocks"
            )

    def start(
        self, prompt: Sequence[int], params: BeamSearchParams, *, priority: int, salt: bytes, now: float
    ) -> BeamRun:
        """Queue a search that `check` has nothing against."""
        stop_token_ids = self._stop_token_ids(params)
        num_candidates = Hypotheses.num_candidates(params.beam_width, len(stop_token_ids))
        request = Request(
            next(self._numbers),
            prompt,
            max_tokens=params.max_tokens,
            params=RowParams(0.0, 0, 1.0, 0.0, 0, num_logprobs=num_candidates),
            stop_token_ids=frozenset(),
            priority=priority,
            arrival=now,
            salt=salt,
            is_stepwise=True,
        )
        self._scheduler.add(request)
        search = BeamSearch(self._scheduler, request, params, stop_token_ids, self._numbers)
        run = BeamRun(search, stop_token_ids, Timings(arrival=now, num_prompt_tokens=len(prompt)))
        self._enter(run, request, now)
        return run

    def take(self, changed: Sequence[Request], result: StepResult, now: float) -> list[Request]:
        """Give searches the results of their members; the changed requests that are no search's."""
        if not self._live:
            return list(changed)
        candidates = {} if result.logprobs is None else candidates_of(result.logprobs)
        others = []
        for request in changed:
            run = self._live.get(request.number)
            if run is None:
                others.append(request)
            elif run.finish_reason is None:
                self._take(run, request, candidates.get(request.number, ()), now)
        return others

    def finish(self, run: BeamRun, reason: FinishReason, now: float) -> None:
        """End a search and its members; nothing happens if it has ended."""
        if run.finish_reason is None:
            run.search.finish(reason)
            self._leave(run, now)

    def finish_all(self, reason: FinishReason, now: float) -> None:
        """End all searches."""
        for run in {id(run): run for run in self._live.values()}.values():
            self.finish(run, reason, now)

    def _take(self, run: BeamRun, request: Request, candidates: Sequence[Candidate], now: float) -> None:
        timings, num_tokens = run.timings, run.search.num_tokens
        if timings.first_planned is None:
            timings.first_planned, timings.num_cached_tokens = request.first_planned, request.num_cached_tokens
        for new in run.search.take(request, candidates):
            self._enter(run, new, now)
        timings.token_times.extend([now] * (run.search.num_tokens - num_tokens))
        if run.finish_reason is not None:
            self._leave(run, now)

    def _enter(self, run: BeamRun, request: Request, now: float) -> None:
        self._live[request.number] = run
        run.numbers.append(request.number)
        self._timeline.add(request, run.timings, now)

    def _leave(self, run: BeamRun, now: float) -> None:
        run.timings.finished = now
        for number in run.numbers:
            del self._live[number]
            self._timeline.end(number, now)

    def _stop_token_ids(self, params: BeamSearchParams) -> frozenset[int]:
        return frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self._info.eos_token_ids)


def candidates_of(columns: Logprobs) -> dict[int, list[Candidate]]:
    """By request: the likeliest tokens at the last position that it sampled."""
    found = {}
    for i, number in enumerate(columns.requests):
        place = slice(columns.offsets[i], columns.offsets[i + 1])
        found[number] = list(map(Candidate, columns.top_tokens[place], columns.top_logprobs[place]))
    return found

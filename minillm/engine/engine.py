"""The engine: token ids in, token ids out, one step at a time. It joins scheduler and runner and keeps the clock.

It knows no HTTP, no threads, and of text only what bans words and grammars need: whoever calls `step` drives it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from minillm.core.plan import StepPlan
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler
from minillm.decoding.speculator import Speculator, Verified
from minillm.engine.beams import BeamRun, BeamRuns
from minillm.engine.completions import Generation, note_logprobs
from minillm.engine.figures import Figures
from minillm.engine.grammars import GrammarRunner
from minillm.engine.info import EngineInfo
from minillm.engine.loop import Advance, InFlight, StepRunner, overlapped_step, plain_step, settled
from minillm.engine.metrics import Metrics
from minillm.engine.row_params import RowParamsMaker
from minillm.engine.timeline import Timeline
from minillm.errors import EngineError
from minillm.text.grammar import GrammarCompiler
from minillm.text.tokenizer import Tokenizer
from minillm.types import MAX_SEED, BeamSearchParams, FinishReason, SamplingParams, Timings, check_priority

__all__ = ["Engine", "Generation"]


class Engine:
    """Runs requests to their ends. Every accepted request ends exactly once, also when a step fails."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        tokenizer: Tokenizer | None = None,
        overlap: bool = True,
        seed: int = 0,
        speculator: Speculator | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler, self.runner, self.clock = scheduler, runner, clock
        self.speculator = speculator
        self.info = EngineInfo(limits=scheduler.limits, vocab_size=vocab_size, eos_token_ids=tuple(eos_token_ids))
        self.timeline, self.figures = Timeline(scheduler), Figures()
        self._row_params = RowParamsMaker(self.info, tokenizer)
        self._numbers = count(1)  # of requests
        self._beams = BeamRuns(scheduler, self.info, self.timeline, self._numbers)
        self.grammars = GrammarCompiler(tokenizer, vocab_size, eos_token_ids)
        self._masked = GrammarRunner(runner, vocab_size)
        self._metrics = Metrics()
        self._advance: Callable[..., Advance] = overlapped_step if overlap else plain_step
        self._in_flight: InFlight | None = None
        self._is_on = False  # whether drafts were, in the last turn
        self._live: dict[int, Generation] = {}
        self._seeds = random.Random(seed)
        self.num_applied = self.num_computed = 0  # steps, and tokens in them
        self._failure: BaseException | None = None
        self._is_closed = False

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished or a step in flight."""
        return bool(self._live or self._beams) or self._in_flight is not None

    @property
    def metrics(self) -> Metrics:
        """Totals, and the figures of this moment."""
        metrics, scheduler = self._metrics, self.scheduler
        metrics.num_running, metrics.num_waiting = scheduler.num_running, scheduler.num_waiting
        metrics.kv_usage, metrics.kv_utilization = scheduler.kv.usage, scheduler.kv_utilization
        metrics.jit_compiles, metrics.graph_captures = self.runner.num_compiles, self.runner.num_captures
        return metrics

    def live_timings(self) -> list[Timings]:
        """Those of the requests that have not ended."""
        return [generation.timings for generation in self._live.values()]

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError if this request can never be served; change nothing.

        A grammar is compiled here and kept: call it on another thread first, and the loop's finds it ready.
        """
        self.info.check(prompt, params)
        self._row_params.check(params)
        if params.structured_outputs is not None:
            self.grammars.matcher(params.structured_outputs)

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        *,
        arrival: float | None = None,
        salt: bytes = b"",
        is_streamed: bool = True,
        is_checked: bool = False,
    ) -> Generation:
        """Queue a request; a lower `priority` is served first. Further completions are the generation's `siblings`.

        `arrival`: when it came, now if None. `salt`: cached prefixes are shared only under an equal one. `is_streamed`:
        whether somebody reads its tokens as they come, and wants steps to be short. `is_checked`: `check` passed it.
        Raises RequestError, or EngineError once a step has failed or the engine was closed.
        """
        self._check_running()
        check_priority(priority)
        if not is_checked:
            self.check(prompt, params)
        seed = self._seeds.randint(0, MAX_SEED) if params.seed is None else params.seed
        arrival = self.clock() if arrival is None else arrival
        options = {"priority": priority, "arrival": arrival, "salt": salt, "is_streamed": is_streamed}
        first = self._entered(prompt, params, seed, options)
        self.scheduler.add(first.request)
        if params.n > 1:
            single = replace(params, n=1, prompt_logprobs=None)
            for i in range(1, params.n):
                first.siblings.append(self._entered(prompt, single, (seed + i) % (MAX_SEED + 1), options))
            first.waiting = list(first.siblings)
        return first

    def finish(self, generation: Generation, reason: FinishReason) -> None:
        """End a request now, in whatever state it is: a stop string was seen, or its caller went away."""
        request = generation.request
        if request.finish_reason is None:
            if self.scheduler.finish(request.number, reason) is None:
                request.finish_reason = reason  # it waits for its prompt and is not queued
            self._note(generation, self.clock())

    def check_beams(self, prompt: Sequence[int], params: BeamSearchParams) -> None:
        """Raise RequestError if this search can never be done; change nothing."""
        self._beams.check(prompt, params)

    def add_beams(
        self, prompt: Sequence[int], params: BeamSearchParams, priority: int = 0, *, salt: bytes = b""
    ) -> BeamRun:
        """Queue a beam search; `step` advances it. Raises RequestError, EngineError as `add` does."""
        self._check_running()
        check_priority(priority)
        self.check_beams(prompt, params)
        self._metrics.num_requests += 1
        return self._beams.start(prompt, params, priority=priority, salt=salt, now=self.clock())

    def finish_beams(self, run: BeamRun, reason: FinishReason) -> None:
        """End a beam search now, if it has not ended."""
        self._beams.finish(run, reason, self.clock())

    def step(self) -> list[Generation]:
        """One turn of the loop; returns the requests that gained tokens or ended.

        Raises EngineError, with every request ended as `error`, if the step fails.
        """
        try:
            done = self._turn()
        except Exception as failure:
            self._fail(failure)
            raise EngineError(f"a step failed, and all requests with it: {failure}") from failure
        self._in_flight = done.in_flight
        if done.planned is None and done.result is None and self.scheduler.num_running:
            self.scheduler.yield_rows()
        changed, now = [self._live[request.number] for request in done.changed], self.clock()
        for generation in changed:
            if generation.note_tokens(now):
                self._note(generation, now)
        self._count(done)
        return changed

    def drain(self) -> None:
        """Wait for the step in flight if no request is left to wait for it."""
        while self._in_flight is not None and not (self._live or self._beams):
            self.step()  # one that fails leaves none in flight

    def close(self) -> None:
        """End every request, let the step in flight end, and take no more."""
        for generation in list(self._live.values()):
            self.finish(generation, FinishReason.ABORT)
        self._beams.finish_all(FinishReason.ABORT, self.clock())
        self.drain()
        self.grammars.close()
        self._is_closed = True

    def _check_running(self) -> None:
        if self._is_closed:
            raise EngineError("this engine was closed; make another LLM")
        if self._failure is not None:
            raise EngineError(f"the engine stopped: {self._failure}") from self._failure

    def _entered(self, prompt: Sequence[int], params: SamplingParams, seed: int, options: dict[str, Any]) -> Generation:
        """A generation of its own number, not queued yet."""
        request = Request(
            next(self._numbers),
            prompt,
            max_tokens=params.max_tokens,
            params=self._row_params.of(params, len(prompt), seed),
            stop_token_ids=self.info.stop_token_ids(params),
            is_stepwise=params.structured_outputs is not None,
            **options,
        )
        if params.structured_outputs is not None:
            self._masked.add(request, self.grammars.matcher(params.structured_outputs))
        generation = self._live[request.number] = Generation(request, params)
        self.timeline.add(request, generation.timings, self.clock())
        self._metrics.num_requests += 1
        return generation

    def _count_applied(self, plan: StepPlan) -> None:
        for seat in plan.seats:
            generation = self._live.get(seat.request)
            if generation is not None and generation.before is None:
                generation.before = self.num_applied, self.num_computed
        self.num_applied += 1
        self.num_computed += plan.num_batched_tokens

    def _turn(self) -> Advance:
        """One turn of the loop that is due."""
        was_on, self._is_on = self._is_on, self.speculator is not None and self.speculator.is_on
        if self.speculator is not None and self._is_on:
            requests = [generation.request for generation in self._live.values()]
            if self._in_flight is None or self.speculator.has_guess(requests):
                return self._draft(self.speculator, was_on)
        before, start = self._in_flight, self.clock()
        done = self._advance(self.scheduler, self._masked, self.clock, before)
        if done.planned is not None:
            self.timeline.plan(done.planned, start)
        applied = done.planned if before is None else before.plan
        return done if applied is None else self._applied(applied, done, was_on)

    def _draft(self, speculator: Speculator, was_on: bool) -> Advance:
        """Apply the step in flight, then give requests drafts and enqueue the next: to draft is to know every token.

        Whatever else is to do about the tokens that came is done while the device has work.
        """
        before, done = self._in_flight, Advance(None, None, [], None)
        if before is not None:
            done = self._applied(before.plan, settled(self.scheduler, before), was_on)
        start = self.clock()
        speculator.propose(generation.request for generation in self._live.values())
        ahead = overlapped_step(self.scheduler, self._masked, self.clock, None)
        if ahead.planned is not None:
            speculator.drafter.go_on()
            self.timeline.plan(ahead.planned, start)
        return done._replace(planned=ahead.planned, in_flight=ahead.in_flight)

    def _applied(self, plan: StepPlan, done: Advance, was_on: bool) -> Advance:
        """Note what came of `plan`, planned while drafts were on or not; of the changed requests those not of beams."""
        if done.result is None:
            return done
        now, result = self.clock(), done.result
        self._count_applied(plan)
        if result.logprobs is not None:
            note_logprobs(self._live, result.logprobs)
        if self.speculator is not None:
            self._note_drafts(self.speculator.note(plan, result, was_on, now))
        self.timeline.apply(result, now)
        return done._replace(changed=self._beams.take(done.changed, result, now))

    def _note_drafts(self, verified: list[Verified]) -> None:
        for request, num_drafts, num_accepted in verified:
            generation = self._live.get(request)
            if generation is not None:
                timings = generation.timings
                timings.num_verifications += 1
                timings.num_drafts += num_drafts
                timings.num_accepted_drafts += num_accepted

    def _note(self, generation: Generation, now: float) -> None:
        generation.note(now, self.num_applied, self.num_computed)
        waiting, generation.waiting = generation.waiting, []
        for sibling in waiting:  # the prompt is computed
            if sibling.finish_reason is None:
                self.scheduler.fork(generation.request, sibling.request)
        if generation.finish_reason is not None:
            del self._live[generation.request.number]
            self.timeline.end(generation.request.number, now)
            self.figures.note_end(generation.timings, generation.params.max_tokens, generation.finish_reason)
            self._masked.drop(generation.request.number)
            metrics, timings = self._metrics, generation.timings
            metrics.num_finished += 1
            metrics.num_prompt_tokens += timings.num_prompt_tokens
            metrics.num_cached_tokens += timings.num_cached_tokens
            metrics.num_output_tokens += len(timings.token_times)
            metrics.num_preemptions += timings.num_preemptions
            metrics.num_drafts += timings.num_drafts
            metrics.num_accepted_drafts += timings.num_accepted_drafts
            if self.speculator is not None:
                self.speculator.forget(generation.request)
                if not self._live:
                    self.speculator.rest()

    def _count(self, done: Advance) -> None:
        metrics = self._metrics
        if done.planned is not None:
            metrics.num_steps += 1
            self.figures.note_step(done.planned.num_batched_tokens)
            metrics.num_batched_tokens += done.planned.num_batched_tokens
        if done.result is not None:
            metrics.device_seconds += done.result.seconds

    def _fail(self, failure: BaseException) -> None:
        self._failure, self._in_flight = failure, None
        for generation in list(self._live.values()):
            try:
                self.finish(generation, FinishReason.ERROR)
            except Exception:  # what failed may be the scheduler: nobody will ask it again
                generation.request.finish_reason = FinishReason.ERROR
                self._note(generation, self.clock())
        self._beams.finish_all(FinishReason.ERROR, self.clock())

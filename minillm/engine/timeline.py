"""Timeline: what the last steps did, and where each request's time went. It knows ids, sizes and times, never contents.

It is fed by the engine, once a step. A step costs the same however many rows decode in it: what all of them share is
counted once, and a request's `Story` takes the difference between two readings of that count.

    queued -> seated -> (prompt: chunks) -> decoding -> ended          a preemption leads back to queued
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from minillm.core.plan import StepPlan, StepResult
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler
from minillm.types import Timings

__all__ = ["MAX_ENDED", "MAX_STEPS", "REASONS", "StepRecord", "Story", "Timeline"]

MAX_STEPS = 1024
"""Steps that are kept."""
MAX_ENDED = 256
"""Ended requests whose stories are kept."""
REASONS = ("budget", "blocks", "rows")


@dataclass(slots=True)
class StepRecord:
    """One step; times are seconds of the engine's clock."""

    plan: StepPlan
    planned: float
    num_tokens: int
    num_decodes: int
    """Leading entries of the plan that decode; the others are chunks of prompts."""
    num_running: int
    num_waiting: int
    num_used: int
    """KV blocks that requests refer to, after planning."""
    num_shared: int
    """Those of them that several refer to."""
    num_cached: int
    """KV blocks that nothing refers to and that a prompt may still find."""
    applied: float | None = None
    """When its result was applied; None while it runs."""
    started: float = 0.0
    """When the device could begin with it: it was planned, and the result of the step before had come."""
    device_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it took; 0 while it runs."""
        return 0.0 if self.applied is None else self.applied - self.started

    def chunks(self) -> list[tuple[int, int, int]]:
        """(request, start, tokens) of each chunk of a prompt."""
        plan, at = self.plan, self.num_decodes
        return list(zip(plan.requests[at:], plan.starts[at:], plan.counts[at:], strict=True))


@dataclass(slots=True)
class Story:
    """What became of one request so far."""

    number: int
    timings: Timings
    request: Request | None
    """None once it ended: its tokens are not kept."""
    row: int = 0
    num_mixed: int = 0
    """Steps with somebody's chunk in them while it decoded."""
    mixed_before: int | None = None
    """The timeline's count of such steps when it began to decode; None if it does not."""
    num_starved: int = 0
    """Steps that had no budget for its half-done prompt."""
    seats: list[int] = field(default_factory=list)
    """Step of each seat."""
    preemptions: list[int] = field(default_factory=list)
    """First step without each seat that it lost."""
    queued: float = 0.0
    """When it came into the queue, the last time."""
    queue_seconds: float = 0.0
    """Time without a row."""
    wait_steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    wait_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(REASONS, 0.0))
    """By what the queue waited for meanwhile; the rest of `queue_seconds` is for the step under way to end."""
    before: tuple[tuple[int, float], ...] = ()
    """The timeline's waits at `queued`."""


class Timeline:
    """The last steps of one engine, and the stories of its live and its last requests."""

    def __init__(self, scheduler: Scheduler) -> None:
        limits = scheduler.limits
        self.steps: deque[StepRecord] = deque(maxlen=MAX_STEPS)
        self.live: dict[int, Story] = {}
        self.ended: OrderedDict[int, Story] = OrderedDict()
        self.num_blocks = limits.num_kv_blocks - 1
        self._scheduler = scheduler
        self._pool = scheduler.kv.pool
        self._ref_counts = np.frombuffer(self._pool.ref_counts, np.int32)
        self._in_flight: deque[StepRecord] = deque()
        self._last_applied = 0.0
        self._owners: dict[int, Story] = {}  # by row
        self._prompts: dict[int, Story] = {}  # seated, and their prompt is not done
        self._num_mixed = 0
        # What the head of the queue waited for since the start, and what it waits for now, since when.
        self._wait_steps, self._wait_seconds = dict.fromkeys(REASONS, 0), dict.fromkeys(REASONS, 0.0)
        self._waiting_for, self._waiting_since = "", 0.0

    def add(self, request: Request, timings: Timings, now: float) -> None:
        """A request was queued; it may have come some steps ago."""
        story = Story(request.number, timings, request, queued=request.arrival)
        steps, seconds = dict.fromkeys(REASONS, 0), dict.fromkeys(REASONS, 0.0)
        end = now
        for record in reversed(self.steps):
            if end <= request.arrival:
                break
            for wait in record.plan.waits:
                steps[wait.reason] += record.planned >= request.arrival
                seconds[wait.reason] += end - max(record.planned, request.arrival)
            end = record.planned
        waits = zip(REASONS, self._waits(now), strict=True)
        story.before = tuple((num - steps[name], time - seconds[name]) for name, (num, time) in waits)
        self.live[request.number] = story

    def end(self, number: int, now: float) -> Story:
        """A request ended; its story so far is kept for a while."""
        story = self.live.pop(number)
        if story.row:
            del self._owners[story.row]
            self._leave_row(story)
        else:
            self._leave_queue(story, now)
        story.request = None
        self.ended[number] = story
        if len(self.ended) > MAX_ENDED:
            self.ended.popitem(last=False)
        return story

    def plan(self, plan: StepPlan, now: float) -> None:
        """A step was planned, `now`."""
        if self._waiting_for:
            self._wait_seconds[self._waiting_for] += now - self._waiting_since
            self._waiting_for = ""
        for row in plan.freed:
            self._unseat(row, plan.step, now)
        for seat in plan.seats:
            self._seat(seat.row, seat.request, plan.step, now)
        if plan.waits:  # those who were seated did not wait for this
            self._waiting_for, self._waiting_since = plan.waits[0].reason, now
            self._wait_steps[self._waiting_for] += 1
        num_decodes = self._note_chunks(plan)
        scheduler, pool = self._scheduler, self._pool
        record = StepRecord(
            plan,
            now,
            plan.num_batched_tokens,
            num_decodes,
            scheduler.num_running,
            scheduler.num_waiting,
            num_used=self.num_blocks - pool.num_free,
            num_shared=pool.num_shared,
            num_cached=pool.num_cached,
        )
        self.steps.append(record)
        self._in_flight.append(record)

    def apply(self, result: StepResult, now: float) -> None:
        """The result of the oldest step in flight was applied."""
        record = self._in_flight.popleft()
        assert record.plan.step == result.step, "the result of another step"
        record.started = max(record.planned, self._last_applied)
        record.applied = self._last_applied = now
        record.device_seconds = result.seconds

    def find(self, number: int, now: float) -> Story | None:
        """The story of a request as of `now`, a copy; None if it is not known, or no longer."""
        found = self.live.get(number) or self.ended.get(number)
        if found is None:
            return None
        story = replace(found, wait_steps=found.wait_steps.copy(), wait_seconds=found.wait_seconds.copy())
        if story.mixed_before is not None:
            story.num_mixed += self._num_mixed - story.mixed_before
        if not story.row and story.request is not None:
            self._leave_queue(story, now)
        return story

    def last_steps(self, since: int = -1) -> list[StepRecord]:
        """The steps on record with a number above `since`, oldest first."""
        steps = list(self.steps)  # at once: the engine's thread may append meanwhile
        return [record for record in steps if record.plan.step > since]

    def block_states(self) -> np.ndarray:
        """[num_blocks] of uint8, one per block that requests can use: 0 free, 1 cached, 2 used, 3 shared."""
        states = np.minimum(self._ref_counts, 2).astype(np.uint8)
        states[states > 0] += 1
        keyed = np.fromiter(list(self._pool.key_of), np.int64)
        if len(keyed):
            states[keyed] = np.maximum(states[keyed], 1)
        return states[1:]

    def _waits(self, now: float) -> tuple[tuple[int, float], ...]:
        """By reason, the steps and seconds that the queue's head has waited for it."""
        running = now - self._waiting_since if self._waiting_for else 0.0
        return tuple(
            (self._wait_steps[name], self._wait_seconds[name] + (running if name == self._waiting_for else 0.0))
            for name in REASONS
        )

    def _leave_queue(self, story: Story, now: float) -> None:
        story.queue_seconds += now - story.queued
        for name, (steps, seconds), (old_steps, old_seconds) in zip(
            REASONS, self._waits(now), story.before, strict=True
        ):
            story.wait_steps[name] += steps - old_steps
            story.wait_seconds[name] += seconds - old_seconds

    def _seat(self, row: int, number: int, step: int, now: float) -> None:
        story = self.live.get(number)
        if story is None:  # it ended while its first step was planned
            return
        self._leave_queue(story, now)
        story.row = row
        story.seats.append(step)
        self._owners[row] = self._prompts[number] = story

    def _unseat(self, row: int, step: int, now: float) -> None:
        """A row was freed: unless its request ended, it was preempted."""
        story = self._owners.pop(row, None)
        if story is None:
            return
        self._leave_row(story)
        story.preemptions.append(step)
        story.queued, story.before = now, self._waits(now)

    def _note_chunks(self, plan: StepPlan) -> int:
        """Follow the prompts; returns how many leading entries of the plan decode."""
        prompts, requests = self._prompts, plan.requests
        at = len(requests)
        if not prompts:
            return at
        while at and requests[at - 1] in prompts:
            at -= 1
        chunked = requests[at:]
        self._num_mixed += bool(chunked)
        for number, num_samples in zip(chunked, plan.num_samples[at:], strict=True):
            if num_samples:
                prompts.pop(number).mixed_before = self._num_mixed
        for story in prompts.values():
            if story.number not in chunked:
                story.num_starved += 1
        return at

    def _leave_row(self, story: Story) -> None:
        story.row = 0
        self._prompts.pop(story.number, None)
        if story.mixed_before is not None:
            story.num_mixed += self._num_mixed - story.mixed_before
            story.mixed_before = None


def steps_of(records: Iterable[StepRecord], number: int) -> list[StepRecord]:
    """Those of `records` that computed tokens of a request."""
    return [record for record in records if number in record.plan.requests]

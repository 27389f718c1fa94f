"""Flight recorder: a scheduler that notes all that is asked of it and what it planned, for the last steps. No contents.

The record is in segments. Each begins with the scheduler's whole state, so that a replay can begin there; when it is
full the one before it is dropped. `minillm replay` (`replay.py`) runs a recording through the scheduler again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any

from minillm.core.budget import SchedulerLimits
from minillm.core.plan import StepPlan, StepResult
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler
from minillm.engine.snapshot import STOP_TOKEN, First, Keys, encode, freeze, texts
from minillm.types import FinishReason

__all__ = ["FORMAT", "RecordingScheduler", "make_scheduler", "plan_columns"]

FORMAT = "minillm-recording-3"


@dataclass(slots=True)
class Segment:
    """A state, and what came after it."""

    state: Any
    in_flight: list[StepPlan]
    """Plans whose results were still to come."""
    requests: dict[int, tuple[list[bytes], Set[int]]]
    """By number: the keys of its blocks, a list that grows, and the tokens that end it."""
    events: list[tuple[Any, ...]] = field(default_factory=list)


class RecordingScheduler(Scheduler):
    """A scheduler and its record of at least the last `num_steps` steps, about twice as many at most."""

    def __init__(self, limits: SchedulerLimits, num_steps: int) -> None:
        super().__init__(limits)
        self._recording = Recording(num_steps)

    def add(self, request: Request) -> None:
        """Queue a request, as any scheduler does."""
        self._recording.note(self, request, ("add", freeze(request)))
        super().add(request)

    def fork(self, parent: Request, child: Request) -> None:
        """Queue a fork, as any scheduler does."""
        self._recording.note(self, child, ("fork", parent.number, freeze(child)))
        super().fork(parent, child)
        self._recording.know(child)  # its keys are a list of their own by now

    def adopt(self, request: Request, parent: Request) -> None:
        """Let a request go on from where another is, as any scheduler does."""
        self._recording.note(self, None, ("adopt", request.number, parent.number))
        super().adopt(request, parent)
        self._recording.know(request)

    def choose(self, request: Request, token: int | None) -> None:
        """Hold a request or let it go on, as any scheduler does."""
        self._recording.note(self, None, ("choose", request.number, token is None))
        super().choose(request, token)

    def yield_rows(self) -> None:
        """Preempt a request for others, as any scheduler does."""
        self._recording.note(self, None, ("yield",))
        super().yield_rows()

    def finish(self, number: int, reason: FinishReason) -> Request | None:
        """End a request, as any scheduler does."""
        self._recording.note(self, None, ("finish", number, reason))
        return super().finish(number, reason)

    def schedule(self, now: float) -> StepPlan | None:
        """Plan a step, as any scheduler does."""
        plan = super().schedule(now)
        if plan is not None or self.has_work:
            self._recording.events.append(("schedule", plan))
        if plan is not None:
            self._recording.in_flight.append(plan)
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[Request]:
        """Apply a result, as any scheduler does."""
        changed = super().update(plan, result)
        recording = self._recording
        recording.events.append(("update", result))
        recording.in_flight = [other for other in recording.in_flight if other.step != plan.step]
        recording.note_applied(self)
        return changed

    def recording(self) -> Iterator[str]:
        """The record as JSON text: ids, sizes and times. To be called between two steps.

        It is written piece by piece as the pieces are taken; meanwhile the scheduler may go on.
        """
        return self._recording.texts()


def make_scheduler(limits: SchedulerLimits, recorded_steps: int) -> Scheduler:
    """One that records its last steps, or with 0 of them none."""
    return RecordingScheduler(limits, recorded_steps) if recorded_steps else Scheduler(limits)


class Recording:
    """The segments of one scheduler."""

    def __init__(self, num_steps: int) -> None:
        self.in_flight: list[StepPlan] = []
        self._num_steps, self._num_applied = num_steps, 0
        self._segments: list[Segment] = []

    @property
    def events(self) -> list[tuple[Any, ...]]:
        """Those of the segment that is being written."""
        return self._segments[-1].events

    def note(self, scheduler: Scheduler, request: Request | None, event: tuple[Any, ...]) -> None:
        """Add what is about to be asked of the scheduler; `request` is new to it."""
        if not self._segments:
            self._begin(scheduler)
        self.events.append(event)
        if request is not None:
            self.know(request)

    def know(self, request: Request) -> None:
        """Remember what of a request is needed to replay it."""
        self._segments[-1].requests[request.number] = (request.keys, request.stop_token_ids)

    def note_applied(self, scheduler: Scheduler) -> None:
        """Note that a result was applied; begin another segment if this one is full."""
        self._num_applied += 1
        if self._num_applied >= self._num_steps:
            self._begin(scheduler)

    def _begin(self, scheduler: Scheduler) -> None:
        self._num_applied = 0
        state = freeze(scheduler, leave_out="_recording")
        requests: dict[int, tuple[list[bytes], Set[int]]]
        requests = {r.number: (r.keys, r.stop_token_ids) for r in scheduler._live.values()}
        self._segments = [*self._segments[-1:], Segment(state, list(self.in_flight), requests)]

    def texts(self) -> Iterator[str]:
        """All segments as one: the state at the beginning, and all events since."""
        first = self._segments[0] if self._segments else None
        in_flight = first.in_flight if first else []
        known: dict[int, tuple[First, Set[int]]] = {}
        for segment in self._segments:
            known |= {number: (First(of, len(of)), stops) for number, (of, stops) in segment.requests.items()}
        events = [event for segment in self._segments for event in segment.events]
        return recording_texts(first.state if first else None, in_flight, events, known)


def recording_texts(
    state: Any,
    in_flight: Sequence[StepPlan],
    events: Sequence[tuple[Any, ...]],
    known: Mapping[int, tuple[First, Set[int]]],
) -> Iterator[str]:
    """A recording as JSON text, an event or a request at a time."""
    keys, plans = Keys(), {plan.step: plan for plan in in_flight}
    yield f'{{"format": {json.dumps(FORMAT)}, "state": '
    yield from texts(state, keys)
    yield f', "in_flight": {json.dumps([plan_columns(plan) for plan in in_flight])}, "events": ['
    for i, event in enumerate(events):
        if event[0] == "schedule" and event[1] is not None:
            plans[event[1].step] = event[1]
        yield ", " * bool(i) + json.dumps(encode_event(event, plans, known, keys))
    yield '], "keys": {'
    for i, (number, (of, _)) in enumerate(known.items()):
        yield f'{", " * bool(i)}"{number}": {json.dumps([keys.number(key) for key in of.values[: of.num]])}'
    yield "}}"


def encode_event(
    event: tuple[Any, ...], plans: Mapping[int, StepPlan], known: Mapping[int, tuple[First, Set[int]]], keys: Keys
) -> list[Any]:
    """An event for JSON; of a result's tokens only whether each ends its request."""
    kind, *values = event
    if kind == "schedule":
        return [kind, None if values[0] is None else plan_columns(values[0])]
    if kind != "update":
        return [kind, *(encode(value, keys) for value in values)]
    result: StepResult = values[0]
    tokens, at = [], 0
    for number, gain in zip(plans[result.step].requests, result.counts, strict=True):
        stop_token_ids = known[number][1] if number in known else ()  # void: it ended before the record begins
        tokens += [STOP_TOKEN if token in stop_token_ids else 0 for token in result.tokens[at : at + gain]]
        at += gain
    return [kind, result.step, list(result.counts), tokens, list(result.failed)]


def plan_columns(plan: StepPlan) -> dict[str, Any]:
    """A plan for JSON and for comparison: its columns, but of its tokens only their number."""
    columns = {f.name: getattr(plan, f.name) for f in fields(plan)}
    columns |= {name: list(value) for name, value in columns.items() if hasattr(value, "itemsize")}
    columns["tokens"] = len(plan.tokens)
    columns["seats"] = [[seat.row, seat.request, list(seat.blocks)] for seat in plan.seats]
    columns["waits"] = [[wait.request, wait.reason, list(wait.behind)] for wait in plan.waits]
    return columns

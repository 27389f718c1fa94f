"""The two loops, as functions of the same pieces. The plain one is the oracle and the one to read first.

The overlapped loop takes the step in flight as an argument: while the device runs it, the next one is planned and
enqueued, and only then are its tokens awaited. It needs nothing else, because a plan depends on how many tokens a
request has, not on which. (SGLang 0.4's and NanoFlow's idea.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from minillm.core.plan import StepPlan, StepResult
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler


class PendingStep(Protocol):
    """A step that was enqueued."""

    def mask(self, bits: Any) -> None:
        """Hand in the masks that sampling waits for, where a row has a grammar."""

    def wait(self) -> StepResult:
        """Block until the step's tokens are here."""


class Submitter(Protocol):
    """Whatever takes plans."""

    def submit(self, plan: StepPlan) -> PendingStep:
        """Enqueue a step and return at once."""


class StepRunner(Submitter, Protocol):
    """Whatever runs plans."""

    @property
    def num_compiles(self) -> int:
        """Kernels compiled so far."""

    @property
    def num_captures(self) -> int:
        """CUDA graphs captured so far."""


class InFlight(NamedTuple):
    """A step that the device has and whose result is still to come."""

    plan: StepPlan
    pending: PendingStep


class Advance(NamedTuple):
    """What one turn of a loop did."""

    planned: StepPlan | None
    result: StepResult | None
    changed: list[Request]
    in_flight: InFlight | None


def plain_step(
    scheduler: Scheduler, runner: Submitter, clock: Callable[[], float], in_flight: InFlight | None = None
) -> Advance:
    """Plan a step, run it, apply its result; if one is in flight, apply that one's."""
    if in_flight is not None:
        return settled(scheduler, in_flight)
    plan = scheduler.schedule(clock())
    if plan is None:
        return Advance(None, None, [], None)
    result = runner.submit(plan).wait()
    return Advance(plan, result, scheduler.update(plan, result), None)


def settled(scheduler: Scheduler, in_flight: InFlight) -> Advance:
    """Apply the result of the step in flight and plan nothing: whoever plans next knows every token."""
    result = in_flight.pending.wait()
    return Advance(None, result, scheduler.update(in_flight.plan, result), None)


def overlapped_step(
    scheduler: Scheduler, runner: Submitter, clock: Callable[[], float], in_flight: InFlight | None
) -> Advance:
    """Plan and enqueue a step, then apply the result of the one before it, if there is one."""
    plan = scheduler.schedule(clock())
    behind = None if plan is None else InFlight(plan, runner.submit(plan))
    if in_flight is None:
        return Advance(plan, None, [], behind)
    result = in_flight.pending.wait()
    return Advance(plan, result, scheduler.update(in_flight.plan, result), behind)

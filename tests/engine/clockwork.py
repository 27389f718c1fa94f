"""An engine without a device: a step takes one second and a hundredth for each of its tokens, on a clock of its own."""

from __future__ import annotations

from typing import Any

from minillm.core.plan import StepPlan, StepResult
from minillm.core.scheduler import Scheduler
from minillm.engine.engine import Engine, Generation
from minillm.types import SamplingParams
from tests.core.builders import limits_of, result_of


class Clockwork:
    """Clock and runner in one."""

    num_compiles = num_captures = 0

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def submit(self, plan: StepPlan) -> Pending:
        return Pending(self, plan)


class Pending:
    """A step whose time passes when it is awaited."""

    def __init__(self, clockwork: Clockwork, plan: StepPlan) -> None:
        self.clockwork, self.plan = clockwork, plan

    def wait(self) -> StepResult:
        seconds = 1 + self.plan.num_batched_tokens / 100
        self.clockwork.now += seconds
        result = result_of(self.plan)
        result.seconds = seconds
        return result


def engine_of(overlap: bool = False, scheduler: Scheduler | None = None, **limits: Any) -> Engine:
    clockwork = Clockwork()
    scheduler = scheduler or Scheduler(limits_of(**limits))
    return Engine(scheduler, clockwork, vocab_size=10_000, eos_token_ids=[1], overlap=overlap, clock=clockwork.clock)


def add(engine: Engine, num_prompt: int, max_tokens: int) -> Generation:
    """Queue a request whose prompt is like no other's."""
    token = 100 + engine.metrics.num_requests
    return engine.add([token] * num_prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def run(engine: Engine) -> Engine:
    """Until all requests ended."""
    while engine.has_work:
        engine.step()
        engine.scheduler.check_invariants()
    return engine

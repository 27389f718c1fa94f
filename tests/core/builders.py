"""Short ways to say what a test of the core needs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from minillm.core.plan import StepPlan, StepResult
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler, SchedulerLimits
from tests.core.fake_runner import params_of


def limits_of(**changes: Any) -> SchedulerLimits:
    """Roomy limits, but for `changes`."""
    values: dict[str, Any] = {
        "max_num_batched_tokens": 256,
        "max_num_seqs": 64,
        "max_model_len": 4096,
        "num_kv_blocks": 1025,
        "block_size": 16,
    }
    return SchedulerLimits(**(values | changes))


def scheduler_of(**changes: Any) -> Scheduler:
    return Scheduler(limits_of(**changes))


def request_of(number: int, prompt: int | Sequence[int], max_tokens: int = 8, **changes: Any) -> Request:
    """A request; a prompt given as a length is like no other request's."""
    tokens = range(number * 10_000, number * 10_000 + prompt) if isinstance(prompt, int) else prompt
    values: dict[str, Any] = {"params": params_of(number), "stop_token_ids": frozenset({0})}
    return Request(number, tokens, max_tokens=max_tokens, **(values | changes))


def result_of(plan: StepPlan, token: int = 9) -> StepResult:
    """What a device gives that samples the same token everywhere and refuses all drafts."""
    counts = array("i", [min(1, num) for num in plan.num_samples])
    return StepResult(plan.step, counts, array("i", [token]) * sum(counts))


def planned(scheduler: Scheduler) -> StepPlan:
    """The next plan, which must exist."""
    plan = scheduler.schedule(0.0)
    assert plan is not None
    return plan


def step(scheduler: Scheduler, token: int = 9) -> StepPlan:
    """Plan a step and apply its result."""
    plan = planned(scheduler)
    scheduler.update(plan, result_of(plan, token))
    scheduler.check_invariants()
    return plan


def entries(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(request, start, count) of each entry."""
    return [(work.request, work.start, work.count) for work in plan.works()]

"""Prompts get on, whatever else runs or comes: none starves, and no setting makes one request block the others."""

from __future__ import annotations

import math
import random

import pytest

from minillm.core.plan import StepPlan
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler
from tests.core.builders import entries, limits_of, planned, request_of, result_of, scheduler_of, step


class ClosedLoop:
    """`num_clients` that each send a short request as soon as their last one ended."""

    def __init__(self, scheduler: Scheduler, num_clients: int, rng: random.Random) -> None:
        self.scheduler, self.num_clients, self.rng = scheduler, num_clients, rng
        self.live: dict[int, Request] = {}
        self.num_added = 0

    def add(self, num_prompt: int, max_tokens: int) -> Request:
        self.num_added += 1
        request = request_of(self.num_added, num_prompt, max_tokens)
        self.scheduler.add(request)
        self.live[request.number] = request
        return request

    def step(self, num_long: int) -> StepPlan:
        """A step in which `num_long` requests are not the clients'."""
        while len(self.live) < self.num_clients + num_long:
            self.add(self.rng.randint(1, 60), self.rng.randint(1, 60))
        plan = planned(self.scheduler)
        for request in self.scheduler.update(plan, result_of(plan)):
            if request.finish_reason is not None:
                del self.live[request.number]
        return plan


def most_steps(requests: list[Request], least_chunk: int, is_crowded: bool) -> int:
    """Bound on the steps in which `requests`, of which none is served before an earlier one, all end.

    In each step the first unfinished prompt gets its least chunk; with rows for all, decodes run beside it.
    """
    outputs = [request.max_tokens - request.num_output for request in requests]
    chunks = [-(-(request.num_prompt - request.num_planned) // least_chunk) for request in requests]
    return sum(max(0, num) for num in chunks) + (sum(outputs) if is_crowded else max(outputs))


@pytest.mark.parametrize("num_clients", [19, 63, 79])
def test_a_long_prompt_among_short_clients_ends(num_clients: int) -> None:
    """A tenth of what a CPU serves: kappa 5,200, a prompt of 40,000 tokens, 64 rows."""
    limits = limits_of(
        max_num_batched_tokens=512, soft_cap=128, attention_equivalence=520.0, max_model_len=4096, num_kv_blocks=2000
    )
    loop = ClosedLoop(Scheduler(limits), num_clients, random.Random(1))
    for _ in range(100):
        loop.step(0)
    long = loop.add(4000, 4)
    bound = most_steps(list(loop.live.values()), 16, is_crowded=False) + 60 * (num_clients > 64)
    num_steps = 0
    while long.finish_reason is None:
        loop.step(1)
        num_steps += 1
        assert num_steps <= bound, f"{long.num_planned} of 4000 tokens are planned"


@pytest.mark.parametrize("seed", range(40))
def test_requests_end_within_bounds_whatever_comes_later(seed: int) -> None:
    rng = random.Random(seed)
    num_rows = rng.choice((4, 16, 40))
    least_chunk = rng.choice((1, 8, 20))
    limits = limits_of(
        max_num_batched_tokens=rng.choice((num_rows + least_chunk, 2 * num_rows + 2 * least_chunk, 256)),
        max_num_seqs=num_rows,
        soft_cap=rng.choice((None, num_rows, num_rows + 2 * least_chunk)),
        attention_equivalence=rng.choice((math.inf, 100.0, 5.0)),
        tile_steps=rng.choice(((), (16, 32, 64, 128))),
        min_chunk_size=least_chunk,
        max_chunk_size=rng.choice((None, 50)),
        enable_prefix_caching=False,
    )
    num_clients = rng.choice((num_rows - 2, num_rows + 10))
    scheduler = Scheduler(limits)
    loop = ClosedLoop(scheduler, num_clients, rng)
    for _ in range(60):
        loop.step(0)
    long = [loop.add(rng.randint(100, 600), 4) for _ in range(2)]
    bound = most_steps(list(loop.live.values()), limits.least_chunk, is_crowded=num_clients > num_rows - 2)
    num_steps = 0
    while num_left := sum(request.finish_reason is None for request in long):
        prompts = list(scheduler._running.prompts)
        plan = loop.step(num_left)
        num_steps += 1
        assert num_steps <= bound, [request.num_planned for request in long]
        idle = [request for request in prompts if request.number not in plan.requests]
        assert not prompts or prompts[0] not in idle, "the first prompt got nothing"
        assert not (idle and plan.seats), "somebody was admitted past a prompt that got nothing"


def with_a_third_that_waits() -> Scheduler:
    """One decodes, one lacks 10 tokens, and what those leave in the next step is less than the third's least chunk."""
    scheduler = scheduler_of(
        max_num_batched_tokens=512, max_chunk_size=200, min_chunk_size=200, soft_cap=400, attention_equivalence=100.0
    )
    for number, num_prompt in ((1, 4), (2, 210), (3, 2000)):
        scheduler.add(request_of(number, num_prompt, max_tokens=200))
    assert entries(step(scheduler)) == [(1, 0, 4), (2, 0, 200), (3, 0, 200)]
    return scheduler


def test_nobody_is_admitted_past_a_prompt_that_the_budget_has_nothing_for() -> None:
    scheduler = with_a_third_that_waits()
    scheduler.add(request_of(4, 4))
    plan = step(scheduler)
    assert entries(plan) == [(1, 4, 1), (2, 200, 10)] and plan.waits == ((4, "budget", (1, 2)),)
    assert entries(step(scheduler)) == [(1, 5, 1), (2, 210, 1), (3, 200, 200)]


def test_a_smaller_rank_is_admitted_before_a_prompt_that_the_budget_has_nothing_for() -> None:
    scheduler = with_a_third_that_waits()
    scheduler.add(request_of(4, 4, priority=-1))
    assert entries(step(scheduler)) == [(1, 4, 1), (2, 200, 10), (4, 0, 4)]


def test_a_long_context_among_decodes_gets_its_least_chunk() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=512, soft_cap=64, attention_equivalence=100.0)
    for number, num_prompt in ((1, 4), (2, 2000)):
        scheduler.add(request_of(number, num_prompt, max_tokens=200))
    step(scheduler)
    (_, at, _), *_ = reversed(entries(step(scheduler)))
    for start in range(at + 16, 2000 - 16, 16):
        assert entries(step(scheduler))[1:] == [(2, start, 16)]


def num_steps_of(scheduler: Scheduler, *, num_requests: int, num_prompt: int, max_tokens: int) -> int:
    """Steps that finish requests which come at once."""
    for number in range(1, num_requests + 1):
        scheduler.add(request_of(number, num_prompt, max_tokens))
    num_steps = 0
    while scheduler.has_work:
        plan = planned(scheduler)
        scheduler.update(plan, result_of(plan))
        num_steps += 1
    return num_steps


@pytest.mark.parametrize("min_chunk_size", [16, 64, 128, 256])
def test_a_large_least_chunk_does_not_serialise_requests(min_chunk_size: int) -> None:
    scheduler = scheduler_of(max_num_batched_tokens=512, soft_cap=128, min_chunk_size=min_chunk_size)
    assert num_steps_of(scheduler, num_requests=16, num_prompt=200, max_tokens=50) <= 80


@pytest.mark.parametrize("cap", [2, 8, 16, 32])
def test_a_small_budget_is_used(cap: int) -> None:
    scheduler = scheduler_of(max_num_batched_tokens=cap)
    num_tokens = 64 * (40 + 50)
    assert num_steps_of(scheduler, num_requests=64, num_prompt=40, max_tokens=50) <= 1.5 * num_tokens / cap

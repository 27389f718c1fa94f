"""Prompts get on, whatever else runs or comes: none starves, and no setting makes one request block the others."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.core.plan import StepPlan
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler
from tests.core.builders import entries, limits_of, planned, request_of, result_of, scheduler_of, step


class ClosedLoop:
    """`num_clients` that each send a short request as soon as their last one ended."""

    def __init__(self, scheduler: Scheduler, num_clients: int, rng: random.Random) -> None:
        self.scheduler, self.num_clients, self.rng = scheduler, num_clients, rng
        self.live: dict[int, Request] = {}
        self.added: list[Request] = []

    def add(self, num_prompt: int, max_tokens: int) -> Request:
        request = request_of(len(self.added) + 1, num_prompt, max_tokens)
        self.added.append(request)
        self.scheduler.add(request)
        self.live[request.number] = request
        return request

    def overtaking(self, request: Request) -> list[Request]:
        """Those that came after `request` and go before it."""
        return [other for other in self.added[request.number :] if other.rank < request.rank]

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
    """Bound on the steps in which `requests`, which are served before all others, all end.

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
    before = most_steps(list(loop.live.values()), 16, is_crowded=False) + 60 * (num_clients > 64)
    num_steps = 0
    while long.finish_reason is None:
        loop.step(1)
        num_steps += 1
        overtaking = loop.overtaking(long)
        bound = before + sum(-(-request.num_prompt // 16) for request in overtaking)
        assert num_steps <= bound, f"{long.num_planned} of 4000 tokens are planned"
        assert sum(request.num_prompt for request in overtaking) < 4000


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
    is_crowded = num_clients > num_rows - 2
    before = most_steps(list(loop.live.values()), limits.least_chunk, is_crowded)
    num_steps = 0
    while num_left := sum(request.finish_reason is None for request in long):
        prompts = list(scheduler._running.prompts)
        plan = loop.step(num_left)
        num_steps += 1
        overtaking = {other.number: other for request in long for other in loop.overtaking(request)}
        chunks = [-(-request.num_prompt // limits.least_chunk) for request in overtaking.values()]
        outputs = [request.max_tokens for request in overtaking.values() if is_crowded]
        assert num_steps <= before + sum(chunks) + sum(outputs), [request.num_planned for request in long]
        seated = [loop.added[seat.request - 1] for seat in plan.seats]
        served = sorted([*prompts, *seated], key=lambda request: request.rank)
        idle = [request for request in prompts if request.number not in plan.requests]
        assert not served or served[0] not in idle, "the first prompt got nothing"
        assert all(request.rank < other.rank for request in seated for other in idle), "admitted past one with nothing"


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
    scheduler.add(request_of(4, 4, priority=1))
    plan = step(scheduler)
    assert entries(plan) == [(1, 4, 1), (2, 200, 10)] and plan.waits == ((4, "budget", (1, 2)),)
    assert entries(step(scheduler)) == [(1, 5, 1), (2, 210, 1), (3, 200, 200)]


def test_a_smaller_rank_is_admitted_before_a_prompt_that_the_budget_has_nothing_for() -> None:
    scheduler = with_a_third_that_waits()
    scheduler.add(request_of(4, 4))
    assert entries(step(scheduler)) == [(1, 4, 1), (2, 200, 10), (4, 0, 4)]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2)), min_size=2, max_size=30),
    st.integers(1, 40),
    st.sampled_from((None, 1, 12)),
)
def test_fewer_later_tokens_are_computed_before_a_prompt_than_it_has(
    coming: list[tuple[int, int]], cap: int, soft_cap: int | None
) -> None:
    """With rows and blocks for all. `coming`: a prompt's length, and the steps until the next one comes."""
    scheduler = scheduler_of(max_num_batched_tokens=cap, soft_cap=soft_cap, min_chunk_size=1)
    requests: list[Request] = []
    num_passed: Counter[int] = Counter()

    def run_step() -> None:
        waiting = [r for r in requests if r.finish_reason is None and r.num_planned < r.num_prompt]
        chunks = [entry for entry in entries(step(scheduler)) if entry[1] < requests[entry[0]].num_prompt]
        for request in waiting:
            numbers = [number for number, _, _ in chunks]
            num_before = numbers.index(request.number) if request.number in numbers else len(chunks)
            num_passed[request.number] += sum(count for n, _, count in chunks[:num_before] if n > request.number)
            assert num_passed[request.number] < request.num_prompt

    for number, (num_prompt, num_steps) in enumerate(coming):
        requests.append(request_of(number, num_prompt))
        scheduler.add(requests[-1])
        for _ in range(num_steps):
            if scheduler.has_work:
                run_step()
    for _ in range(sum(num_prompt + 8 for num_prompt, _ in coming)):  # a step computes a token at least
        if scheduler.has_work:
            run_step()
    assert not scheduler.has_work


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

"""Scheduler: hands out each step's token budget and applies what the step gave. It knows no tensors, text or clocks.

Running decodes come first, then prompts, half done or new; within each, the smaller rank.

    schedule -> StepPlan -> (device) -> StepResult -> update       `schedule` may run again before `update`.
"""

from __future__ import annotations

from itertools import islice

from minillm.core.budget import Budget, SchedulerLimits
from minillm.core.kv_manager import KVManager
from minillm.core.plan import StepPlan, StepResult, Wait
from minillm.core.queue import RequestQueue
from minillm.core.request import Request
from minillm.core.running import Running
from minillm.types import FinishReason

__all__ = ["Scheduler", "SchedulerLimits"]

MAX_BEHIND = 8
GROWTH_TOKENS = 16


class Scheduler:
    """Owner of all requests, their rows and their blocks."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.kv = KVManager(limits.num_kv_blocks, limits.block_size, limits.enable_prefix_caching)
        self.num_preemptions = 0
        self._live: dict[int, Request] = {}
        self._queue = RequestQueue(limits.max_overtakes)
        self._running = Running(limits, self.kv)
        self._step = 0

    def check(self, num_prompt: int, max_tokens: int) -> str | None:
        """Why a request of this size can never be served and what to change, or None."""
        return self.limits.find_fault(num_prompt, max_tokens)

    def add(self, request: Request) -> None:
        """Queue a request that `check` has nothing against."""
        self._enter(request, None)

    def fork(self, parent: Request, child: Request) -> None:
        """Queue `child`, whose tokens but the last are those that `parent`'s start with, at the parent's place.

        It shares the computed blocks of a parent that runs when it is seated, with a copy of the one it must write to.
        """
        num_shared = min(len(child.tokens) - 1, len(parent.tokens))
        assert child.tokens[:num_shared] == parent.tokens[:num_shared] and child.salt == parent.salt, "not a fork"
        child.parent = parent
        child.keys = parent.keys[: num_shared // self.limits.block_size]
        self._enter(child, parent.rank[1])

    def adopt(self, request: Request, parent: Request) -> None:
        """Let `request` go on from where `parent` is, both held or queued; if both have a row they share blocks."""
        if request.row and parent.row:
            self._running.adopt(request, parent)
        elif request.row:
            self._running.preempt(request)
            self._requeue()
        request.tokens, request.keys = parent.tokens[:], parent.keys[:]

    def choose(self, request: Request, token: int | None) -> None:
        """Take back the last token of `request` and hold it (None), or let it go on with the token that was chosen."""
        request.hold() if token is None else request.resume(token)

    def yield_rows(self) -> None:
        """Preempt the request of the largest rank: all that run are held for others, which wait for what it has."""
        self._running.preempt(max(self._running, key=lambda request: request.rank))
        self._requeue()

    def finish(self, number: int, reason: FinishReason) -> Request | None:
        """End a request in any state and free what it has; None if it ended before. Its results in flight are void."""
        request = self._live.get(number)
        if request is not None:
            self._end(request, reason)
        return request

    def schedule(self, now: float) -> StepPlan | None:
        """What the next step does; None if there is nothing to do, or all of it waits for results in flight."""
        plan = StepPlan(self._step)
        running = self._running
        budget = running.plan_decodes(plan)
        reason = self._plan_prompts(plan, budget, now)
        if self._requeue():
            reason = "blocks"
        if reason is not None:
            behind = plan.requests if reason == "budget" else (request.number for request in running)
            plan.waits = (Wait(self._queue[0].number, reason, tuple(islice(behind, MAX_BEHIND))),)
        if not plan.requests:
            return None
        running.take_changes(plan)
        self._step += 1
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[Request]:
        """Apply a step's result; returns the requests that gained tokens or ended, in the order of the plan.

        Entries are void whose request has ended, or was seated anew after the step was planned.
        """
        assert plan.step == result.step, "the result of another step"
        changed: list[Request] = []
        live, step, gained, stop = self._live, plan.step, result.tokens, 0
        failed = frozenset(plan.requests[i] for i in result.failed)
        for number, start, count, gain in zip(plan.requests, plan.starts, plan.counts, result.counts, strict=True):
            stop += gain
            request = live.get(number)
            if request is None or step < request.first_step:
                continue
            if failed and number in failed:
                self._end(request, FinishReason.ERROR)
            elif gain == 1 and request.plan_limit:
                token = gained[stop - 1]
                request.tokens.append(token)
                request.num_unknown -= 1
                request.num_computed = computed = start + count
                if computed >= request.next_publish:
                    self.kv.publish_soon(request)
                if token in request.stop_token_ids:
                    self._end(request, FinishReason.STOP)
                elif computed + 1 >= request.max_len:
                    self._end(request, FinishReason.LENGTH)
            elif gain:
                reason = request.accept(gained[stop - gain : stop])
                if request.num_computed >= request.next_publish:
                    self.kv.publish_soon(request)
                if reason is not None:
                    self._end(request, reason)
            else:
                request.num_computed = start + count
                if request.num_computed >= request.next_publish:
                    self.kv.publish_soon(request)
                continue
            changed.append(request)
        self.kv.publish_some()
        return changed

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._live)

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Requests with a row."""
        return len(self._running)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request and no hold refers to, cached ones included."""
        return self.kv.pool.num_free

    @property
    def kv_utilization(self) -> float:
        """Share of the slots of those blocks that tokens are planned for, in [0, 1]; 1 if there is none."""
        num_slots = self.limits.num_slots - self.num_free_blocks * self.limits.block_size
        return 1.0 - self._running.num_unused_slots / num_slots if num_slots else 1.0

    def check_invariants(self) -> None:
        """Assert that requests, rows and blocks agree."""
        waiting = list(self._queue)
        numbers = sorted(request.number for request in [*self._running, *waiting])
        assert numbers == sorted(self._live), "a request is lost or in two places"
        assert not any(r.row or r.blocks or r.num_planned or r.num_unknown for r in waiting)
        assert all(a.rank < b.rank for a, b in zip(waiting, waiting[1:], strict=False))
        assert all(request.finish_reason is None for request in self._live.values())
        self._running.check_invariants()
        self.kv.check_invariants(self._live.values())

    def _enter(self, request: Request, place: int | None) -> None:
        fault = self.check(request.num_prompt, request.max_tokens)
        assert fault is None, fault
        assert request.number not in self._live, f"request {request.number} is there already"
        request.max_len = min(request.num_prompt + request.max_tokens, self.limits.max_len)
        request.plan_limit = request.max_len - 1
        if self.limits.enable_prefix_caching:
            self.kv.extend_keys(request, len(request.tokens) // self.limits.block_size)
        if place is None:
            num_cached = self.kv.match(request, self._step).num_tokens
            place = self._queue.next_place(len(request.tokens) - num_cached)
        request.rank = (request.priority, place, request.number)
        self._live[request.number] = request
        self._queue.push(request)

    def _requeue(self) -> bool:
        """Queue those who lost their rows; whether there are any."""
        preempted = self._running.take_preempted()
        for request in preempted:
            self._queue.push(request)
        self.num_preemptions += len(preempted)
        return bool(preempted)

    def _plan_prompts(self, plan: StepPlan, budget: Budget, now: float) -> str | None:
        """Plan chunks by rank, of half-done prompts and of queued ones, which are seated while they fit.

        None is seated past a prompt that the budget has nothing for, which might never get on, nor in a step in which
        blocks were given up: they are for those who needed them. Returns why the queue's head waits, None without one.
        """
        running, queue = self._running, self._queue
        index, reason, lack = 0, None, None
        for prompt in (*running.prompts, None):
            # What else lacks than blocks, lacks for all.
            while lack in (None, "blocks") and not running.preempted and queue.may_try(index, prompt):
                lack = self._try_seat(queue[index], plan, budget, now)
                if lack is None:
                    queue.pop(index)
                else:
                    reason, index = reason or lack, index + 1
            if prompt is not None and prompt.row and not running.plan_prompt(prompt, plan, budget):
                lack = "budget"
        return (reason or lack) if queue else None

    def _try_seat(self, request: Request, plan: StepPlan, budget: Budget, now: float) -> str | None:
        """Seat `request` and plan its first chunk, or change nothing and say what lacks."""
        running = self._running
        if not running.num_free_rows:
            return "rows"
        if budget.is_spent:
            return "budget"
        prefix = self.kv.match(request, plan.step)
        count = budget.chunk_size(prefix.num_tokens, len(request.tokens) - prefix.num_tokens)
        if not count:
            return "budget"
        # Room for running requests to grow a while before they preempt the newcomer: without it a full cache computes
        # 40 % more tokens in resumes, with more of it rows stay empty.
        num_reserved = len(running) * min(GROWTH_TOKENS, self.limits.block_size) // self.limits.block_size
        if not self.kv.try_admit(request, prefix, count, num_reserved):
            return "blocks"
        if request.first_planned is None:
            request.first_planned = now
            request.num_cached_tokens = prefix.num_tokens
        running.seat(request, prefix, plan)
        running.plan_chunk(request, count, plan, budget)
        return None

    def _end(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        del self._live[request.number]
        if request.row:
            self._running.vacate(request)
        else:
            self._queue.remove(request)

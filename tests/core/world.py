"""A random world around a scheduler: requests come, fork, end early and fail, blocks are held, results come late.

Every step it asserts what must always hold; it counts what happened, so that a test can tell that it was put to use.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise

from minillm.core.plan import StepPlan, StepResult
from minillm.core.queue import RANK
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler, SchedulerLimits
from minillm.types import FinishReason
from tests.core.fake_runner import EOS, VOCAB, FakeRunner, Reference, generate, params_of

STATES = ("queued", "mid-prompt", "decoding", "preempted", "in flight")
MAX_STEPS = 5000


def random_limits(rng: random.Random) -> SchedulerLimits:
    """Small limits, so that everything runs short."""
    block_size = rng.choice((1, 2, 4, 4, 8))
    max_tokens = rng.choice((1, 3, 8, 16, 40, 64, 64))
    min_chunk = rng.choice((1, 1, 3, 8))
    max_model_len = rng.choice((24, 60))
    is_chunked = rng.random() < 0.9
    return SchedulerLimits(
        max_num_batched_tokens=max_tokens if is_chunked else max_model_len + max_tokens // 4,
        max_num_seqs=rng.choice((1, 4, 8, 8)),
        max_model_len=max_model_len,
        num_kv_blocks=1 + -(-rng.choice((24, 40, 40, 60, 60, 100, 300)) // block_size),
        block_size=block_size,
        soft_cap=rng.choice((None, None, max(1, max_tokens // 2), max_tokens)),
        soft_cap_few=rng.choice((None, max(1, max_tokens // 4))),
        many_keys=rng.choice((None, 40, 200)),
        attention_equivalence=rng.choice((math.inf, 20.0, 200.0)),
        tile_steps=rng.choice(((), (4, 8, 16, 32), (6, 12, 24, 48))),
        enable_prefix_caching=rng.random() < 0.85,
        enable_chunked_prefill=is_chunked,
        min_chunk_size=min_chunk,
        max_chunk_size=rng.choice((None, None, min_chunk + 5)) if is_chunked else None,
        max_overtakes=rng.choice((0, 1, 3)),
    )


def least_chunk(limits: SchedulerLimits) -> int:
    """What `SchedulerLimits.least_chunk` must be."""
    caps = (limits.max_num_batched_tokens, limits.soft_cap or math.inf)
    return int(min(limits.min_chunk_size, limits.max_chunk_size or math.inf, max(1, min(caps) // 2)))


@dataclass
class World:
    """One configuration, run to its end. `num_requests` come by themselves; forks come on top."""

    seed: int
    num_requests: int = 18
    counts: Counter[str] = field(default_factory=Counter)
    trace: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        self.limits = random_limits(rng)
        self.scheduler = Scheduler(self.limits)
        self.runner = FakeRunner(self.limits.num_kv_blocks, self.limits.block_size, self.limits.max_num_seqs)
        self.num_drafts = rng.choice((0, 3))
        self.max_in_flight = rng.choice((1, 2, 2, 3))
        self.abort_rate = rng.choice((0.0, 0.1, 0.3))
        self.fork_rate = rng.choice((0.0, 0.2))
        self.hold_rate = rng.choice((0.0, 0.1))
        self.fail_rate = rng.choice((0.0, 0.0, 0.01))
        self.stems = [[rng.randint(1, 2) for _ in range(rng.randint(4, 30))] for _ in range(2)]
        self.requests: dict[int, Request] = {}
        self.ended: dict[int, FinishReason] = {}
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.held: list[list[int]] = []
        self.row_of: dict[int, int] = {}  # request number by row, as of the last plan
        self.starts: dict[int, int] = {}  # by request: where its next entry must start

    def run(self) -> World:
        """Until every request ended."""
        num_to_come = self.num_requests
        for _ in range(MAX_STEPS):
            while num_to_come and self.rng.random() < 0.5:
                num_to_come -= 1
                self.add()
            self.disturb()
            self.step()
            self.scheduler.check_invariants()
            if not (num_to_come or self.scheduler.has_work or self.in_flight):
                break
        for blocks in self.held:
            self.scheduler.kv.drop(blocks)
        self.check_end()
        return self

    def new_request(self, tokens: list[int], salt: bytes) -> Request:
        rng = self.rng
        request = Request(
            len(self.requests) + 1,
            tokens,
            max_tokens=rng.choice((1, 5, 15, 30, 30)),
            params=params_of(rng.randint(1, 3)),
            stop_token_ids=rng.choice((frozenset({EOS}), frozenset(), frozenset({EOS, 7}))),
            priority=rng.choice((0, 0, 0, 1)),
            salt=salt,
            is_stepwise=self.num_drafts > 0 and rng.random() < 0.7,
            is_streamed=len(self.requests) % 3 == 0,
        )
        self.requests[request.number] = request
        return request

    def add(self) -> None:
        stem = self.rng.choice(self.stems)
        tokens = stem[: self.rng.randint(0, len(stem))] + [
            self.rng.randint(1, 2) for _ in range(self.rng.randint(0, 12))
        ]
        request = self.new_request(tokens, self.rng.choice((b"", b"", b"salt")))
        if self.scheduler.check(request.num_prompt, request.max_tokens) is None:
            self.scheduler.add(request)
        else:
            self.note_end(request, FinishReason.REJECTED)

    def disturb(self) -> None:
        """What may come between a schedule and an update."""
        rng, scheduler = self.rng, self.scheduler
        if rng.random() < self.abort_rate:
            is_preempted = any(r.num_preemptions for r in scheduler._queue)
            self.abort("preempted" if is_preempted and rng.random() < 0.7 else rng.choice(STATES))
        running = list(scheduler._running)
        if running and rng.random() < self.fork_rate:
            self.fork(rng.choice(running))
        if running and rng.random() < self.hold_rate:
            blocks = list(rng.choice(running).blocks)[:3]
            scheduler.kv.hold(blocks)
            self.held.append(blocks)
        if self.held and (rng.random() < 0.2 or not running):
            scheduler.kv.drop(self.held.pop(0))
        for request in scheduler._running.decodes:
            if self.num_drafts and not request.num_unknown and rng.random() < 0.8:
                reference = Reference(request.tokens, request.params.seed)
                true = [reference.step() for _ in range(rng.randint(1, self.num_drafts))]
                request.drafts = [t if rng.random() < 0.7 else (t + 1) % VOCAB for t in true]

    def abort(self, state: str) -> None:
        scheduler = self.scheduler
        waiting = list(scheduler._queue)
        flying = {number for plan, _ in self.in_flight for number in plan.requests}
        choices = {
            "queued": [r for r in waiting if not r.num_preemptions],
            "mid-prompt": scheduler._running.prompts,
            "decoding": scheduler._running.decodes,
            "preempted": [r for r in waiting if r.num_preemptions],
            "in flight": [r for r in scheduler._running if r.number in flying],
        }[state]
        if choices:
            request = self.rng.choice(choices)
            self.counts[f"abort {state}"] += 1
            assert scheduler.finish(request.number, FinishReason.ABORT) is request
            assert scheduler.finish(request.number, FinishReason.ABORT) is None
            self.note_end(request, FinishReason.ABORT)

    def fork(self, parent: Request) -> None:
        if self.counts["fork asked"] >= self.num_requests:
            return
        kept = self.rng.randint(1, len(parent.tokens))
        tokens = list(parent.tokens[:kept])
        if self.rng.random() < 0.5:
            tokens[-1] = self.rng.randint(1, 2)  # as a beam: it differs in the last token
        child = self.new_request(tokens, parent.salt)
        if self.scheduler.check(child.num_prompt, child.max_tokens) is None:
            self.counts["fork asked"] += 1
            self.scheduler.fork(parent, child)
        else:
            self.note_end(child, FinishReason.REJECTED)

    def step(self) -> None:
        """Plan and run a step if one can be in flight; apply the oldest result if no more can, or by chance."""
        plan = None
        if len(self.in_flight) < self.max_in_flight:
            plan = self.checked_schedule()
        if plan is not None:
            failing = self.rng.random() < self.fail_rate
            result = self.runner.run(plan, lambda number: failing and number % 2 == 0)
            self.in_flight.append((plan, result))
        if self.in_flight and (plan is None or len(self.in_flight) == self.max_in_flight or self.rng.random() < 0.3):
            plan, result = self.in_flight.popleft()
            self.checked_update(plan, result)

    def checked_schedule(self) -> StepPlan | None:
        """`schedule`, and all that must hold for a plan."""
        scheduler, counts = self.scheduler, self.counts
        running = scheduler._running
        decodes, prompts = list(running.decodes), list(running.prompts)
        ready = [r for r in decodes if not r.is_closed and r.num_planned < r.max_len - 1]
        seats = {r.number: r.first_step for r in running}
        cached = set(scheduler.kv.pool.block_of.values())
        num_preemptions = scheduler.num_preemptions
        plan = scheduler.schedule(0.0)
        counts["preemption"] += scheduler.num_preemptions - num_preemptions
        preempted = [r for r in scheduler._queue if r.number in seats]
        self.check_victims(preempted, decodes)
        kept = [r for r in ready if r.first_step == seats[r.number]]
        if plan is None:
            assert not kept, "a running decode was left out"
            assert self.in_flight or self.held or not scheduler.has_work, "nothing to wait for, and no plan"
            return None
        works = list(plan.works())
        planned = {w.request: w for w in works}
        assert len(planned) == len(works) and all(w.count > 0 for w in works)
        assert plan.num_batched_tokens <= self.limits.max_num_batched_tokens
        fed = [r.number for r in kept if r.number in planned]
        assert [w.request for w in works[: len(fed)]] == fed, "decodes do not come first, by rank"
        num_decode_tokens = sum(planned[number].count for number in fed)
        if len(fed) < len(kept):
            assert num_decode_tokens == self.limits.max_num_batched_tokens, "a running decode was left out"
        has_readers = any(request.is_streamed for request in kept + prompts if request.row)
        num_keys = sum(planned[number].start for number in fed)
        self.check_soft_cap(num_decode_tokens if has_readers else 0, num_keys, works[len(fed) :])
        seated = [self.requests[seat.request] for seat in plan.seats]
        half_done = [r for r in prompts if r.first_step == seats[r.number]]
        self.check_progress(min([*half_done, *seated], key=RANK, default=None), planned, num_decode_tokens)
        self.check_order(plan, seated, [r for r in half_done if r.number not in planned], works[len(fed) :])
        assert not (preempted and plan.seats), "admitted in a step that preempted"
        self.check_seats(plan, planned, cached)
        for work in works:
            request = self.requests[work.request]
            assert self.starts[work.request] == work.start or work.request in fed and request.drafts
            assert request.num_planned <= len(request.blocks) * self.limits.block_size
            self.starts[work.request] = work.start + work.count
        assert len(plan.waits) == (scheduler.num_waiting > 0)
        self.trace.append(repr(plan).encode())
        return plan

    def check_victims(self, preempted: list[Request], decodes: list[Request]) -> None:
        """Those of the largest rank go: of all, if decodes lacked blocks; of the prompts, if a prompt did."""
        running = self.scheduler._running
        for victim in preempted:
            others = running if victim in decodes else running.prompts
            assert all(request.rank < victim.rank for request in others), "not the largest rank was preempted"

    def check_soft_cap(self, num_decode_tokens: int, num_keys: int, chunks: list) -> None:
        limits = self.limits
        if not limits.enable_chunked_prefill:
            for work in chunks:
                assert work.num_samples, "a prompt in parts"
        elif chunks and num_decode_tokens and limits.soft_cap is not None:
            costs = [w.count * (1 + (w.start + w.count / 2) / limits.attention_equivalence) for w in chunks]
            is_due = len(chunks) == 1 and chunks[0].count <= least_chunk(limits)
            assert is_due or num_decode_tokens + sum(costs) <= limits.soft_cap_of(num_decode_tokens, num_keys) + 1e-6

    def check_order(self, plan: StepPlan, seated: list[Request], idle: list[Request], chunks: list) -> None:
        """Prompts are served by rank, and nobody is seated past one that waits, but for a head that lacks blocks."""
        ranks = [self.requests[work.request].rank for work in chunks]
        assert ranks == sorted(ranks), "a prompt is served before a smaller rank"
        is_new = [self.requests[work.request] in seated for work in chunks]
        self.counts["seated before a half-done prompt"] += (True, False) in pairwise(is_new)
        waiting = idle + [self.requests[wait.request] for wait in plan.waits if wait.reason != "blocks"]
        assert all(request.rank < other.rank for request in seated for other in waiting), "seated past"

    def check_progress(self, first: Request | None, planned: dict, num_decode_tokens: int) -> None:
        """The first of the prompts with a row gets on, if the hard cap and the cache let it."""
        if first is None:
            return
        room = self.limits.max_num_batched_tokens - num_decode_tokens
        work, least = planned.get(first.number), least_chunk(self.limits)
        if work is not None:
            assert work.num_samples or work.count >= least, "less than the least chunk"
        elif room >= min(least, first.num_owed):
            size = self.limits.block_size
            num_lacking = -(-(first.num_planned + min(first.num_owed, room)) // size) - len(first.blocks)
            assert num_lacking > self.scheduler.num_free_blocks, "the first prompt starves"

    def check_seats(self, plan: StepPlan, planned: dict, cached: set[int]) -> None:
        counts = self.counts
        flying = {row for flown, _ in self.in_flight for row in flown.rows}
        for row in plan.freed:
            del self.row_of[row]
        for seat in plan.seats:
            request, work = self.requests[seat.request], planned[seat.request]
            counts["row reused in flight"] += seat.row in flying
            assert work.start < len(request.tokens), "a hit left nothing to compute"
            whole = work.start // self.limits.block_size
            is_forked = work.start % self.limits.block_size or not set(seat.blocks[:whole]) <= cached
            counts["fork shared"] += bool(is_forked)
            counts["fork copied"] += bool(work.start % self.limits.block_size)
            counts["prefix hit"] += work.start > 0 and not is_forked
            if request.num_preemptions == 0:
                assert request.num_cached_tokens == work.start and request.first_planned == 0.0
            self.row_of[seat.row] = seat.request
            self.starts[seat.request] = work.start
        for row, number in zip(plan.rows, plan.requests, strict=True):
            assert self.row_of[row] == number, "a row of another request"

    def checked_update(self, plan: StepPlan, result: StepResult) -> None:
        """`update`, and all that must hold for what it returns."""
        before = {r.number: len(r.tokens) for r in self.scheduler._running}
        changed = self.scheduler.update(plan, result)
        order = {number: i for i, number in enumerate(plan.requests)}
        places = [order[r.number] for r in changed]
        assert places == sorted(set(places)), "changed requests are not in plan order"
        for request in changed:
            assert request.number not in self.ended, "a request ended twice"
            assert request.finish_reason is not None or len(request.tokens) > before[request.number]
            if request.finish_reason is not None:
                self.note_end(request, request.finish_reason)
            else:
                self.starts[request.number] = request.num_planned

    def note_end(self, request: Request, reason: FinishReason) -> None:
        assert request.number not in self.ended, "a request ended twice"
        self.ended[request.number] = reason

    def check_end(self) -> None:
        """Everything ended, everything is free, and every output is what the naive engine gives."""
        assert len(self.ended) == len(self.requests), "a request never ended"
        self.scheduler.check_invariants()
        assert self.scheduler.num_free_blocks == self.limits.num_kv_blocks - 1
        for number, reason in self.ended.items():
            request = self.requests[number]
            if reason is FinishReason.REJECTED:
                continue
            output = list(request.tokens[request.num_prompt :])
            max_tokens = request.max_len - request.num_prompt
            expected = generate(
                request.tokens[: request.num_prompt], request.params.seed, max_tokens, request.stop_token_ids
            )
            if reason in (FinishReason.ABORT, FinishReason.ERROR):
                assert output == expected[: len(output)], f"request {number}"
            else:
                assert output == expected, f"request {number}"
                assert (reason is FinishReason.STOP) == (output[-1] in request.stop_token_ids)
            self.counts["token"] += len(output)

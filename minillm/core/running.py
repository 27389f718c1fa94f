"""Running: the requests that have a row, and what the next step does for them. It knows no queue and no results.

Requests are kept by rank (priority, then place in line): `decodes` have sampled since they were seated, `prompts` not
yet. A step gives each open decode a token; a closed one waits for a result in flight (`request.py` has the terms).
Then prompts get chunks, each taking the blocks of its chunk, which were promised to it when it was admitted. A
decode grows on what is free, promised or not. When blocks run out, the largest rank gives up its own and will be
computed again, so the smallest always gets on; results of steps before its next `first_step` are void.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import chain

from minillm.core.budget import Budget, SchedulerLimits
from minillm.core.kv_manager import KVManager, Prefix
from minillm.core.plan import Seat, StepPlan, ints
from minillm.core.queue import insert, try_remove
from minillm.core.request import Request

__all__ = ["Running"]


class Running:
    """Rows 1 to `max_num_seqs`; row 0 is a dummy."""

    def __init__(self, limits: SchedulerLimits, kv: KVManager) -> None:
        self.decodes: list[Request] = []
        """By rank; they owe one token, drafts aside."""
        self.prompts: list[Request] = []
        """By rank; half done, as those that a step finishes become decodes."""
        self.preempted: list[Request] = []
        """Those who gave up their row and are not queued yet."""
        self._limits = limits
        self._kv = kv
        self._free_rows = array("i", range(limits.max_num_seqs, 0, -1))
        self._freed = ints()
        self._adopted: dict[int, tuple[array[int], array[int]]] = {}
        """By row: block-table entries and copies for the next plan."""
        self._num_streamed = 0

    def __len__(self) -> int:
        return len(self.decodes) + len(self.prompts)

    def __iter__(self) -> Iterator[Request]:
        return chain(self.decodes, self.prompts)

    @property
    def num_free_rows(self) -> int:
        """Rows without a request."""
        return len(self._free_rows)

    @property
    def has_readers(self) -> bool:
        """Whether somebody reads a running request's tokens as they come."""
        return self._num_streamed > 0

    @property
    def num_unused_slots(self) -> int:
        """Slots in blocks of requests that no token is planned for."""
        return sum(len(request.blocks) * self._limits.block_size - request.num_planned for request in self)

    def take_preempted(self) -> list[Request]:
        """Those who gave up their row since the last call."""
        preempted, self.preempted = self.preempted, []
        return preempted

    def take_changes(self, plan: StepPlan) -> None:
        """Put into `plan` what changed since the last one: rows freed, blocks adopted."""
        plan.freed, self._freed = self._freed, ints()
        for blocks, copies in self._adopted.values():
            plan.blocks.extend(blocks)
            plan.copies.extend(copies)
        self._adopted.clear()

    def adopt(self, request: Request, parent: Request) -> None:
        """Share the parent's full blocks in place of the request's own; copy the one that both go on writing to."""
        assert request.row not in self._adopted, "adopted twice between two plans"
        self._adopted[request.row] = self._kv.adopt(request, parent)
        request.num_planned, request.num_computed = parent.num_planned, parent.num_computed

    def seat(self, request: Request, prefix: Prefix, plan: StepPlan) -> None:
        """Give a row to a request that was just given blocks."""
        if prefix.copied:
            plan.copies.extend((prefix.copied, request.blocks[len(prefix.blocks)]))
        request.parent = None
        request.first_step = plan.step
        request.row = self._free_rows.pop()
        self._num_streamed += request.is_streamed
        tokens = request.tokens[:] if request.is_shown else None
        plan.seats += (Seat(request.row, request.number, request.blocks[:], request.params, tokens),)
        insert(self.prompts, request)

    def vacate(self, request: Request) -> None:
        """Take row and blocks back. A step in flight may still use them: later steps run after it."""
        is_removed = try_remove(self.decodes, request) or try_remove(self.prompts, request)
        assert is_removed, f"request {request.number} does not run"
        self._kv.release(request)
        self._adopted.pop(request.row, None)
        self._freed.append(request.row)
        self._free_rows.append(request.row)
        self._num_streamed -= request.is_streamed
        request.unseat()

    def plan_decodes(self, plan: StepPlan) -> Budget:
        """Give each open decode its tokens; what is left. This loop sets the scheduler's speed: keep it flat."""
        room = self._limits.max_num_batched_tokens
        block_size = self._limits.block_size
        requests, rows, starts = plan.requests, plan.rows, plan.starts
        num_tokens, tokens = plan.num_tokens, plan.tokens
        wide: list[tuple[int, int]] = []  # (entry, count) of rows with drafts
        for request in self.decodes:  # a preemption shortens it, behind the current entry
            start = request.num_planned
            if start >= request.plan_limit:
                continue
            if not room:
                break
            count = 1
            if request.drafts or start % block_size == 0:
                count = self._fit(request, room, plan)
                if not count:
                    break
            if request.num_unknown:
                num_tokens.append(0)
            else:
                num_tokens.append(count)
                tokens.append(request.tokens[start])
                if count > 1:
                    tokens.extend(request.drafts)
                    wide.append((len(starts), count))
            if count > 1 or request.is_stepwise:
                request.plan_limit = 0
            requests.append(request.number)
            rows.append(request.row)
            starts.append(start)
            request.num_planned = start + count
            request.num_unknown += 1
            room -= count
        plan.counts = array("i", [1]) * len(starts)
        for i, count in wide:
            plan.counts[i] = count
        plan.num_logits, plan.num_samples = plan.counts[:], plan.counts[:]
        num_planned = self._limits.max_num_batched_tokens - room
        return Budget(self._limits, num_planned, sum(starts), self.has_readers)

    def plan_prompt(self, request: Request, plan: StepPlan, budget: Budget) -> bool:
        """The next chunk of a half-done prompt; False if the budget has nothing for it.

        For blocks it preempts prompts of larger rank, not decodes, which are planned by now.
        """
        start = request.num_planned
        count = budget.chunk_size(start, len(request.tokens) - start)
        if not count:
            return False
        is_fitting = self._kv.try_grow(request, start + count, plan.blocks)
        while not is_fitting and self.prompts[-1] is not request:
            self.preempt(self.prompts[-1])
            is_fitting = self._kv.try_grow(request, start + count, plan.blocks)
        if is_fitting:
            self.plan_chunk(request, count, plan, budget)
        return True

    def plan_chunk(self, request: Request, count: int, plan: StepPlan, budget: Budget) -> None:
        """Plan the next `count` tokens of a prompt, for which it has blocks."""
        start = request.num_planned
        stop = start + count
        num_samples = int(stop == len(request.tokens))
        plan.requests.append(request.number)
        plan.rows.append(request.row)
        plan.starts.append(start)
        plan.counts.append(count)
        is_scored = request.is_scored and start < request.num_prompt
        plan.num_logits.append(count if is_scored else num_samples)
        plan.num_samples.append(num_samples)
        plan.num_tokens.append(count)
        plan.tokens.extend(request.tokens[start:stop])
        budget.spend(start, count)
        request.num_planned = stop
        request.num_chunks += 1
        if num_samples:
            request.num_unknown = 1
            if request.is_stepwise:
                request.plan_limit = 0
            try_remove(self.prompts, request)
            insert(self.decodes, request)

    def check_invariants(self) -> None:
        """Assert that each row has one owner or none, and that ranks ascend."""
        rows = sorted([*self._free_rows, *(request.row for request in self)])
        assert rows == list(range(1, self._limits.max_num_seqs + 1)), "a row is lost or in two places"
        assert all(r.blocks and 0 <= r.num_computed <= r.num_planned for r in self)
        assert self._num_streamed == sum(r.is_streamed for r in self), "a reader is lost or counted twice"
        assert not self.preempted, "a preempted request is not queued"
        for requests in (self.decodes, self.prompts):
            assert all(a.rank < b.rank for a, b in zip(requests, requests[1:], strict=False))

    def _fit(self, request: Request, room: int, plan: StepPlan) -> int:
        """Find blocks for the next token of a decode and, if they need no preemption, for its drafts.

        Returns the tokens to plan; 0 if the request, of the largest rank left, had to give up its own blocks.
        """
        start = request.num_planned
        if request.drafts:
            max_drafts = 0 if request.num_unknown else min(room, request.plan_limit - start) - 1
            del request.drafts[max_drafts:]
            if not self._kv.try_grow(request, start + 1 + len(request.drafts), plan.blocks):
                request.drafts.clear()
        while not self._kv.try_grow(request, start + 1, plan.blocks):
            last = max((part[-1] for part in (self.decodes, self.prompts) if part), key=lambda r: r.rank)
            self.preempt(last)
            if last is request:
                return 0
        return 1 + len(request.drafts)

    def preempt(self, request: Request) -> None:
        """Take row and blocks back; it will be computed again."""
        request.num_preemptions += 1
        self.vacate(request)
        self.preempted.append(request)

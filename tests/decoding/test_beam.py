"""Beam search on the scheduler with a device of hashes: it finds what a naive search finds, whatever runs short."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from itertools import count

import pytest

from minillm.core.plan import StepPlan, StepResult
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler, SchedulerLimits
from minillm.decoding.beam import BeamSearch, Candidate, Finished, Hypotheses
from minillm.types import BeamSearchParams, FinishReason
from tests.core.builders import limits_of
from tests.core.fake_runner import VOCAB, FakeRunner, content, generate, params_of

STOPS = frozenset({0, 7})


def candidates_of(contents: Sequence[int], num: int) -> list[Candidate]:
    """The likeliest tokens after those whose contents are given."""
    rng = random.Random(hash(tuple(contents)))
    logprobs = [-rng.expovariate(0.5) for _ in range(VOCAB)]
    return [Candidate(t, logprobs[t]) for t in sorted(range(VOCAB), key=lambda t: -logprobs[t])[:num]]


class ScoringRunner(FakeRunner):
    """Notes what the cache holds for each row that samples."""

    def __init__(self, limits: SchedulerLimits) -> None:
        super().__init__(limits.num_kv_blocks, limits.block_size, limits.max_num_seqs)
        self.seen: dict[int, list[int]] = {}

    def run(self, plan: StepPlan, *args: object) -> StepResult:
        result = super().run(plan)
        for work in plan.works():
            if work.num_samples:
                table, stop = self._table(work.row), work.start + work.count
                slots = [slot for b in table for slot in self.slots[b * self.block_size : (b + 1) * self.block_size]]
                self.seen[work.request] = slots[:stop]
        return result


def naive(prompt: Sequence[int], params: BeamSearchParams) -> list[Finished]:
    """The same search over lists."""
    hypotheses, outputs = Hypotheses(params, params.max_tokens, STOPS), [[]]
    num = Hypotheses.num_candidates(params.beam_width, len(STOPS))
    while not hypotheses.is_done:
        found = []
        for output in outputs:
            contents: list[int] = []
            for token in [*prompt, *output]:
                contents.append(content(contents[-1] if contents else 1, token))
            found.append(candidates_of(contents, num))
        outputs = [[*outputs[s.parent], s.token] for s in hypotheses.advance(outputs, found)]
    return hypotheses.finished


class Bench:
    """Searches and other requests on one scheduler, driven to their ends."""

    def __init__(self, num_in_flight: int = 1, **limits: int | bool) -> None:
        self.limits = limits_of(**limits)
        self.scheduler, self.runner = Scheduler(self.limits), ScoringRunner(self.limits)
        self.num_in_flight = num_in_flight
        self.in_flight: list[tuple[StepPlan, StepResult, dict[int, list[int]]]] = []
        self.searches: dict[int, BeamSearch] = {}
        self.numbers = count(1)
        self.num_stalls = 0
        self.max_used = 0

    def add(self, prompt: Sequence[int], max_tokens: int, *, is_stepwise: bool = False) -> Request:
        number = next(self.numbers)
        stops = frozenset() if is_stepwise else STOPS
        request = Request(
            number,
            prompt,
            max_tokens=max_tokens,
            params=params_of(number),
            stop_token_ids=stops,
            is_stepwise=is_stepwise,
        )
        self.scheduler.add(request)
        return request

    def search(self, prompt: Sequence[int], params: BeamSearchParams) -> BeamSearch:
        request = self.add(prompt, params.max_tokens, is_stepwise=True)
        self.searches[request.number] = BeamSearch(self.scheduler, request, params, STOPS, self.numbers)
        return self.searches[request.number]

    def step(self) -> None:
        plan = self.scheduler.schedule(0.0) if len(self.in_flight) < self.num_in_flight else None
        if plan is not None:
            result = self.runner.run(plan)
            self.in_flight.append((plan, result, dict(self.runner.seen)))
        elif not self.in_flight and self.scheduler.num_running:
            self.num_stalls += 1
            self.scheduler.yield_rows()
        if self.in_flight and (plan is None or len(self.in_flight) == self.num_in_flight):
            self.apply(*self.in_flight.pop(0))
        self.scheduler.check_invariants()
        self.max_used = max(self.max_used, self.limits.num_kv_blocks - 1 - self.scheduler.num_free_blocks)

    def apply(self, plan: StepPlan, result: StepResult, seen: dict[int, list[int]]) -> None:
        for request in self.scheduler.update(plan, result):
            search = self.searches.get(request.number)
            if search is not None:
                num = Hypotheses.num_candidates(search.hypotheses._params.beam_width, len(STOPS))
                for new in search.take(request, candidates_of(seen[request.number], num)):
                    self.searches[new.number] = search

    def run(self) -> None:
        for _ in range(5000):
            if not self.scheduler.has_work and not self.in_flight:
                return
            self.step()
        raise AssertionError("it does not come to an end")


def random_params(rng: random.Random) -> BeamSearchParams:
    return BeamSearchParams(
        beam_width=rng.choice((1, 2, 3, 4)),
        max_tokens=rng.choice((1, 2, 7, 15)),
        length_penalty=rng.choice((-1.0, 0.0, 1.0, 2.0)),
        early_stopping=rng.choice((True, False, "never")),
    )


@pytest.mark.parametrize("num_in_flight", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_searches_among_others_find_what_a_naive_search_finds(seed: int, num_in_flight: int) -> None:
    """Blocks and rows run short: members are preempted, held and seated again."""
    rng = random.Random(seed)
    bench = Bench(
        num_in_flight,
        max_num_batched_tokens=rng.choice((8, 16, 64)),
        max_num_seqs=rng.choice((4, 5, 8)),
        max_model_len=60,
        num_kv_blocks=1 + rng.choice((33, 40, 100)),
        block_size=rng.choice((4, 8)),
        enable_prefix_caching=rng.random() < 0.7,
    )
    stem = [rng.randint(1, 2) for _ in range(16)]
    prompts = [stem[: rng.randint(0, 16)] + [rng.randint(1, 6)] for _ in range(8)]
    searches, others = [], []
    for prompt in prompts:
        if rng.random() < 0.6:
            searches.append((bench.search(prompt, params := random_params(rng)), prompt, params))
        else:
            others.append((bench.add(prompt, 9), prompt))
        for _ in range(rng.randint(0, 3)):
            bench.step()
    bench.run()
    assert searches
    for search, prompt, params in searches:
        assert search.hypotheses.finished == naive(prompt, params)
        assert search.finish_reason is FinishReason.STOP and len(search.hypotheses.finished) == params.beam_width
    for request, prompt in others:
        assert list(request.tokens[len(prompt) :]) == generate(prompt, request.number, 9, STOPS)
    assert bench.scheduler.num_free_blocks == bench.limits.num_kv_blocks - 1


def test_they_do_run_short() -> None:
    """What the test above puts to use: preemptions, stalls that a preemption ends, copies of blocks."""
    bench = Bench(1, max_num_seqs=4, max_model_len=40, num_kv_blocks=33, block_size=4, enable_prefix_caching=False)
    params = BeamSearchParams(beam_width=4, max_tokens=15, early_stopping="never")
    searches = [bench.search([1, 2, n], params) for n in range(1, 5)]
    for _ in range(3):
        bench.step()
    bench.run()
    assert [s.hypotheses.finished for s in searches] == [naive([1, 2, n], params) for n in range(1, 5)]
    assert bench.num_stalls > 0 and bench.scheduler.num_preemptions > 0


def test_four_beams_take_one_prompt_and_four_tails() -> None:
    """1,000 tokens are 62 full blocks and a part of one; each of four beams has its own from there on."""
    bench = Bench(max_model_len=2048, max_num_batched_tokens=1024)
    params = BeamSearchParams(beam_width=4, max_tokens=40, early_stopping="never")
    search = bench.search([1 + i % 9 for i in range(1000)], params)
    bench.run()
    assert max(len(f.tokens) for f in search.hypotheses.finished) > 24
    assert bench.max_used <= 62 + 4 * 3 + 1  # 40 tokens more end in the third block behind those 62


def test_a_member_that_fails_ends_the_search() -> None:
    bench = Bench()
    search = bench.search([1, 2, 3], BeamSearchParams(beam_width=3, max_tokens=9))
    bench.step()
    bench.step()
    assert len(search.members) == 3
    plan = bench.scheduler.schedule(0.0)
    assert plan is not None
    result = StepResult(plan.step, array("i", [0] * len(plan.rows)), array("i"), failed=array("i", [1]))
    bench.apply(plan, result, {number: [1] for number in plan.requests})
    assert search.finish_reason is FinishReason.ERROR and not bench.scheduler.has_work
    bench.scheduler.check_invariants()


def test_an_abort_ends_all_members() -> None:
    bench = Bench(num_in_flight=2)
    search = bench.search([1, 2, 3], BeamSearchParams(beam_width=3, max_tokens=9))
    for _ in range(3):
        bench.step()
    search.finish(FinishReason.ABORT)
    bench.run()
    assert bench.scheduler.num_free_blocks == bench.limits.num_kv_blocks - 1


def test_ends_outside_the_best_of_the_width_are_dropped() -> None:
    """As in transformers: an end counts only among the first `beam_width` candidates."""
    params = BeamSearchParams(beam_width=1, max_tokens=5, length_penalty=0.0)
    hypotheses = Hypotheses(params, 5, frozenset({0}))
    going = hypotheses.advance([[]], [[Candidate(3, -0.5), Candidate(0, -0.6)]])
    assert [s.token for s in going] == [3] and hypotheses.finished == []
    assert hypotheses.advance([[3]], [[Candidate(0, -0.1), Candidate(4, -9.0)]]) == []
    assert hypotheses.is_done and hypotheses.finished == [Finished(-0.6, -0.6, (3, 0))]


@pytest.mark.parametrize(("early_stopping", "rounds"), [(True, 2), (False, 3), ("never", 5)])
def test_when_to_stop(early_stopping: bool | str, rounds: int) -> None:
    """Two are complete after two rounds, the worse with -1.05. What goes on has -1.3, and 2 less after each round:
    -0.65 by its length then, -1.1 after one more, and by six tokens not below -1.05 before it has -7.3."""
    params = BeamSearchParams(beam_width=2, max_tokens=6, length_penalty=1.0, early_stopping=early_stopping)
    hypotheses, outputs = Hypotheses(params, 6, frozenset({0})), [[]]
    first = [[Candidate(0, -1.0), Candidate(3, -1.1), Candidate(4, -1.2), Candidate(5, -9.0)]]
    second = [[Candidate(5, -0.2), Candidate(0, -1.0)], [Candidate(5, -7.0), Candidate(6, -7.0)]]
    later = [[Candidate(5, -2.0), Candidate(6, -20.0)], [Candidate(5, -20.0), Candidate(6, -20.0)]]
    num_rounds = 0
    for candidates in (first, second, later, later, later, later):
        num_rounds += 1
        outputs = [[*outputs[s.parent], s.token] for s in hypotheses.advance(outputs, candidates)]
        if hypotheses.is_done:
            break
    assert num_rounds == rounds

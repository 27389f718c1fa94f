"""What the scheduler does, case by case. `test_properties.py` has what it does in general."""

from __future__ import annotations

import pytest

from minillm.core.plan import StepPlan
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler
from minillm.types import FinishReason
from tests.core.builders import entries, planned, request_of, result_of, scheduler_of, step
from tests.core.fake_runner import FakeRunner, generate, params_of


def test_a_request_from_prompt_to_end() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=8, block_size=4, min_chunk_size=4)
    request = request_of(1, 12, max_tokens=3)
    scheduler.add(request)
    assert scheduler.has_work and (scheduler.num_waiting, scheduler.num_running) == (1, 0)
    first = step(scheduler)
    assert entries(first) == [(1, 0, 6)]
    assert [(seat.row, seat.request, len(seat.blocks)) for seat in first.seats] == [(1, 1, 2)]
    second = step(scheduler)
    assert entries(second) == [(1, 6, 6)] and second.num_samples.tolist() == [1]
    assert second.blocks.tolist() == [1, 2, request.blocks[2]]
    assert [entries(step(scheduler)) for _ in range(2)] == [[(1, 12, 1)], [(1, 13, 1)]]
    assert request.finish_reason is FinishReason.LENGTH
    assert (request.num_output, request.num_chunks, request.num_owed) == (3, 2, 15)
    assert not scheduler.has_work and scheduler.schedule(0.0) is None


def with_a_half_done_prompt() -> Scheduler:
    """One that decodes, and 30 of 60 tokens of a prompt; a step has 32."""
    scheduler = scheduler_of(max_num_batched_tokens=32, min_chunk_size=4)
    scheduler.add(request_of(1, 20))
    step(scheduler)
    scheduler.add(request_of(2, 60))
    assert entries(step(scheduler)) == [(1, 20, 1), (2, 0, 30)]
    return scheduler


def test_decodes_then_half_done_prompts_then_new_ones_that_are_not_much_shorter() -> None:
    scheduler = with_a_half_done_prompt()
    scheduler.add(request_of(3, 30))
    assert entries(step(scheduler)) == [(1, 21, 1), (2, 30, 30)]
    assert entries(step(scheduler)) == [(1, 22, 1), (2, 60, 1), (3, 0, 30)]


def test_a_much_shorter_prompt_is_seated_before_a_half_done_one_which_gets_the_rest_of_the_step() -> None:
    scheduler = with_a_half_done_prompt()
    scheduler.add(request_of(3, 10))
    plan = step(scheduler)
    assert entries(plan) == [(1, 21, 1), (3, 0, 10), (2, 30, 15)] and not plan.waits
    assert entries(step(scheduler)) == [(1, 22, 1), (3, 10, 1), (2, 45, 15)]


def test_a_half_done_prompt_goes_ahead_of_shorter_ones_once_enough_have_passed_it() -> None:
    scheduler = with_a_half_done_prompt()
    for number in range(3, 9):
        scheduler.add(request_of(number, 10, max_tokens=1))
    plan = step(scheduler)
    assert entries(plan) == [(1, 21, 1), (3, 0, 10), (4, 0, 10), (5, 0, 10)]
    assert plan.waits == ((6, "budget", (1, 3, 4, 5)),)
    plan = step(scheduler)
    assert entries(plan) == [(1, 22, 1), (6, 0, 10), (2, 30, 15), (7, 0, 5)], "40 tokens and twice 10 reach 60"
    assert plan.waits == ((8, "budget", (1, 6, 2, 7)),)


def test_the_first_chunk_that_may_pass_the_soft_cap_is_of_the_first_in_line() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=512, soft_cap=64, attention_equivalence=4.0)
    for number, num_prompt in ((1, 4), (2, 2000)):
        scheduler.add(request_of(number, num_prompt, max_tokens=200))
    step(scheduler)
    assert entries(step(scheduler)) == [(1, 4, 1), (2, 500, 16)]
    scheduler.add(request_of(3, 20))
    assert entries(step(scheduler)) == [(1, 5, 1), (3, 0, 16)]
    assert entries(step(scheduler)) == [(1, 6, 1), (3, 16, 4)]
    assert entries(step(scheduler)) == [(1, 7, 1), (3, 20, 1), (2, 516, 16)]


def test_a_shorter_prompt_that_lacks_a_row_or_blocks_holds_up_no_half_done_one() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=32, max_num_seqs=1)
    scheduler.add(request_of(1, 90))
    step(scheduler)
    scheduler.add(request_of(2, 5))
    plan = step(scheduler)
    assert entries(plan) == [(1, 30, 30)] and plan.waits == ((2, "rows", (1,)),)
    scheduler = scheduler_of(max_num_batched_tokens=32, num_kv_blocks=9)
    scheduler.add(request_of(1, 90))
    step(scheduler)
    scheduler.add(request_of(2, 30))
    scheduler.add(request_of(3, 1))
    plan = step(scheduler)
    assert entries(plan) == [(3, 0, 1), (1, 30, 30)] and plan.waits == ((2, "blocks", (3, 1)),)


def test_lower_priority_numbers_go_first_and_equal_ones_by_arrival() -> None:
    scheduler = scheduler_of(max_num_seqs=1)
    for number, priority in ((1, 2), (2, 0), (3, 1), (4, 0)):
        scheduler.add(request_of(number, 4, max_tokens=1, priority=priority))
    served = [step(scheduler).requests.tolist() for _ in range(4)]
    assert served == [[2], [4], [3], [1]]


def test_no_shorter_prompt_goes_ahead_of_a_lower_priority_number() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=32)
    scheduler.add(request_of(1, 90))
    step(scheduler)
    scheduler.add(request_of(2, 4, priority=1))
    scheduler.add(request_of(3, 4))
    assert entries(step(scheduler)) == [(3, 0, 4), (1, 30, 20), (2, 0, 4)]


def test_what_the_cache_holds_of_a_prompt_does_not_make_it_long() -> None:
    scheduler = scheduler_of(max_num_seqs=1)
    scheduler.add(request_of(1, range(100), max_tokens=2))
    step(scheduler)
    scheduler.add(request_of(2, 60, max_tokens=1))
    scheduler.add(request_of(3, range(101), max_tokens=1))
    scheduler.add(request_of(4, range(101), max_tokens=1, params=params_of(4)._replace(num_prompt_logprobs=0)))
    served = [step(scheduler) for _ in range(4)]
    assert [entries(plan) for plan in served] == [[(1, 100, 1)], [(3, 96, 5)], [(2, 0, 60)], [(4, 0, 101)]]


def test_an_open_row_runs_ahead_on_the_devices_token() -> None:
    scheduler = scheduler_of()
    request = request_of(1, 4, max_tokens=3)
    scheduler.add(request)
    plans = [planned(scheduler) for _ in range(3)]
    assert [plan.num_tokens.tolist() for plan in plans] == [[4], [0], [0]]
    assert scheduler.schedule(0.0) is None, "a length end costs no extra step"
    ended = [scheduler.update(plan, result_of(plan)) for plan in plans]
    assert ended == [[request]] * 3 and request.finish_reason is FinishReason.LENGTH


def test_a_row_that_is_not_ahead_sends_its_token() -> None:
    scheduler = scheduler_of()
    scheduler.add(request_of(1, 4))
    step(scheduler, token=7)
    plan = planned(scheduler)
    assert plan.num_tokens.tolist() == [1] and plan.tokens.tolist() == [7]


def test_a_closed_row_waits_for_its_result() -> None:
    scheduler = scheduler_of()
    request = request_of(1, 4, is_stepwise=True)
    scheduler.add(request)
    plan = planned(scheduler)
    assert request.is_closed and scheduler.schedule(0.0) is None
    scheduler.update(plan, result_of(plan))
    assert not request.is_closed
    request.drafts = [1, 2, 3]
    plan = planned(scheduler)
    assert entries(plan) == [(1, 4, 4)] and plan.num_samples.tolist() == [4]
    assert plan.tokens.tolist() == [9, 1, 2, 3] and scheduler.schedule(0.0) is None
    scheduler.update(plan, result_of(plan))
    assert (request.num_planned, request.num_computed, request.drafts) == (5, 5, [])


def test_drafts_are_cut_at_the_end_of_the_request_and_of_the_budget() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=6)
    request, other = request_of(1, 4, max_tokens=3), request_of(2, 2, max_tokens=30)
    scheduler.add(request)
    scheduler.add(other)
    step(scheduler)
    request.drafts, other.drafts = [1, 2, 3], [1, 2, 3, 4, 5]
    assert entries(planned(scheduler)) == [(1, 4, 2), (2, 2, 4)]


def test_drafts_made_before_the_last_token_was_known_are_dropped() -> None:
    scheduler = scheduler_of()
    request = request_of(1, 4)
    scheduler.add(request)
    planned(scheduler)
    request.drafts = [1, 2]
    assert entries(planned(scheduler)) == [(1, 4, 1)] and not request.drafts


def test_a_long_prompt_waits_for_those_who_are_read_and_for_nobody_else() -> None:
    scheduler = scheduler_of(soft_cap=32)
    scheduler.add(request_of(1, 4, is_streamed=False))
    scheduler.add(request_of(2, 4, is_streamed=True))
    step(scheduler)
    scheduler.add(request_of(3, 200, is_streamed=False))
    assert entries(step(scheduler)) == [(1, 4, 1), (2, 4, 1), (3, 0, 29)]
    scheduler.finish(2, FinishReason.ABORT)
    assert entries(step(scheduler)) == [(1, 5, 1), (3, 29, 171)]


def test_a_stop_token_ends_a_request_one_step_late() -> None:
    scheduler = scheduler_of()
    request = request_of(1, 4, stop_token_ids=frozenset({5}))
    scheduler.add(request)
    first, second = planned(scheduler), planned(scheduler)
    assert scheduler.update(first, result_of(first, token=5)) == [request]
    assert request.finish_reason is FinishReason.STOP and request.is_stop_token(5)
    assert scheduler.update(second, result_of(second)) == []
    assert request.tokens[-1] == 5 and request.num_output == 1


def test_a_freed_row_is_seated_again_in_the_next_plan_and_keeps_its_own_results() -> None:
    scheduler = scheduler_of(max_num_seqs=1)
    old, new = request_of(1, 4), request_of(2, 4)
    scheduler.add(old)
    scheduler.add(new)
    flying = planned(scheduler)
    assert scheduler.finish(1, FinishReason.ABORT) is old
    plan = planned(scheduler)
    assert plan.freed.tolist() == [1] and plan.seats[0].row == 1 and plan.seats[0].request == 2
    assert scheduler.update(flying, result_of(flying, token=5)) == []
    assert scheduler.update(plan, result_of(plan, token=6)) == [new]
    assert new.tokens[-1] == 6 and old.num_output == 0


def test_results_of_an_earlier_seat_are_void() -> None:
    scheduler = scheduler_of(block_size=4, num_kv_blocks=9, min_chunk_size=1)
    first, second = request_of(1, 11, max_tokens=20), request_of(2, 11, max_tokens=20)
    scheduler.add(first)
    scheduler.add(second)
    flying = [planned(scheduler)]
    while not second.num_preemptions:
        flying.append(planned(scheduler))
    scheduler.finish(1, FinishReason.ABORT)
    again = planned(scheduler)
    assert entries(again) == [(2, 0, 11)], "what was in flight will be drawn again"
    for plan in flying:
        assert scheduler.update(plan, result_of(plan, token=5)) == []
    scheduler.update(again, result_of(again, token=6))
    assert second.tokens.tolist()[11:] == [6] and second.num_unknown == 0


def test_failed_rows_end_alone() -> None:
    scheduler = scheduler_of()
    requests = [request_of(number, 4) for number in (1, 2, 3)]
    for request in requests:
        scheduler.add(request)
    plan = planned(scheduler)
    result = result_of(plan)
    result.failed.append(1)
    assert scheduler.update(plan, result) == requests
    assert [r.finish_reason for r in requests] == [None, FinishReason.ERROR, None]
    assert requests[1].num_output == 0
    assert step(scheduler).requests.tolist() == [1, 3]


def test_finishing_twice_does_nothing() -> None:
    scheduler = scheduler_of()
    request = request_of(1, 4)
    scheduler.add(request)
    assert scheduler.finish(1, FinishReason.ABORT) is request
    assert scheduler.finish(1, FinishReason.STOP) is None
    assert request.finish_reason is FinishReason.ABORT and not scheduler.has_work


def test_waits_name_what_lacks_and_who_has_it() -> None:
    scheduler = scheduler_of(max_num_seqs=2, max_num_batched_tokens=32)
    for number in (1, 2, 3):
        scheduler.add(request_of(number, 14))
    assert step(scheduler).waits == ((3, "rows", (1, 2)),)
    scheduler = scheduler_of(max_num_batched_tokens=32)
    for number in (1, 2):
        scheduler.add(request_of(number, 30))
    assert step(scheduler).waits == ((2, "budget", (1,)),)
    scheduler = scheduler_of(num_kv_blocks=4)
    for number in (1, 2):
        scheduler.add(request_of(number, 30))
    assert step(scheduler).waits == ((2, "blocks", (1,)),)


def test_waits_name_a_bounded_number_of_others() -> None:
    scheduler = scheduler_of(max_num_seqs=20)
    for number in range(1, 30):
        scheduler.add(request_of(number, 2))
    assert step(scheduler).waits == ((21, "rows", (1, 2, 3, 4, 5, 6, 7, 8)),)


def test_a_head_that_waits_for_memory_is_overtaken_a_bounded_number_of_times() -> None:
    scheduler = scheduler_of(num_kv_blocks=21, max_overtakes=3, min_chunk_size=1)
    scheduler.add(request_of(1, 16 * 12, max_tokens=200))
    step(scheduler)
    scheduler.add(request_of(2, 16 * 15, max_tokens=1))
    seated = []
    for number in range(3, 12):
        scheduler.add(request_of(number, 4, max_tokens=2, priority=1))
        plan = step(scheduler)
        seated += [seat.request for seat in plan.seats]
        assert plan.waits[0].request == 2 and plan.waits[0].reason == "blocks"
    assert seated == [3, 4, 5]
    scheduler.finish(1, FinishReason.ABORT)
    assert [seat.request for seat in step(scheduler).seats][0] == 2


def test_the_largest_rank_is_preempted_and_not_readmitted_in_the_same_step() -> None:
    scheduler = scheduler_of(block_size=4, num_kv_blocks=9, min_chunk_size=1)
    requests = [request_of(number, 7, max_tokens=20) for number in (1, 2, 3)]
    for request in requests:
        scheduler.add(request)
    while not scheduler.num_preemptions:
        plan = step(scheduler)
    victim = requests[2]
    assert [r.num_preemptions for r in requests] == [0, 0, 1]
    assert plan.requests.tolist() == [1, 2] and not plan.seats
    assert plan.waits[0].reason == "blocks" and plan.waits[0].request == victim.number


def test_a_long_request_is_preempted_for_a_later_short_one_ahead_of_it_and_ends() -> None:
    scheduler = scheduler_of(block_size=4, num_kv_blocks=17, min_chunk_size=1)
    long, short = request_of(1, 24, max_tokens=20), request_of(2, 7, max_tokens=40)
    scheduler.add(long)
    scheduler.add(short)
    rank = long.rank
    while scheduler.has_work:
        step(scheduler)
    assert short.num_preemptions == 0 < long.num_preemptions
    assert long.rank == rank and long.finish_reason is FinishReason.LENGTH


def test_a_low_priority_request_is_preempted_for_an_older_one() -> None:
    scheduler = scheduler_of(block_size=4, num_kv_blocks=9, min_chunk_size=1, max_num_seqs=2)
    low, high = request_of(1, 7, max_tokens=20, priority=1), request_of(2, 7, max_tokens=20)
    scheduler.add(low)
    scheduler.add(high)
    while scheduler.has_work:
        step(scheduler)
    assert low.num_preemptions > 0 and high.num_preemptions == 0


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_a_cache_for_one_longest_request_finishes_64(num_in_flight: int) -> None:
    scheduler = scheduler_of(
        block_size=4, num_kv_blocks=11, max_model_len=41, max_num_batched_tokens=32, min_chunk_size=4
    )
    runner = FakeRunner(11, 4, 64)
    requests = [request_of(number, 8 + number % 3, max_tokens=60) for number in range(1, 65)]
    for request in requests:
        request.stop_token_ids = frozenset()
        scheduler.add(request)
    in_flight = []
    for _ in range(64 * 41 * 3):
        plan = scheduler.schedule(0.0)
        if plan is not None:
            in_flight.append((plan, runner.run(plan)))
        if in_flight and (plan is None or len(in_flight) == num_in_flight):
            scheduler.update(*in_flight.pop(0))
        if not scheduler.has_work:
            break
    assert all(len(r.tokens) == 41 and r.finish_reason is FinishReason.LENGTH for r in requests)
    assert scheduler.num_free_blocks == 10
    for request in requests:
        prompt = request.tokens[: request.num_prompt]
        expected = generate(prompt, request.params.seed, 41 - len(prompt), frozenset())
        assert request.tokens.tolist()[request.num_prompt :] == expected


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    scheduler = scheduler_of(block_size=4, num_kv_blocks=17, min_chunk_size=1)
    first, second = request_of(1, 11, max_tokens=60), request_of(2, 11, max_tokens=60)
    scheduler.add(first)
    scheduler.add(second)
    while not second.num_preemptions:
        step(scheduler)
    num_tokens = len(second.tokens)
    assert num_tokens > 16
    scheduler.finish(1, FinishReason.ABORT)
    (entry,) = entries(step(scheduler))
    assert entry[1] >= (num_tokens - 1) // 4 * 4 - 4 > 11, "outputs are in the prefix cache too"
    assert second.num_cached_tokens == 0, "only the first admission counts"


def seated_parent(num_prompt: int) -> tuple[Scheduler, Request]:
    scheduler = scheduler_of(block_size=4)
    parent = request_of(1, num_prompt)
    scheduler.add(parent)
    step(scheduler)
    return scheduler, parent


def test_a_fork_shares_full_blocks_and_copies_the_one_it_writes_to() -> None:
    scheduler, parent = seated_parent(11)
    child = request_of(2, parent.tokens[:11])
    scheduler.fork(parent, child)
    plan = step(scheduler)
    assert entries(plan) == [(1, 11, 1), (2, 10, 1)]
    assert child.blocks[:2] == parent.blocks[:2] and child.blocks[2] != parent.blocks[2]
    assert plan.copies.tolist() == [parent.blocks[2], child.blocks[2]]
    assert [scheduler.kv.pool.ref_counts[block] for block in child.blocks] == [2, 2, 1]
    assert child.num_cached_tokens == 10


def test_a_fork_at_a_block_edge_copies_nothing() -> None:
    scheduler, parent = seated_parent(9)
    child = request_of(2, [*parent.tokens[:8], 77])
    scheduler.fork(parent, child)
    plan = step(scheduler)
    assert entries(plan)[1] == (2, 8, 1) and not plan.copies


def test_a_fork_of_a_fork_seated_in_the_same_step_copies_from_nobody_in_it() -> None:
    scheduler, parent = seated_parent(11)
    child, grandchild = request_of(2, parent.tokens[:11]), request_of(3, parent.tokens[:11])
    scheduler.fork(parent, child)
    scheduler.fork(child, grandchild)
    plan = step(scheduler)
    assert plan.copies.tolist() == [parent.blocks[2], child.blocks[2]]
    assert entries(plan)[2] == (3, 8, 3)


def test_a_fork_whose_parent_is_gone_is_a_request_like_any_other() -> None:
    scheduler, parent = seated_parent(11)
    child = request_of(2, parent.tokens[:11])
    scheduler.fork(parent, child)
    scheduler.finish(1, FinishReason.ABORT)
    plan = step(scheduler)
    assert entries(plan) == [(2, 8, 3)] and not plan.copies


def test_a_fork_without_a_row_waits_at_its_parents_place() -> None:
    scheduler = scheduler_of(block_size=4, max_num_seqs=1)
    parent, other = request_of(1, 11), request_of(2, 11)
    scheduler.add(parent)
    scheduler.add(other)
    step(scheduler)
    child = request_of(3, parent.tokens[:11])
    scheduler.fork(parent, child)
    assert child.rank == (0, parent.rank[1], 3)
    assert step(scheduler).waits[0].request == 3
    scheduler.finish(1, FinishReason.STOP)
    assert step(scheduler).requests.tolist() == [3]


def test_a_fork_must_start_as_its_parent() -> None:
    scheduler, parent = seated_parent(11)
    with pytest.raises(AssertionError, match="not a fork"):
        scheduler.fork(parent, request_of(2, 11))


def test_the_same_prompt_again_is_a_prefix_hit() -> None:
    scheduler = scheduler_of(block_size=4, max_num_seqs=1)
    requests = [request_of(number, range(1, 14), max_tokens=1) for number in (1, 2)]
    for request in requests:
        scheduler.add(request)
    assert entries(step(scheduler)) == [(1, 0, 13)]
    assert entries(step(scheduler)) == [(2, 12, 1)]
    assert [r.num_cached_tokens for r in requests] == [0, 12]


def test_first_planned_is_the_time_of_the_first_seat() -> None:
    scheduler = scheduler_of()
    request = request_of(1, 4, arrival=1.0)
    scheduler.add(request)
    assert request.first_planned is None
    scheduler.schedule(2.5)
    scheduler.schedule(3.5)
    assert request.first_planned == 2.5


def test_the_cache_is_well_used_with_64_mixed_rows() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=2048, num_kv_blocks=4096)
    for number in range(1, 65):
        scheduler.add(request_of(number, 40 + 13 * number, max_tokens=200))
    assert scheduler.kv.usage == 0.0 and scheduler.kv_utilization == 1.0
    while scheduler.num_waiting:
        step(scheduler)
    figures = []
    for _ in range(120):
        step(scheduler)
        figures.append(scheduler.kv_utilization)
    assert scheduler.num_running == 64 and 0.0 < scheduler.kv.usage < 1.0
    assert min(figures) >= 0.95 and max(figures) < 1.0


def test_a_request_that_outgrows_the_model_ends_by_length() -> None:
    scheduler = scheduler_of(max_model_len=20)
    request = request_of(1, 15, max_tokens=100)
    scheduler.add(request)
    plans = []
    while (plan := scheduler.schedule(0.0)) is not None:
        plans.append(plan)
    assert len(plans) == 5
    for plan in plans:
        scheduler.update(plan, result_of(plan))
    assert len(request.tokens) == 20 and request.finish_reason is FinishReason.LENGTH


def test_the_result_of_another_step_is_refused() -> None:
    scheduler = scheduler_of()
    scheduler.add(request_of(1, 4))
    first, second = planned(scheduler), planned(scheduler)
    with pytest.raises(AssertionError, match="another step"):
        scheduler.update(first, result_of(second))


def test_a_plan_reads_row_by_row() -> None:
    scheduler = scheduler_of()
    scheduler.add(request_of(1, [5, 6, 7]))
    (work,) = planned(scheduler).works()
    assert (work.request, work.row, work.tokens, work.num_logits) == (1, 1, (5, 6, 7), 1)
    assert StepPlan(0).num_batched_tokens == 0 and isinstance(Request.num_owed, property)

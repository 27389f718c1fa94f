"""The record of steps, the account of a request, and the trace, on a clock that the test winds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minillm.core.scheduler import Scheduler
from minillm.engine import timeline as timeline_module
from minillm.engine.engine import Engine
from minillm.engine.explain import explain
from minillm.engine.trace import trace
from minillm.types import FinishReason, SamplingParams
from tests.core.builders import limits_of
from tests.engine.clockwork import add, engine_of, run


def account_of(engine: Engine, number: int) -> dict[str, Any]:
    account = explain(engine.timeline, number, engine.clock())
    assert account is not None
    return account


@pytest.mark.parametrize("overlap", [False, True])
def test_a_record_says_what_a_step_did(overlap: bool) -> None:
    engine = engine_of(overlap, max_num_batched_tokens=64)
    add(engine, 8, 4)
    add(engine, 100, 2)
    run(engine)
    steps = engine.timeline.last_steps()
    assert [(r.num_tokens, r.num_decodes, r.chunks()) for r in steps[:3]] == [
        (58, 0, [(1, 0, 8), (2, 0, 50)]),
        (51, 1, [(2, 50, 50)]),
        (2, 2, []),
    ]
    assert [r.plan.step for r in steps] == list(range(len(steps)))
    assert all(r.applied is not None and r.seconds == pytest.approx(1 + r.num_tokens / 100) for r in steps)
    assert all(a.applied == b.started for a, b in zip(steps, steps[1:], strict=False))
    assert [r.device_seconds for r in steps] == pytest.approx([r.seconds for r in steps])
    assert (steps[0].num_running, steps[0].num_waiting, steps[0].num_used) == (2, 0, 1 + 4)
    assert engine.timeline.last_steps(since=steps[-2].plan.step) == steps[-1:]


def test_waiting_for_budget_is_told_with_whom_it_waited_behind() -> None:
    engine = engine_of(max_num_batched_tokens=50)
    add(engine, 100, 4)
    last = add(engine, 60, 2)
    run(engine)
    account = account_of(engine, 2)
    assert account["waits"]["budget"] == {"steps": 2, "seconds": pytest.approx(3.0)}
    assert account["waits"]["step"]["seconds"] == pytest.approx(0.0)
    assert account["seconds"]["queue"] == pytest.approx(3.0)
    assert account["behind"] == [{"reason": "budget", "first_step": 0, "last_step": 1, "requests": [1]}]
    assert account["seconds"]["total"] == pytest.approx(last.timings.e2el)
    assert "3.00 s (2 steps) for token budget, behind request 1" in account["words"][1]


def test_waiting_behind_one_that_came_later_and_is_shorter_is_told() -> None:
    engine = engine_of(max_num_batched_tokens=50)
    for num_prompt in (200, 150, 20):
        add(engine, num_prompt, 2)
    run(engine)
    waits = [{"reason": "budget", "first_step": 0, "last_step": 4, "requests": [3, 1]}]
    assert account_of(engine, 2)["behind"] == waits
    assert account_of(engine, 3)["waits"]["step"]["seconds"] == pytest.approx(0.0)


def test_waiting_in_line_behind_one_that_waits_for_a_row() -> None:
    engine = engine_of(max_num_seqs=1)
    for _ in range(3):
        add(engine, 10, 3)
    run(engine)
    behind = account_of(engine, 3)["behind"]
    assert behind == [{"reason": "rows", "first_step": 0, "last_step": 5, "requests": [2, 1]}]
    assert account_of(engine, 2)["behind"] == [{"reason": "rows", "first_step": 0, "last_step": 2, "requests": [1]}]
    assert account_of(engine, 3)["waits"]["rows"]["steps"] == 6
    assert account_of(engine, 2)["waits"]["rows"]["steps"] == 3
    assert set(account_of(engine, 1)["waits"]) == {"step"}


def test_a_request_that_comes_during_a_step_waits_for_its_end() -> None:
    engine = engine_of()
    add(engine, 10, 3)
    engine.step()
    late = engine.add([7] * 5, SamplingParams(max_tokens=2), arrival=engine.clock() - 0.25)
    run(engine)
    assert account_of(engine, late.request.number)["waits"] == {"step": {"steps": 0, "seconds": pytest.approx(0.25)}}


def test_time_before_the_engine_had_the_request_counts_by_what_its_queue_waited_for_then() -> None:
    """A front end may hold requests back, for a fair order of its own."""
    engine = engine_of(max_num_seqs=1)
    for _ in range(2):
        add(engine, 10, 3)
    arrival = engine.clock() + 1.05
    for _ in range(2):
        engine.step()
    late = engine.add([7] * 5, SamplingParams(max_tokens=2), arrival=arrival)
    run(engine)
    account = account_of(engine, late.request.number)
    assert account["waits"]["rows"] == {"steps": 5, "seconds": pytest.approx(0.05 + 4 * 1.01 + 1.1)}
    assert account["waits"]["step"]["seconds"] == pytest.approx(0.0)
    assert account["seconds"]["queue"] == pytest.approx(account["waits"]["rows"]["seconds"])
    assert account["behind"][0]["requests"] == [2, 1]


def test_chunks_and_the_steps_shared_with_them() -> None:
    engine = engine_of(max_num_batched_tokens=32)
    add(engine, 8, 20)
    add(engine, 90, 2)
    engine.add([5] * 40, SamplingParams(max_tokens=2, ignore_eos=True), priority=1)
    run(engine)
    first, second = account_of(engine, 1), account_of(engine, 2)
    assert [(c["step"], c["start"], c["tokens"], c["num_decodes"]) for c in second["chunks"]] == [
        (0, 0, 23, 0),
        (1, 23, 23, 1),
        (2, 46, 22, 1),
        (3, 68, 22, 1),
    ]
    assert second["num_chunks"] == 4
    assert (first["num_mixed_steps"], second["num_mixed_steps"]) == (5, 1)
    worst = first["worst_gaps"][0]
    assert (worst["seconds"], worst["steps"], worst["tokens"]) == (pytest.approx(1.24), [1], 24)
    assert worst["chunks"] == [{"request": 2, "tokens": 23}]
    assert first["words"][-2].endswith("5 steps meanwhile also computed chunks of prompts.")
    assert "is step 1, which also computed 23 tokens of request 2" in first["words"][-1]


def test_a_prompt_that_a_step_has_no_budget_for() -> None:
    engine = engine_of(max_num_batched_tokens=64)
    add(engine, 40, 9)
    add(engine, 100, 2)
    engine.step()
    engine.add([5] * 300, SamplingParams(max_tokens=2), priority=-1)
    run(engine)
    starved = [r for r in engine.timeline.last_steps()[:7] if 2 not in r.plan.requests]
    account = account_of(engine, 2)
    assert account["num_starved_steps"] == len(starved) > 0
    assert "had no budget for it" in account["words"][2]


def test_a_preemption_is_told() -> None:
    engine = engine_of(num_kv_blocks=9, block_size=4, enable_prefix_caching=False)
    add(engine, 8, 24)
    add(engine, 8, 24)
    run(engine)
    account = account_of(engine, 2)
    assert len(account["preempted_in_steps"]) == engine.scheduler.num_preemptions >= 1
    assert len(account["seated_in_steps"]) == 1 + len(account["preempted_in_steps"])
    planned = {record.plan.step: record.planned for record in engine.timeline.last_steps()}
    absences = list(zip(account["preempted_in_steps"], account["seated_in_steps"][1:], strict=True))
    without_row = [planned[back] - planned[lost] for lost, back in absences]
    assert account["seconds"]["queue"] == pytest.approx(sum(without_row))
    assert account["waits"]["blocks"]["seconds"] == pytest.approx(sum(without_row))
    assert account["waits"]["blocks"]["steps"] == sum(back - lost for lost, back in absences)
    seconds = account["seconds"]
    assert seconds["requeued"] == pytest.approx(sum(without_row))
    parts = seconds["queue"] + seconds["prefill"] + seconds["decode"] - seconds["requeued"]
    assert parts == pytest.approx(seconds["total"]), "nothing is counted twice"
    assert account["worst_gaps"][0]["was_preempted"]
    assert any("lost its KV blocks" in words for words in account["words"])
    assert account_of(engine, 1)["preempted_in_steps"] == []


def test_live_requests_are_told_of_as_they_stand() -> None:
    engine = engine_of(max_num_seqs=2, max_num_batched_tokens=64)
    for num_prompt in (8, 100, 60):
        add(engine, num_prompt, 4)
    engine.step()
    assert [account_of(engine, number)["state"] for number in (1, 2, 3)] == ["decoding", "prompt", "queued"]
    assert account_of(engine, 3)["waits"]["rows"]["seconds"] == pytest.approx(1.0 + 58 / 100)
    assert account_of(engine, 3) == account_of(engine, 3), "asking changes nothing"
    engine.close()
    assert [account_of(engine, number)["state"] for number in (1, 2, 3)] == ["ended"] * 3
    assert explain(engine.timeline, 4, 0.0) is None


def test_ends_in_every_state_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_module, "MAX_ENDED", 5)
    engine = engine_of(max_num_seqs=3, max_num_batched_tokens=32, num_kv_blocks=12)
    for number in range(12):
        generation = add(engine, 20 + number, 8)
        if number % 3 == 0:
            engine.step()
            engine.finish(generation, FinishReason.ABORT)
    run(engine)
    timeline = engine.timeline
    assert not timeline.live and not timeline._owners and not timeline._prompts
    assert len(timeline.ended) == 5
    assert all(story.request is None for story in timeline.ended.values())


def test_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_module, "MAX_STEPS", 4)
    engine = engine_of()
    add(engine, 4, 20)
    run(engine)
    assert [r.plan.step for r in engine.timeline.last_steps()] == [16, 17, 18, 19]
    account = account_of(engine, 1)
    assert account["first_step_on_record"] == 16 and account["chunks"] == []
    assert account["num_chunks"] == 1, "counts cover the whole life"


def test_states_of_blocks() -> None:
    scheduler = Scheduler(limits_of(num_kv_blocks=20, block_size=4))
    engine = engine_of(scheduler=scheduler)
    engine.add([5] * 13, SamplingParams(max_tokens=1))
    run(engine)
    states = engine.timeline.block_states()
    assert len(states) == 19
    assert sorted(states.tolist()) == [0] * 16 + [1] * 3
    for _ in range(2):
        engine.add([5] * 13, SamplingParams(max_tokens=3, ignore_eos=True))
    engine.step()
    assert sorted(engine.timeline.block_states().tolist()) == [0] * 14 + [2] * 2 + [3] * 3
    record = engine.timeline.last_steps()[-1]
    assert (record.num_used, record.num_shared, record.num_cached) == (5, 3, 0)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_trace_has_every_step_and_chunk_once(overlap: bool) -> None:
    engine = engine_of(overlap, max_num_batched_tokens=64)
    add(engine, 8, 6)
    add(engine, 100, 4)
    run(engine)
    events = json.loads("".join(trace(engine.timeline)))["traceEvents"]
    steps = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert [e["args"]["step"] for e in steps] == [r.plan.step for r in engine.timeline.last_steps()]
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in zip(steps, steps[1:], strict=False))
    slices = sorted((e for e in events if e["ph"] == "X" and e["pid"] == 2), key=lambda e: (e["ts"], e["tid"]))
    rows = [(e["args"]["request"], e["args"]["steps"], e["name"]) for e in slices]
    assert rows[:3] == [(1, 1, "8 · request 1"), (2, 1, "50 · request 2"), (1, 5, "decode · request 1")]
    assert [e["args"]["running"] for e in events if e["ph"] == "C" and e["name"] == "requests"][0] == 2


def test_no_token_is_in_what_is_told() -> None:
    engine = engine_of()
    engine.add([7654] * 40, SamplingParams(max_tokens=3))
    run(engine)
    assert "7654" not in json.dumps(account_of(engine, 1)) + "".join(trace(engine.timeline))


def test_a_live_request_has_the_counts_of_its_last_seat() -> None:
    """They are noted when they change, not with each token."""
    engine = engine_of(overlap=True, max_num_seqs=4, num_kv_blocks=14, max_num_batched_tokens=32)
    generations = [add(engine, 40, 40) for _ in range(4)]
    while engine.has_work:
        for generation in engine.step():
            request, timings = generation.request, generation.timings
            assert len(timings.token_times) == request.num_output
            assert timings.first_planned == request.first_planned is not None
            if generation.finish_reason is None:
                assert timings.num_chunks == request.num_chunks
                assert timings.num_preemptions == request.num_preemptions
    assert max(generation.timings.num_preemptions for generation in generations) > 0
    assert all(generation.timings.num_steps >= 41 for generation in generations)

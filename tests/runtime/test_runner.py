"""Steps run in the order in which they were submitted, whoever is waited for first."""

from __future__ import annotations

import pytest

from minillm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
OPTIONS = {"device": "cpu", "dtype": "float32", "num_kv_blocks": 16, "max_model_len": 64, "overlap": False}


def test_waiting_for_the_second_of_two_steps_runs_the_first_before_it() -> None:
    with LLM("random:tiny-llama", **OPTIONS) as llm:
        expected = llm.generate([[5, 6, 7]], GREEDY)[0].token_ids
        scheduler, runner = llm.engine.scheduler, llm.engine.runner
        generation = llm.engine.add([5, 6, 7], GREEDY)
        plans = [scheduler.schedule(0.0), scheduler.schedule(0.0)]
        assert [plan.num_tokens.tolist() for plan in plans if plan] == [[3], [0]], "the device has the second's token"
        pending = [runner.submit(plan) for plan in plans if plan]
        second, first = pending[1].wait(), pending[0].wait()
        assert [*first.tokens, *second.tokens] == expected[:2]
        for plan, result in zip(plans, (first, second), strict=True):
            assert plan is not None
            scheduler.update(plan, result)
        assert generation.take_new_tokens() == expected[:2]


def test_a_step_that_fails_says_so_to_the_one_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM("random:tiny-llama", **OPTIONS) as llm:
        llm.engine.add([5, 6, 7], GREEDY)
        plan = llm.engine.scheduler.schedule(0.0)
        assert plan is not None
        runner = llm.engine.runner
        monkeypatch.setattr(runner, "kv_cache", None)
        pending = runner.submit(plan)
        with pytest.raises(TypeError):
            pending.wait()

"""What a front end is told: plain values that JSON has, ids and no contents, and histograms that add up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from minillm.engine import insight as insight_module
from minillm.engine.engine import Engine
from minillm.engine.figures import Histogram
from minillm.engine.insight import Insight
from minillm.engine.recorder import RecordingScheduler
from minillm.types import FinishReason, SamplingParams
from tests.core.builders import limits_of
from tests.engine.clockwork import add, engine_of, run

TOKEN = 7654


def busy_engine() -> Engine:
    """Requests in every state: ended, decoding, half done, queued."""
    limits = limits_of(max_num_batched_tokens=64, max_num_seqs=3, num_kv_blocks=60)
    engine = engine_of(scheduler=RecordingScheduler(limits, 100))
    add(engine, 10, 1)
    for num_prompt in (20, 200, 110, 120):
        engine.add([TOKEN] * num_prompt, SamplingParams(max_tokens=50, ignore_eos=True))
    engine.step()
    engine.step()
    return engine


def plain(value: Any) -> Any:
    """As it comes out of a process's other end, or out of the pieces of a long answer."""
    if isinstance(value, Iterator):
        return json.loads("".join(value))
    return json.loads(json.dumps(value, allow_nan=False))


def test_every_query_gives_plain_values_without_contents() -> None:
    engine = busy_engine()
    insight = Insight(engine, {number + 100: number for number in range(1, 6)})
    answers = {name: plain(query(102) if name == "explain" else query()) for name, query in insight.queries.items()}
    assert all(answers.values())
    assert str(TOKEN) not in json.dumps(answers)
    assert insight.explain(7) is None


def test_the_feed_shows_steps_requests_and_blocks() -> None:
    engine = busy_engine()
    feed = plain(Insight(engine, {}).feed())
    assert [step["step"] for step in feed["steps"]] == [0, 1]
    assert feed["steps"][1]["decodes"] == [2]
    assert [chunk["request"] for chunk in feed["steps"][0]["chunks"]] == [1, 2, 3]
    states = {request["request"]: request["state"] for request in feed["requests"]}
    assert states == {2: "decoding", 3: "prompt", 4: "queued", 5: "queued"}
    assert [end["request"] for end in feed["ended"]] == [1]
    assert feed["ended"][0]["ttft"] == pytest.approx(engine.timeline.ended[1].timings.ttft)
    assert (feed["num_running"], feed["num_waiting"]) == (2, 2)
    num = feed["blocks"]["num"]
    assert sum(num.values()) == 59 and num["used"] == 59 - engine.scheduler.num_free_blocks
    assert [feed["blocks"]["cells"].count(digit) for digit in "0123"] == list(num.values())
    assert plain(Insight(engine, {}).feed(since=0))["steps"] == feed["steps"][1:]


def test_a_large_cache_is_shown_in_few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insight_module, "MAX_CELLS", 16)
    blocks = Insight(busy_engine(), {}).block_cells()
    assert blocks["per_cell"] == 4 and len(blocks["cells"]) == 15
    assert set(blocks["cells"]) == {"0", "2"}


def test_histograms_count_what_requests_and_steps_did() -> None:
    engine = engine_of(max_num_batched_tokens=64)
    add(engine, 10, 4)
    add(engine, 100, 1)
    engine.finish(add(engine, 5, 5), FinishReason.ABORT)
    run(engine)
    figures = plain(Insight(engine, {}).figures())
    histograms = figures["histograms"]
    totals = figures["totals"]
    assert figures["ended"] == {"stop": 0, "length": 2, "abort": 1, "rejected": 0, "error": 0}
    assert sum(histograms["e2e_request_latency_seconds"]["counts"]) == 3
    assert sum(histograms["time_to_first_token_seconds"]["counts"]) == 2
    assert sum(histograms["inter_token_latency_seconds"]["counts"]) == 3
    assert histograms["iteration_tokens_total"]["sum"] == totals["num_batched_tokens"] == 110 + 3
    assert histograms["request_prompt_tokens"]["sum"] == 115
    assert histograms["request_generation_tokens"]["sum"] == totals["num_output_tokens"] == 5
    parts = [f"request_{part}_time_seconds" for part in ("queue", "prefill", "decode")]
    whole = histograms["e2e_request_latency_seconds"]["sum"]
    assert sum(histograms[part]["sum"] for part in parts) == pytest.approx(whole)


def test_totals_count_requests_under_way() -> None:
    engine = engine_of()
    insight = Insight(engine, {})
    before: dict[str, Any] = {}
    for _ in range(2):
        add(engine, 20, 3)
    while engine.has_work:
        engine.step()
        totals = insight.figures()["totals"]
        assert all(
            totals[name] >= before.get(name, 0) for name in totals if name.startswith("num_") and "ing" not in name
        )
        before = totals
        if totals["num_steps"] == 1:
            assert (totals["num_prompt_tokens"], totals["num_output_tokens"]) == (40, 2)
    assert (before["num_prompt_tokens"], before["num_output_tokens"]) == (40, 6)


def test_a_value_on_a_bound_lies_below_it() -> None:
    histogram = Histogram((1, 2, 5))
    values = (0.5, 1, 1.5, 2, 5, 6)
    for value in values:
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([2, 2, 1, 1], 16)
    at_once = Histogram((1, 2, 5))
    at_once.observe_all(np.array(values))
    assert at_once.as_dict() == histogram.as_dict()

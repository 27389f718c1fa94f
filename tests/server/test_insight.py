"""What the server tells of its engine: who may ask, that the figures are true, and that no contents are in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minillm.engine.async_engine import TokenStream
from minillm.engine.replay import replay
from minillm.server.config import ServerConfig
from minillm.types import FinishReason, SamplingParams
from tests.architecture.sources import ROOT
from tests.server.live import TINY, Live, serving, threaded

KEY = "a-key-of-some-length"
PATHS = ("/metrics", "/trace", "/recording", "/insight/feed", "/insight/requests/1", "/v1/requests/x/explain")
PROMPT = [123] * 40


@pytest.fixture(scope="module")
def used(live: Live) -> Iterator[tuple[Live, dict[str, Any]]]:
    """A server that has answered a request, and its answer."""
    answer = live.post("/v1/completions", prompt=[PROMPT, PROMPT], max_tokens=8, ignore_eos=True).json()
    live.wait_idle()
    yield live, answer


def samples_of(live: Live) -> dict[str, float]:
    """Metrics by name, those with reasons or bounds by name and that label."""
    found = {}
    for family in text_string_to_metric_families(live.client.get("/metrics").text):
        for sample in family.samples:
            label = sample.labels.get("finished_reason") or sample.labels.get("le")
            found[sample.name + (f" {label}" if label else "")] = sample.value
    return found


def test_metrics_have_vllms_names_and_true_values(used: tuple[Live, dict[str, Any]]) -> None:
    live, _ = used
    before = samples_of(live)
    assert live.post("/v1/completions", prompt=[7] * 20, max_tokens=5, ignore_eos=True).status_code == 200
    live.wait_idle()
    after = samples_of(live)
    gained = {name: after[name] - before[name] for name in after}
    for prefix in ("vllm", "minillm"):
        assert gained[f"{prefix}:generation_tokens_total"] == 5
        assert gained[f"{prefix}:prompt_tokens_total"] == gained[f"{prefix}:prefix_cache_queries_total"] == 20
        assert gained[f"{prefix}:request_success_total length"] == 1
        assert gained[f"{prefix}:request_success_total abort"] == 0
        assert gained[f"{prefix}:time_to_first_token_seconds_count"] == 1
        assert gained[f"{prefix}:inter_token_latency_seconds_count"] == 4
        assert gained[f"{prefix}:iteration_tokens_total_sum"] == 20 + 4
        assert gained[f"{prefix}:e2e_request_latency_seconds_bucket +Inf"] == 1
        assert after[f"{prefix}:num_requests_running"] == after[f"{prefix}:kv_cache_usage_perc"] == 0
    assert gained["minillm:steps_total"] == 5
    assert "vllm:steps_total" not in after
    assert not [name for name in after if name.endswith("_created")]


def test_output_tokens_are_those_of_the_usage(live: Live) -> None:
    """The engine computes more of them before it hears of a stop string."""
    body = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 100, "ignore_eos": True}
    words = live.post("/v1/completions", **body).json()["choices"][0]["text"].split()
    before = samples_of(live)
    usage = live.post("/v1/completions", **body, n=2, stop=words[3]).json()["usage"]
    assert 0 < usage["completion_tokens"] < 100
    for name in ("vllm:generation_tokens_total", "minillm:generation_tokens_total"):
        assert samples_of(live)[name] - before[name] == usage["completion_tokens"]


def test_labels_have_few_values(used: tuple[Live, dict[str, Any]]) -> None:
    """Nothing that a client sends becomes a label."""
    live, _ = used
    live.post("/v1/completions", prompt=[9] * 5, max_tokens=1, user="nobody-else")
    text = live.client.get("/metrics").text
    assert "nobody-else" not in text
    assert set(re.findall(r'model_name="([^"]*)"', text)) == {TINY}
    labels = set(re.findall(r'[{,](\w+)="', text))
    assert labels == {
        "engine",
        "model_name",
        "finished_reason",
        "le",
        "block_size",
        "num_gpu_blocks",
        "enable_prefix_caching",
    }


def test_vllms_names_can_be_left_out() -> None:
    with serving(config=threaded(vllm_metrics=False)) as live:
        text = live.client.get("/metrics").text
    assert "minillm:num_requests_running" in text and "vllm:" not in text


def test_a_request_is_explained_by_its_id(used: tuple[Live, dict[str, Any]]) -> None:
    live, answer = used
    told = live.client.get(f"/v1/requests/{answer['id']}/explain").json()
    assert told["id"] == answer["id"]
    first, second = told["completions"]
    assert (first["num_prompt_tokens"], first["num_output_tokens"], first["state"]) == (40, 8, "ended")
    assert second["request"] == first["request"] + 1
    assert first["words"][0].startswith(f"Request {first['request']} took ")
    shown = live.client.get(f"/insight/requests/{first['request']}").json()
    assert shown == first
    assert live.client.get("/v1/requests/cmpl-unknown/explain").status_code == 404
    assert live.client.get("/insight/requests/99999").status_code == 404
    assert live.client.get("/insight/requests/0").status_code == 400


def test_one_that_is_held_back_is_explained_too(live: Live) -> None:
    """It has not reached the engine: rows are few, and others came first."""

    async def ask() -> list[TokenStream]:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        streams = [live.engine.submit([5] * 8, params)[0] for _ in range(30)]
        live.service.recent.add("probe", streams)
        return streams

    streams = live.run(ask())
    told = live.client.get("/v1/requests/probe/explain").json()["completions"]
    states = [completion["state"] for completion in told]
    assert len(told) == 30 and states[-1] == "held back", states
    assert all(completion["words"] for completion in told)
    for stream in streams:
        live.call(partial(live.engine.finish, stream, FinishReason.ABORT))
    live.wait_idle()


def test_trace_and_recording_are_files(used: tuple[Live, dict[str, Any]]) -> None:
    live, _ = used
    trace, recording = live.client.get("/trace"), live.client.get("/recording")
    assert 'filename="minillm-trace.json"' in trace.headers["content-disposition"]
    assert {event["ph"] for event in trace.json()["traceEvents"]} == {"M", "X", "C"}
    found = replay(recording.json())
    assert found.difference is None and found.num_steps > 0


def test_the_feed_goes_on_where_it_was(used: tuple[Live, dict[str, Any]]) -> None:
    live, _ = used
    feed = live.client.get("/insight/feed").json()
    assert feed["model"] == TINY and feed["steps"] and feed["ended"]
    last = feed["steps"][-1]["step"]
    live.post("/v1/completions", prompt=[11] * 5, max_tokens=3, ignore_eos=True)
    live.wait_idle()
    more = live.client.get(f"/insight/feed?since={last}").json()["steps"]
    assert [step["step"] for step in more] == [last + 1, last + 2, last + 3]
    assert live.client.get("/insight/feed?since=x").status_code == 400


def test_no_contents_are_told(live: Live) -> None:
    live.post("/v1/completions", prompt=[123] * 40, max_tokens=8, seed=456123789)
    live.wait_idle()
    for path in ("/trace", "/recording", "/insight/feed"):
        tokens = re.findall(r"\b456123789\b", live.client.get(path).text)
        assert tokens == []
    numbers = json.dumps(live.client.get("/insight/feed").json()["steps"])
    assert '"tokens": [' not in numbers


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    with serving(keys=[KEY]) as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
def test_what_is_told_needs_the_key(locked: Live, path: str) -> None:
    assert locked.client.get(path, headers={"Authorization": ""}).status_code == 401
    assert locked.client.get(path).status_code in (200, 404)


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(locked: Live) -> None:
    pages = {path: locked.client.get(path, headers={"Authorization": ""}) for path in ("/", "/static/app.js")}
    for response in pages.values():
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert pages["/static/app.js"].headers["content-type"].startswith("text/javascript")
    assert not re.search(r"(src|href)=\"(?!/static/)|<script>|style=| on\w+=", pages["/"].text)
    for path in ("/static/missing.js", "/static/../app.py", "/static/%2e%2e/app.py"):
        assert locked.client.get(path).status_code == 404


def test_an_engine_in_another_process_tells_the_same() -> None:
    with serving(config=ServerConfig(port=0, engine_process=True)) as live:
        answer = live.post("/v1/completions", prompt=PROMPT, max_tokens=4, ignore_eos=True).json()
        live.wait_idle()
        (account,) = live.client.get(f"/v1/requests/{answer['id']}/explain").json()["completions"]
        assert account["num_output_tokens"] == 4
        assert [step["tokens"] for step in live.client.get("/insight/feed").json()["steps"]] == [40, 1, 1, 1]
        assert samples_of(live)["vllm:generation_tokens_total"] == 4
        assert replay(live.client.get("/recording").json()) == (4, None)
        assert live.client.get("/trace").json()["traceEvents"]


def test_the_dashboard_asks_for_metrics_that_there_are(used: tuple[Live, dict[str, Any]]) -> None:
    board = (ROOT / "docs" / "grafana.json").read_text()
    names = set(re.findall(r"minillm:\w+", board))
    there = {name.partition(" ")[0] for name in samples_of(used[0])}
    assert len(names) > 15 and names <= there
    assert len({panel["id"] for panel in json.loads(board)["panels"]}) == 12

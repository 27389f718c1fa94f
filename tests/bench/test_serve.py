"""`bench serve`: its load, its figures, and a run against this package's own server."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from minillm.bench.client_processes import run_process
from minillm.bench.latency import Outcome, figures_of, goals_of
from minillm.bench.lengths import TRACES, length_of
from minillm.bench.serve import plan_load, run
from minillm.bench.serve_options import ServeOptions
from minillm.bench.stream_client import read_lines
from minillm.cli import app
from minillm.cli_bench import read_key
from minillm.errors import ConfigError
from tests.server.live import serving

KEY = "a-key-of-some-length"
SHORT: dict[str, Any] = {"num_prompts": 12, "input_len": "5:40", "output_len": "4:9", "vocab_size": 500}


@pytest.mark.parametrize(
    ("trace", "part", "quantiles"),
    [
        ("sharegpt", 0, {50: 1730, 90: 5696, 99: 7434}),
        ("sharegpt", 1, {50: 415, 90: 834, 99: 998}),
        ("arxiv", 0, {50: 7059, 90: 12985}),
        ("arxiv", 1, {50: 208, 90: 371}),
    ],
)
def test_traces_have_their_quantiles(trace: str, part: int, quantiles: dict[int, int]) -> None:
    rng = random.Random(0)
    lengths = [TRACES[trace][part](rng) for _ in range(20_000)]
    assert min(lengths) >= 1
    for share, expected in quantiles.items():
        assert np.percentile(lengths, share) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("text", ["", "x", "0", "5:", ":5", "9:3", "1:2:3", "-4", "1e3"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    if text == "5:":  # the same as 5
        assert length_of(text, "input_len")(random.Random(0)) == 5
        return
    with pytest.raises(ConfigError, match="input_len"):
        length_of(text, "input_len")


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals_have_their_rate_and_burstiness(burstiness: float, spread: float) -> None:
    """The times between gamma arrivals have a coefficient of variation of 1 / sqrt(shape)."""
    options = ServeOptions(num_prompts=8000, request_rate=20.0, burstiness=burstiness, input_len="1", output_len="1")
    times = [planned.at for planned in plan_load(options, None)]
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.1)


def test_the_load_is_the_same_at_one_seed_and_fits_the_server() -> None:
    options = ServeOptions(num_prompts=50, trace="sharegpt", request_rate=5.0)
    first, again = plan_load(options, 2048), plan_load(options, 2048)
    assert first == again
    assert first != plan_load(ServeOptions(num_prompts=50, trace="sharegpt", request_rate=5.0, seed=1), 2048)
    assert max(len(p.prompt) + p.num_output for p in first) == 2048
    assert all(p.prompt and 5 <= min(p.prompt) and max(p.prompt) < 10_000 for p in first)
    assert {p.at for p in plan_load(ServeOptions(num_prompts=9), None)} == {0.0}


def outcome(sent: float, times: list[float], num_output: int) -> Outcome:
    return Outcome(num_input=10, sent=sent, chunk_times=times, num_output=num_output)


def test_figures_are_those_of_vllms_benchmark() -> None:
    done = [outcome(0.0, [1.0, 1.1, 1.4], 3), outcome(0.5, [1.0, 2.0], 2), outcome(1.0, [3.0], 1)]
    failed = Outcome(num_input=10, sent=0.2, error="500")
    figures = figures_of([*done, failed], [50, 99, 99.9], {"ttft": 1.5, "tpot": 0.5})
    assert (figures["completed"], figures["failed"]) == (3, 1)
    assert figures["duration"] == 3.0
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (30, 6)
    assert figures["output_throughput"] == 2.0 and figures["total_token_throughput"] == 12.0
    assert figures["request_goodput"] == pytest.approx(1 / 3), "the second is too slow a token, the third its first"
    assert figures["mean_ttft_ms"] == pytest.approx(1e3 * (1.0 + 0.5 + 2.0) / 3)
    assert figures["median_tpot_ms"] == pytest.approx(1e3 * statistics.median([0.2, 1.0]))
    assert figures["mean_itl_ms"] == pytest.approx(1e3 * (0.1 + 0.3 + 1.0) / 3)
    assert figures["p50_e2el_ms"] == pytest.approx(1500)
    values = [1400.0, 1500.0, 2000.0]
    assert figures["p99_e2el_ms"] == pytest.approx(np.percentile(values, 99))
    assert figures["p99.9_e2el_ms"] == pytest.approx(np.percentile(values, 99.9))
    assert figures["std_e2el_ms"] == pytest.approx(np.std(values))
    assert figures["max_output_tokens_per_s"] == 4 and figures["max_concurrent_requests"] == 3


def test_nothing_done_gives_figures_too() -> None:
    figures = figures_of([Outcome(num_input=1, sent=0.0, error="x")], [99], {})
    assert (figures["completed"], figures["failed"], figures["output_throughput"]) == (0, 1, None)
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "itl:5", "e2el:0", "e2el:nan", "tpot:-1"])
def test_goals_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="goodput"):
        goals_of([text])


def test_a_run_against_our_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.svg"
    with serving(keys=[KEY]) as live:
        options = ServeOptions(
            base_url=live.url,
            request_rate=200.0,
            goodput="ttft:60000,e2el:60000",
            plot=plot,
            max_concurrency=4,
            **SHORT,
        )
        figures = run(options, KEY)
        live.wait_idle()
        planned = plan_load(options, 256)
        assert figures["completed"] == 12 and figures["failed"] == 0
        assert figures["total_input_tokens"] == sum(len(p.prompt) for p in planned)
        assert figures["total_output_tokens"] == sum(p.num_output for p in planned)
        assert figures["request_goodput"] == pytest.approx(figures["request_throughput"])
        assert 1 <= figures["max_concurrent_requests"] <= 4
        assert all(figures[f"p99_{metric}_ms"] > 0 for metric in ("ttft", "tpot", "itl", "e2el"))
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert json.loads(last)["completed"] == 12
        assert plot.read_text().lstrip().startswith("<?xml")
        with pytest.raises(ConfigError, match="does not list its models"):
            run(options, "a-key-that-is-wrong")
        with pytest.raises(ConfigError, match="no model 'other'"):
            run(ServeOptions(base_url=live.url, model="other", **SHORT), KEY)


def test_several_client_processes() -> None:
    with serving(keys=[KEY]) as live:
        options = ServeOptions(base_url=live.url, num_clients=3, max_concurrency=5, **SHORT)
        figures = run(options, KEY)
        live.wait_idle()
        planned = plan_load(options, 256)
        assert figures["completed"] == 12 and figures["failed"] == 0
        assert figures["total_input_tokens"] == sum(len(p.prompt) for p in planned)
        assert figures["total_output_tokens"] == sum(p.num_output for p in planned)
        assert 1 <= figures["max_concurrent_requests"] <= 5


def test_a_client_process_that_fails_says_so() -> None:
    with pytest.raises(ConfigError, match="ended with status 1"):
        asyncio.run(run_process("{}", lambda outcome: None))


def test_chat_and_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(keys=[KEY]) as live:
        command = f"bench serve --base-url {live.url} --endpoint chat --num-prompts 3 --input-len 9 --output-len 4"
        monkeypatch.setenv("MINILLM_API_KEY", KEY)
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout.strip().splitlines()[-1])["total_output_tokens"] == 12
        monkeypatch.delenv("MINILLM_API_KEY")
        path = tmp_path / "key"
        path.write_text(f"{KEY}\n")
        assert CliRunner().invoke(app, [*command.split(), "--api-key-file", str(path)]).exit_code == 0
        assert isinstance(CliRunner().invoke(app, command.split()).exception, ConfigError)
    with pytest.raises(ConfigError, match="api_key_file"):
        read_key(tmp_path / "missing")


def test_requests_that_fail_are_counted_alone() -> None:
    """A server that refuses every third request, breaks off every fifth, and lists its models."""
    num_asked = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal num_asked
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        num_asked += 1
        if num_asked > 1 and num_asked % 3 == 0:
            return httpx.Response(503, text="busy")
        if num_asked > 1 and num_asked % 5 == 0:
            return httpx.Response(200, text='data: {"error": {"message": "broken"}}\n\n')
        lines = [{"choices": [{"text": "a"}]}] * 2 + [{"choices": [], "usage": {"completion_tokens": 7}}]
        return httpx.Response(200, text="".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n")

    figures = run(ServeOptions(num_prompts=10, input_len="3", output_len="7"), transport=httpx.MockTransport(answer))
    assert (figures["completed"], figures["failed"]) == (5, 5)
    assert figures["total_output_tokens"] == 5 * 7


@pytest.mark.parametrize("event", ["5", "null", "{", '{"choices": {"a": 1}}', '{"usage": 7}', '{"choices": ["a"]}'])
def test_a_stream_that_is_none_is_a_failure_of_its_request(event: str) -> None:
    outcome = Outcome(1, 0.0)
    read_lines([(1.0, b'data: {"choices": [{"text": "a"}], "error": null}'), (2.0, f"data: {event}".encode())], outcome)
    assert outcome.error and outcome.chunk_times == [1.0]


def test_a_chunk_came_when_its_line_did() -> None:
    events = [{"delta": {"content": "a"}}, {"delta": {"role": "assistant"}}, {"text": "b"}, {"text": ""}]
    lines = [f"data: {json.dumps({'choices': [each]})}".encode() for each in events]
    lines += [b'data: {"usage": {"completion_tokens": 5}}', b'data:{"error": {"message": "busy"}}', b"data: [DONE]"]
    outcome = Outcome(1, 0.0)
    read_lines(list(enumerate(lines)), outcome)
    assert (outcome.chunk_times, outcome.num_output, outcome.error) == ([0, 2], 5, "busy")


@pytest.mark.parametrize("models", ["[1]", "null", '{"data": []}', '{"data": [{"x": 1}]}', '{"data": ["a"]}', "<html>"])
def test_a_server_that_lists_no_models_is_none(models: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=models))
    with pytest.raises(ConfigError, match="does not list its models"):
        run(ServeOptions(**SHORT), transport=transport)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_prompts", 0),
        ("request_rate", 0.0),
        ("burstiness", float("nan")),
        ("endpoint", "embeddings"),
        ("trace", "mine"),
        ("base_url", "localhost:8000"),
        ("vocab_size", 5),
        ("max_concurrency", 0),
        ("num_clients", 0),
    ],
)
def test_options_that_cannot_work_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        ServeOptions(**{name: value})

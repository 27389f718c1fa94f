"""`bench gap`: which gaps count, a run against this package's own server, and what ends it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from minillm.bench.gap import figures_of, run
from minillm.bench.gap_options import GapOptions
from minillm.bench.latency import Outcome
from minillm.cli import app
from minillm.config import EngineConfig
from minillm.errors import ConfigError
from tests.server.live import TINY, Live, serving

ENGINE = EngineConfig(
    device="cpu", dtype="float32", max_model_len=2048, num_kv_blocks=1024, max_num_seqs=8, max_num_batched_tokens=64
)
SHORT = GapOptions(num_streams=3, num_clients=1, input_len=8, long_len=400, seconds=0.3, vocab_size=500)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(TINY, ENGINE) as server:
        yield server


def test_gaps_before_and_during() -> None:
    """Two streams; the long prompt comes at 10 and is answered at 14."""
    steady = [7.0, 8.0, 9.0, 9.75, 11.0, 14.5, 15.0, 30.0]
    late = [9.0, 9.5, 12.0, 13.0, 14.0, 19.0]
    long = Outcome(num_input=5, sent=10.0, chunk_times=[14.0])
    figures = figures_of(8.0, long, [steady, late])
    assert figures["median_gap_before_ms"] == 750, "of 1, 0.75 and 0.5; the gap from 7 began too early"
    assert figures["max_gap_before_ms"] == 1000
    assert figures["max_gap_during_ms"] == 3500, "not the gap of 5 s, which began as the answer came"
    assert figures["median_gap_during_ms"] == 1250, "of 1.25, 3.5, 2.5, 1 and 1"
    assert figures["max_over_median"] == pytest.approx(3500 / 750)
    assert figures["long_ttft_ms"] == 4000


@pytest.mark.parametrize("num_clients", [1, 2, 7])
def test_a_run_against_our_server(live: Live, capsys: pytest.CaptureFixture[str], num_clients: int) -> None:
    aborted = live.num_aborted()
    figures = run(replace(SHORT, base_url=live.url, num_clients=num_clients))
    live.wait_idle()
    assert live.num_aborted() - aborted == SHORT.num_streams, "the streams were not given up"
    assert figures["num_streams"] == 3 and figures["long_tokens"] == 400
    assert 0 < figures["median_gap_before_ms"] <= figures["max_gap_before_ms"]
    assert figures["max_gap_during_ms"] >= figures["median_gap_during_ms"] > 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == json.loads(json.dumps(figures))


def test_the_command_line_on_a_server_slower_than_the_seconds_asked_for(live: Live) -> None:
    command = (
        f"bench gap --base-url {live.url} --num-streams 2 --input-len 5 --long-len 90 --vocab-size 99 --num-clients 1"
    )
    result = CliRunner().invoke(app, [*command.split(), "--seconds", "1e-9"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.strip().splitlines()[-1])["long_tokens"] == 90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"long_len": 2048}, "long_len 2048 is too long"),
        ({"output_len": 2}, "raise output_len"),
        ({"vocab_size": 10_000}, "a stream ended too early: 400"),
        ({"vocab_size": 10_000, "num_clients": 2}, "a stream ended too early: 400"),
        ({"model": "other"}, "no model 'other'"),
    ],
)
def test_what_cannot_be_measured_says_why(live: Live, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(replace(SHORT, base_url=live.url, **options))
    live.wait_idle()


def test_a_long_request_that_fails_says_why() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        if len(json.loads(request.content)["prompt"]) == 400:
            return httpx.Response(429, text="busy")
        return httpx.Response(200, stream=Endless())

    with pytest.raises(ConfigError, match="long request failed: 429: busy"):
        run(replace(SHORT, seconds=0.01), transport=httpx.MockTransport(answer))


@pytest.mark.parametrize("program", ["false", "true"])
def test_a_client_process_that_ends_says_so(live: Live, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", shutil.which(program))
    with pytest.raises(ConfigError, match=f"client process ended too early, with status {int(program == 'false')}"):
        run(replace(SHORT, base_url=live.url, num_clients=2))


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_client_processes_end_with_the_one_that_asks(live: Live, end: signal.Signals) -> None:
    """Whatever ends it, and in the middle of a question."""
    command = f"bench gap --base-url {live.url} --num-streams 2 --input-len 5 --long-len 90 --vocab-size 99"
    asking = subprocess.Popen(
        [sys.executable, "-m", "minillm", *command.split(), "--num-clients", "2", "--seconds", "60"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    live.wait_until(lambda: live.engine.num_unfinished == 2)
    os.killpg(asking.pid, end) if end is signal.SIGINT else asking.send_signal(end)
    _, errors = asking.communicate(timeout=30)
    assert b"Traceback" not in errors
    live.wait_idle()


class Endless(httpx.AsyncByteStream):
    """Tokens without end."""

    async def __aiter__(self) -> Any:
        while True:
            yield b'data: {"choices": [{"text": "a"}]}\n\n'
            await asyncio.to_thread(int)  # lets others run


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_streams", 0),
        ("num_clients", 0),
        ("output_len", 1),
        ("seconds", 0.0),
        ("vocab_size", 5),
        ("base_url", "localhost:8000"),
    ],
)
def test_options_that_cannot_work_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        GapOptions(**{name: value})

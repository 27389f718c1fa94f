"""A server from start to end: signals, a stuck step, a failed engine, and what a process started as users do tells."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.live import TINY, serving, threaded

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key-for-tests"
PROMPT = "very-private-words"
SLOW = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": True}
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--max-model-len", "2048", "--num-kv-blocks", "256", "--port", "0")


class Started:
    """A server in a process of its own."""

    def __init__(self, *options: str, python: tuple[str, ...] = ()) -> None:
        command = [sys.executable, *python, "-m", "minillm", "serve", "--model", TINY, *OPTIONS, *options]
        env = os.environ | {"MINILLM_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if " is served on " in line:
                break
        else:
            raise AssertionError("".join(self.lines))
        self.url = line.split()[-1]
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()))
        self._reader.start()
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def end(self) -> tuple[int, str]:
        """Its exit status and all that it printed, once it has ended."""
        status = self.process.wait(60)
        self._reader.join()
        return status, "".join(self.lines)


@contextmanager
def started(*options: str, python: tuple[str, ...] = ()) -> Iterator[Started]:
    server = Started(*options, python=python)
    try:
        yield server
    finally:
        server.client.close()
        server.process.kill()
        server.end()
        assert server.process.stderr is not None
        server.process.stderr.close()


def test_sigterm_lets_requests_finish_and_takes_no_more() -> None:
    with started() as server:
        with server.client.stream("POST", "/v1/completions", json=SLOW) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while server.client.get("/ready").status_code == 200:
                pass
            refused = server.client.post("/v1/completions", json=SLOW)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            assert server.client.get("/health").status_code == 200
            *_, last, done = lines
        assert done == "data: [DONE]" and json.loads(last[6:])["choices"][0]["finish_reason"] == "length"
        server.client.close()
        assert server.end()[0] == 0


def test_who_never_ends_is_not_waited_for() -> None:
    """A client that has sent half a body, after a SIGTERM."""
    with started("--receive-seconds", "3600", "--drain-seconds", "1") as server:
        host, _, port = server.url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=60) as half:
            half.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
                "Expect: 100-continue\r\nContent-Length: 9\r\n\r\n".encode()
            )
            assert half.recv(65536).startswith(b"HTTP/1.1 100"), "it waits for the body"
            half.sendall(b"{")
            server.process.send_signal(signal.SIGTERM)
            assert server.end()[0] == 0


def test_a_second_sigterm_aborts() -> None:
    with started() as server:
        with server.client.stream("POST", "/v1/completions", json=SLOW | {"n": 4}) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while server.client.get("/ready").status_code == 200:
                pass
            server.process.send_signal(signal.SIGTERM)
            try:
                reasons = [
                    json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines if "[DONE]" not in line
                ]
            except httpx.RemoteProtocolError:  # the connection was cut before the last events
                reasons = []
        assert "length" not in reasons
        assert server.end()[0] == 0


def test_without_assertions_it_refuses_as_with_them_and_tells_no_secret() -> None:
    with started(python=("-O",)) as server:
        bodies: list[dict[str, Any]] = [
            {"prompt": PROMPT, "temperature": -1},
            {"prompt": PROMPT, "n": 0},
            {"prompt": PROMPT, "made_up": 1},
            {"prompt": [10**6]},
            {"prompt": []},
            {"prompt": [1] * 5000},
        ]
        statuses = [server.client.post("/v1/completions", json=body).status_code for body in bodies]
        assert statuses == [400] * len(bodies)
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        whole = {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}
        assert server.client.post("/v1/completions", json=whole).json()["usage"]["completion_tokens"] == 3
        server.client.close()
        server.process.send_signal(signal.SIGINT)
        status, printed = server.end()
        assert status == 0
        assert KEY not in printed and PROMPT not in printed
        arguments = Path(f"/proc/{server.process.pid}/cmdline")
        assert not arguments.exists() or KEY not in arguments.read_text()


def test_another_address_needs_a_key_at_once() -> None:
    command = [sys.executable, "-m", "minillm", "serve", "--model", TINY, "--host", "0.0.0.0"]
    env = {name: value for name, value in os.environ.items() if name != "MINILLM_API_KEY"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60)
    assert result.returncode == 2 and "needs a key" in result.stderr


def test_a_stuck_step_turns_health_bad_and_is_described(caplog: pytest.LogCaptureFixture) -> None:
    with serving(config=threaded(stall_seconds=0.2)) as live, caplog.at_level(logging.ERROR):
        hung, goes_on = threading.Event(), threading.Event()
        engine = live.service.engine._link._driver.engine  # type: ignore[attr-defined]
        submit = engine.runner.submit

        def hang(plan: Any) -> Any:
            hung.set()
            assert goes_on.wait(60)
            return submit(plan)

        engine.runner.submit = hang
        answers: list[httpx.Response] = []
        body = {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}
        waiting = threading.Thread(target=lambda: answers.append(live.post("/v1/completions", **body)))
        waiting.start()
        assert hung.wait(60)
        while live.client.get("/health").status_code == 200:
            pass
        assert live.client.get("/health").json() == {"status": "stalled"}
        assert live.client.get("/ready").status_code == 503
        assert live.post("/v1/completions", **body).status_code == 503
        while not caplog.records:
            pass
        told = caplog.text
        assert "num_planned" in told and "in hang" in told, "the state and where the thread is"
        assert PROMPT not in told
        goes_on.set()
        waiting.join()
        assert answers[0].status_code == 200
        assert live.client.get("/health").status_code == 200


def test_a_full_queue_is_told_of_while_a_step_runs_and_that_step_goes_on() -> None:
    """429 does not wait for the engine: here it comes while a step hangs, among the tokens of a stream."""
    body = {"prompt": PROMPT, "max_tokens": 9, "ignore_eos": True, "temperature": 0}
    with serving(config=threaded(max_waiting=2)) as live:
        alone = live.post("/v1/completions", **body).json()["choices"][0]["text"]
        hung, goes_on = threading.Event(), threading.Event()
        engine = live.service.engine._link._driver.engine  # type: ignore[attr-defined]
        submit, plans = engine.runner.submit, []

        def hang(plan: Any) -> Any:
            plans.append(plan)
            if len(plans) == 4:
                hung.set()
                assert goes_on.wait(60)
            return submit(plan)

        engine.runner.submit = hang
        with live.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as running:
            assert hung.wait(60)
            refused = live.post("/v1/completions", prompt=[5], n=3, max_tokens=3)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            goes_on.set()
            events = [json.loads(line[6:]) for line in running.iter_lines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == alone


def test_a_failed_step_ends_requests_and_turns_health_bad(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as live:
        engine = live.service.engine._link._driver.engine  # type: ignore[attr-defined]

        def fail(plan: Any) -> Any:
            raise RuntimeError("address 0x7f00dead of /secret/path")

        engine.runner.submit = fail
        answer = live.post("/v1/completions", prompt=[5], max_tokens=3)
        assert answer.status_code == 500
        assert "0x7f" not in answer.text and "/secret" not in answer.text
        assert live.client.get("/health").status_code == live.client.get("/ready").status_code == 503
        assert live.post("/v1/completions", prompt=[5], max_tokens=3).status_code == 503
        assert "0x7f00dead" in caplog.text, "the log does say it"

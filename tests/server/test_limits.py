"""What a client may not do, and that the server and its other clients do not mind."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import psutil
import pytest

from minillm.config import EngineConfig
from minillm.server.service import parts_of
from minillm.types import MAX_SEED, SamplingParams
from tests.server.live import Live, serving, threaded

NEIGHBOUR: dict[str, Any] = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 8, "ignore_eos": True}
EXTREMES = (-1, 0, 1, 2, 2**31, 2**63, 10**18, 1e308, -1e308, 0.5, float("nan"), float("inf"), True, "x", None, [], {})
NUMERIC = sorted(
    {f.name for f in fields(SamplingParams)}
    | {"n", "best_of", "logprobs", "priority", "timeout", "top_logprobs", "max_completion_tokens", "stream", "echo"}
)
CONFIG = threaded(max_prompts=16, max_n=8, max_choices=32, max_body_bytes=100_000, max_header_bytes=8192)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(config=CONFIG) as server:
        server.expected = server.post("/v1/completions", **NEIGHBOUR).json()["choices"][0]["text"]  # type: ignore
        yield server


def is_unharmed(live: Live) -> bool:
    """Whether the server answers as it did before, and holds nothing."""
    text = live.post("/v1/completions", **NEIGHBOUR).json()["choices"][0]["text"]
    live.wait_idle()
    return bool(text == live.expected) and live.client.get("/health").status_code == 200  # type: ignore[attr-defined]


@pytest.mark.parametrize("field", NUMERIC)
def test_every_number_at_its_extremes(live: Live, field: str) -> None:
    chat = {"messages": [{"role": "user", "content": "baba"}]}
    for path, body in (("/v1/completions", {"prompt": [5, 6]}), ("/v1/chat/completions", chat)):
        for value in EXTREMES:
            given = {"max_tokens": 2} | body | {field: value}
            response = live.client.post(path, content=json.dumps(given), headers={"Content-Type": "application/json"})
            assert response.status_code in (200, 400), (path, value, response.text)
            if response.status_code == 400:
                assert field in response.json()["error"]["message"], (path, value, response.text)
    assert is_unharmed(live)


@pytest.mark.parametrize("value", [CONFIG.max_n + 1, 10**6, 10**18, 10**4000])
def test_n_beyond_its_limit(live: Live, value: int) -> None:
    content = b'{"prompt": "x", "n": %s}' % (b"1" + b"0" * 4000 if value == 10**4000 else str(value).encode())
    response = live.client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert live.post("/v1/completions", prompt=[[1]] * 16, n=3, max_tokens=1).status_code == 400
    assert live.post("/v1/completions", prompt=[[1]] * 4, n=8, max_tokens=1).status_code == 200


@pytest.mark.parametrize("prompt", [[], [[]], [""], "", [[1], []], [[1]] * 17, ["a"] * 17, [1.5], [-1], [512], [2**70]])
def test_prompts_that_are_none(live: Live, prompt: Any) -> None:
    assert live.post("/v1/completions", prompt=prompt, max_tokens=1).status_code == 400


def test_a_prompt_beyond_the_context(live: Live) -> None:
    assert live.post("/v1/completions", prompt=[1] * 255, max_tokens=5).status_code == 200
    response = live.post("/v1/completions", prompt=[1] * 256, max_tokens=1)
    assert response.status_code == 400 and "max_model_len" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "end"),
        ("best_of", 2),
        ("made_up", 1),
        ("use_beam_search", True),
        ("functions", []),
        ("chat_template", "{{ 1 }}"),
        ("chat_template_kwargs", {"tokenize": True}),
        ("messages", []),
    ],
)
def test_unknown_and_unsupported_fields_are_named(live: Live, field: str, value: Any) -> None:
    response = live.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, field: value})
    assert response.status_code == 400
    assert field in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"[" * 10_000 + b"]" * 10_000,
        b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"prompt": "\\ud800", "max_tokens": 1}',
        b'{"\\ud800": 1, "prompt": "a"}',
        b'{"prompt": "a", "user": "\\ud800", "max_tokens": 1}',
        b'{"prompt": "\xff"}',
        b"\x00" * 100,
    ],
)
def test_bodies_that_are_no_requests(live: Live, content: bytes) -> None:
    response = live.client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_web_form_is_no_request(live: Live) -> None:
    body = json.dumps(NEIGHBOUR)
    assert live.client.post("/v1/completions", content=body, headers={"Content-Type": "text/plain"}).status_code == 400


def exchange(live: Live, *parts: bytes) -> bytes:
    """What the server says to bytes that are sent as they are, until it closes."""
    host, _, port = live.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
            while piece := connection.recv(65536):
                answer += piece
        except (ConnectionResetError, BrokenPipeError):  # it has answered and closed while more was being sent
            pass
        return answer


def is_refused(answer: bytes) -> bool:
    """Whether a head was too large; the answer is lost if the client goes on sending into a closed connection."""
    return not answer or answer.startswith(b"HTTP/1.1 431")


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_large_body_is_refused_by_its_length_alone(live: Live) -> None:
    assert exchange(live, HEAD + b"Content-Length: 1000000000000\r\n\r\n").startswith(b"HTTP/1.1 413")


def test_a_large_body_without_a_length_is_refused_as_it_comes(live: Live) -> None:
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    assert exchange(live, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk, chunk).startswith(b"HTTP/1.1 413")
    assert is_unharmed(live)


@pytest.mark.parametrize("kind", ["one", "many", "path"])
def test_a_large_header_is_refused_and_not_kept(live: Live, kind: str) -> None:
    before = psutil.Process().memory_info().rss
    filling = {"one": b"X-A: " + b"a" * 65536, "many": b"X-A: a\r\n" * 8192, "path": b""}[kind]
    head = b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" if kind == "path" else HEAD
    assert is_refused(exchange(live, head, *[filling] * 100, b"\r\n\r\n"))
    assert psutil.Process().memory_info().rss - before < 16 * 2**20
    assert is_unharmed(live)


def test_a_large_header_in_one_piece_is_refused(live: Live) -> None:
    head = HEAD + b"X-A: " + b"a" * CONFIG.max_header_bytes + b"\r\nContent-Length: 2\r\n\r\n{}"
    assert exchange(live, head).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"Content-Length: 10\r\n\r\n{"])
def test_a_slow_request_is_refused(sent: bytes) -> None:
    with serving(config=threaded(receive_seconds=0.2)) as live:
        assert exchange(live, sent).startswith(b"HTTP/1.1 408")
        live.server.config.http_protocol_class.seconds = 30.0  # for a client that may be slow too
        assert live.client.get("/health").status_code == 200


def test_a_full_queue_says_when_to_come_back_and_running_streams_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineConfig(device="cpu", dtype="float32", max_model_len=2048, num_kv_blocks=256, max_num_seqs=1)
    with serving(engine=engine, config=threaded(max_waiting=3)) as live:
        endless = {"prompt": [5, 6], "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with live.client.stream("POST", "/v1/completions", json=endless) as running:
            lines = running.iter_lines()
            next(lines)
            with monkeypatch.context() as patch:  # a second for each token
                patch.setattr(live.engine.predictor, "seconds", lambda num_prompt, num_output: num_prompt + num_output)
                assert 0 < live.call(lambda: live.engine.predicted_wait) < 2000, "that of the stream under way"
            response = live.post("/v1/completions", prompt=[5], n=4, max_tokens=3)
            assert response.status_code == 429 and 1 <= int(response.headers["retry-after"]) <= 600
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert live.engine.num_unfinished == 1, "a request that was refused left something"
            late = live.post("/v1/completions", prompt=[5], max_tokens=3, timeout=0.01)
            assert late.status_code == 408, "its time was over before it began"
            assert "choices" in next(line for line in lines if line)
        live.wait_idle()
        assert live.post("/v1/completions", prompt=[5], n=3, max_tokens=3).status_code == 200


def test_one_user_cannot_take_every_place() -> None:
    with serving(config=threaded(max_per_user=2)) as live:
        body = {"prompt": [5], "n": 3, "max_tokens": 2}
        assert live.post("/v1/completions", **body, user="a").status_code == 429
        assert live.post("/v1/completions", **body | {"n": 2}, user="a").status_code == 200
        assert live.engine.num_of_user == {}


def test_many_completions_let_others_have_their_turn() -> None:
    engine = EngineConfig(device="cpu", dtype="float32", max_model_len=256, num_kv_blocks=256, max_num_seqs=4)
    with serving(engine=engine, config=threaded()) as live:
        many = {
            "prompt": [5, 6],
            "n": 100,
            "seed": 3,
            "max_tokens": 100,
            "ignore_eos": True,
            "stream": True,
            "user": "a",
        }
        with live.client.stream("POST", "/v1/completions", json=many) as running:
            lines = running.iter_lines()
            next(lines)
            assert live.post("/v1/completions", prompt=[7], max_tokens=3, user="b").status_code == 200
            assert live.engine.num_of_user["a"] > 0, "all of a user's completions were served before another's first"
        live.wait_idle()


@pytest.mark.parametrize("seed", [None, 7, MAX_SEED])
def test_parts_of_many_completions_have_the_seeds_of_the_whole(seed: int | None) -> None:
    parts = parts_of(SamplingParams(n=7, seed=seed, max_tokens=3), 3)
    assert [part.n for part in parts] == [3, 3, 1]
    if seed is not None:
        seeds = [(part.seed or 0) + i for part in parts for i in range(part.n)]
        assert [each % (MAX_SEED + 1) for each in seeds] == [(seed + i) % (MAX_SEED + 1) for i in range(7)]


def test_a_request_whose_time_is_over_gives_what_it_has() -> None:
    engine = EngineConfig(device="cpu", dtype="float32", max_model_len=2048, num_kv_blocks=256)
    for seconds in (0.5, 4.0, 32.0):  # more where no token comes in less, and 2000 take as much longer
        with serving(engine=engine, config=threaded(request_seconds=seconds)) as live:
            response = live.post("/v1/completions", prompt=[5], max_tokens=2000, ignore_eos=True)
            live.wait_idle()
        if response.status_code != 408:
            break
    answer = response.json()
    assert answer["choices"][0]["finish_reason"] == "abort"
    assert 0 < answer["usage"]["completion_tokens"] < 2000


def test_a_salt_keeps_cached_prompts_apart(live: Live) -> None:
    cached = []
    for salt in ("a", "b", "a"):
        body = {"prompt": list(range(100)), "max_tokens": 1, "cache_salt": salt}
        cached.append(live.post("/v1/completions", **body).json()["timings"]["cached_tokens"])
    assert cached[:2] == [0, 0] and cached[2] > 0


def test_nothing_listens_but_the_server(live: Live) -> None:
    listening = [c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert [address.port for address in listening] == [int(live.url.rpartition(":")[2])]

"""A hostile client against a server as users start it, its engine in a process: it gets 4xx, and leaves nothing."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from minillm.config import EngineConfig
from minillm.server.config import ServerConfig
from minillm.server.protocol import kind_of_prompt, plain
from tests.server.live import Live, serving
from tests.server.test_limits import HEAD, exchange, is_refused

NEIGHBOUR: dict[str, Any] = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 8, "ignore_eos": True}
HALF = "\ud800"
"""Half of a surrogate pair, which JSON can write and no Unicode text holds."""
COLLIDING = [i * (2**61 - 1) for i in range(20_000)]
"""Integers whose hashes are all equal."""


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(config=ServerConfig(port=0, max_header_bytes=8192)) as server:
        server.expected = server.post("/v1/completions", **NEIGHBOUR).json()["choices"][0]["text"]  # type: ignore
        yield server


def check_unharmed(live: Live) -> None:
    text = live.post("/v1/completions", **NEIGHBOUR).json()["choices"][0]["text"]
    assert text == live.expected  # type: ignore[attr-defined]
    live.wait_idle()
    assert live.client.get("/health").status_code == 200


def schema_of(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", [HALF]),
        ("stop", "a" + HALF),
        ("bad_words", [HALF]),
        ("structured_outputs", {"regex": HALF}),
        ("structured_outputs", {"grammar": f'start: "{HALF}"'}),
        ("structured_outputs", {"choice": ["a", HALF]}),
        ("structured_outputs", {"json": {"const": HALF}}),
        ("structured_outputs", {"json": schema_of(400)}),
        ("structured_outputs", {"json": schema_of(900)}),
        ("logit_bias", {str(number): 1 for number in COLLIDING}),
        ("allowed_token_ids", COLLIDING),
        ("stop_token_ids", COLLIDING),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_cannot_be_sent_to_an_engine_is_refused(live: Live, field: str, value: Any, is_streamed: bool) -> None:
    body = {"prompt": [5], "max_tokens": 2, "stream": is_streamed, field: value}
    response = live.client.post(
        "/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field
    check_unharmed(live)


def test_too_many_biases_are_not_made_into_numbers() -> None:
    many = {str(number): 1 for number in COLLIDING}
    assert plain("logit_bias", many) is many


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [("a", "text"), (["a"], "texts"), ([1], "tokens"), ([[1]], "prompts"), ([], "tokens"), (None, "tokens")],
)
def test_a_prompt_is_read_in_one_form(prompt: Any, kind: str) -> None:
    assert kind_of_prompt(prompt) == kind


@pytest.mark.parametrize(
    ("prompt", "where"),
    [
        ([5] * 100 + [None] * 100, "prompt.tokens.100"),
        (["a"] * 3 + [7] * 100, "prompt.texts.3"),
        ([[5]] * 2 + ["a"] * 100, "prompt.prompts.2"),
        ([[5, None, None]], "prompt.prompts.0.1"),
    ],
)
def test_only_the_first_wrong_part_of_a_prompt_is_named(live: Live, prompt: Any, where: str) -> None:
    error = live.post("/v1/completions", prompt=prompt, max_tokens=1).json()["error"]
    assert error["param"] == where and ";" not in error["message"]


@pytest.mark.parametrize(
    "flood",
    [b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 100_000, b"2\r\n{}\r\n0\r\nX: " + b"y" * 600_000, b"1;" + b"a" * 600_000],
    ids=["trailers", "trailer", "chunk"],
)
def test_what_frames_a_body_is_bounded(live: Live, flood: bytes) -> None:
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    assert is_refused(exchange(live, head, *[flood[at : at + 10_000] for at in range(0, len(flood), 10_000)]))
    check_unharmed(live)


def test_a_body_in_many_small_chunks_is_read(live: Live) -> None:
    body = json.dumps(NEIGHBOUR).encode() + b" " * 3000  # 3 KB, framed in 15 KB
    framed = b"".join(b"1\r\n%c\r\n" % each for each in body) + b"0\r\nX: y\r\n\r\n"
    answer = exchange(live, HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n", framed)
    assert answer.startswith(b"HTTP/1.1 200")


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("is_split", [False, True])
def test_a_client_that_would_rather_speak_http_2_is_answered(live: Live, is_chunked: bool, is_split: bool) -> None:
    body = json.dumps(NEIGHBOUR).encode()
    head = HEAD + UPGRADE + (b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body))
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body
    plain = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    parts = [head + b"\r\n\r\n", sent] if is_split else [head + b"\r\n\r\n" + sent]
    answers = exchange(live, *parts, b"".join(parts) + plain).split(b"HTTP/1.1 200 OK")[1:]
    texts = [json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] for answer in answers]
    assert texts == [live.expected] * 3  # type: ignore[attr-defined]


def test_a_tunnel_is_refused(live: Live) -> None:
    assert exchange(live, b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n" + UPGRADE + b"\r\n").startswith(
        b"HTTP/1.1 400"
    )


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    requests = []
    for num in range(1, 6):
        body = json.dumps(NEIGHBOUR | {"max_tokens": num}).encode()
        last = b"Connection: close\r\n" if num == 5 else b""
        requests.append(HEAD + last + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    answers = exchange(live, b"".join(requests)).split(b"HTTP/1.1 200 OK")[1:]
    told = [json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] for answer in answers]
    assert told == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_of_http_1_0_gets_no_chunks(live: Live, is_streamed: bool) -> None:
    body = json.dumps(NEIGHBOUR | {"stream": is_streamed}).encode()
    parts = (HEAD + b"Connection: keep-alive\r\nContent-Length: %d\r\n\r\n" % len(body) + body).split(b"HTTP/1.1")
    head, _, content = exchange(live, b"HTTP/1.0".join(parts)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"\r\nconnection: close" in head
    assert b"transfer-encoding" not in head and (b"content-length: %d" % len(content) in head) is not is_streamed
    if is_streamed:
        *events, done, rest = content.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        texts = [json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] for event in events]
    else:
        texts = [json.loads(content)["choices"][0]["text"]]
    assert "".join(texts) == live.expected  # type: ignore[attr-defined]


def test_a_wrong_field_is_named_in_short(live: Live) -> None:
    message = {"role": "user", "content": "a", "x" * 50_000: 1}
    answer = live.post("/v1/chat/completions", messages=[message])
    assert answer.status_code == 400 and len(answer.content) < 2000 and answer.json()["error"]["param"]


def test_connections_that_only_cost_are_cut() -> None:
    """One that sends empty lines behind an answer, and one that does not read the megabytes that it asked for."""
    with serving(config=ServerConfig(port=0)) as live:
        live.client.close()
        host, _, port = live.url.removeprefix("http://").partition(":")
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as blank, socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            deaf.connect((host, int(port)))
            for connection in (blank, deaf):
                connection.sendall(ask)
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            live.server.config.http_protocol_class.seconds = 0.5
            blank.sendall(b"\r\n")
            deaf.sendall(ask * 1000)
            live.wait_until(lambda: not live.server.server_state.connections)


@pytest.mark.parametrize("answer_of", ["decode", "encode"])
def test_many_tokens_are_no_work_of_the_loop(live: Live, monkeypatch: pytest.MonkeyPatch, answer_of: str) -> None:
    """A long text or list of tokens is worked on in a thread."""
    tokenizer, names = live.service.tokenizer, []
    work = getattr(tokenizer, answer_of)

    def noting(*args: Any, **values: Any) -> Any:
        names.append(threading.current_thread().name)
        return work(*args, **values)

    monkeypatch.setattr(tokenizer, answer_of, noting)
    for size in (3, 100_000):
        if answer_of == "decode":
            assert live.post("/detokenize", tokens=[5] * size).status_code == 200
        else:
            assert live.post("/tokenize", prompt="b " * size).status_code == 200
    assert names[0] != names[1] and names[1].startswith("asyncio_")


def test_an_engine_that_is_killed_ends_its_streams_and_says_so() -> None:
    engine = EngineConfig(device="cpu", dtype="float32", max_model_len=2048, num_kv_blocks=256)
    with serving(engine=engine, config=ServerConfig(port=0)) as live:
        endless = {"prompt": [5, 6], "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with live.client.stream("POST", "/v1/completions", json=endless) as running:
            lines = (line for line in running.iter_lines() if line)
            next(lines)
            live.engine._link._process.kill()  # type: ignore[attr-defined]
            *_, failed, done = lines
        error = json.loads(failed.removeprefix("data: "))
        assert error["type"] == "error" and "engine" in error["error"]["message"] and done == "data: [DONE]"
        answers: list[httpx.Response] = [live.post("/v1/completions", prompt=[5]), live.client.get("/health")]
        assert [answer.status_code for answer in answers] == [503, 503]
        assert live.client.get("/ready").status_code == 503
        assert live.engine.num_unfinished == 0

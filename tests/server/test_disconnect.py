"""A client that goes away takes its request with it, whatever state that is in, and leaves no block in use."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from minillm.config import EngineConfig
from minillm.server.config import ServerConfig
from tests.server.live import Live, serving

ENGINE = EngineConfig(
    device="cpu",
    dtype="float32",
    max_model_len=2048,
    num_kv_blocks=300,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    max_chunk_size=4,
    min_chunk_size=4,
)
LONG = {"max_tokens": 1900, "ignore_eos": True}
Row = dict[str, Any]


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    with serving(engine=ENGINE, config=ServerConfig(port=0, engine_process=request.param)) as server:
        yield server


def connect(live: Live, path: str, body: dict[str, Any]) -> socket.socket:
    """A client that has sent its request."""
    host, _, port = live.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def wait_until(live: Live, is_so: Callable[[dict[str, Any]], bool]) -> None:
    """Return when the engine's state is as wanted; a request that ends before that fails the test."""
    while not is_so(live.dump()):
        assert live.engine.failure is None


def is_decoding(row: Row) -> bool:
    return bool(row["num_output"] > 0)


def is_in_prompt(row: Row) -> bool:
    return bool(0 < row["num_computed"] < row["num_prompt"])


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [5, 6, 7]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "baba"}]}),
        ("/v1/completions", {"prompt": [5, 6, 7], "n": 3}),
        ("/v1/completions", {"prompt": [[5], [6]], "n": 2}),
    ],
    ids=["completion", "chat", "n", "prompts"],
)
def test_while_it_decodes(live: Live, path: str, body: dict[str, Any], is_streamed: bool) -> None:
    num = body.get("n", 1) * (len(body["prompt"]) if body.get("prompt") == [[5], [6]] else 1)
    connection = connect(live, path, body | LONG | {"stream": is_streamed})
    wait_until(live, lambda state: sum(map(is_decoding, state["requests"])) == num)
    num_aborted = live.num_aborted()
    connection.close()
    live.wait_idle()
    assert live.num_aborted() == num_aborted + num


def test_to_leave_is_no_error(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    connection = connect(live, "/v1/completions", {"prompt": [5, 6, 7]} | LONG)
    wait_until(live, lambda state: any(map(is_decoding, state["requests"])))
    connection.close()
    live.wait_idle()
    live.wait_until(lambda: not live.server.server_state.tasks)
    assert not caplog.records


@pytest.mark.parametrize("is_streamed", [True, False])
def test_in_the_middle_of_its_prompt(live: Live, is_streamed: bool) -> None:
    prompt = [i * 7 % 500 for i in range(1900)]
    connection = connect(live, "/v1/completions", {"prompt": prompt, "max_tokens": 9, "stream": is_streamed})
    wait_until(live, lambda state: any(map(is_in_prompt, state["requests"])))
    num_aborted = live.num_aborted()
    connection.close()
    live.wait_idle()
    assert live.num_aborted() == num_aborted + 1


@pytest.mark.parametrize("is_streamed", [True, False])
def test_while_it_is_queued(live: Live, is_streamed: bool) -> None:
    """The rows are taken, the scheduler's queue holds a few more, and the rest waits before that."""
    body = {"prompt": [5, 6, 7], "stream": is_streamed} | LONG
    connections = [connect(live, "/v1/completions", body) for _ in range(12)]
    wait_until(live, lambda state: state["num_in_fair_queue"] >= 3 and live.engine.num_unfinished == 12)
    rows = live.dump()["requests"]
    assert any(row["row"] == 0 for row in rows) and any(row["row"] > 0 for row in rows)
    for connection in reversed(connections):  # the queued ones first
        connection.close()
    live.wait_idle()


def test_others_go_on(live: Live) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 100, "ignore_eos": True, "temperature": 0}
    expected = live.post("/v1/completions", **body).json()["choices"][0]["text"]
    leaving = [connect(live, "/v1/completions", {"prompt": [8], "stream": True} | LONG) for _ in range(3)]
    wait_until(live, lambda state: sum(map(is_decoding, state["requests"])) == 3)
    with live.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        first = next(lines)
        for connection in leaving:
            connection.close()
        events = [json.loads(line[6:]) for line in [first, *lines] if line and not line.endswith("[DONE]")]
    assert "".join(event["choices"][0]["text"] for event in events) == expected
    live.wait_idle()

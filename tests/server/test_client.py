"""`minillm chat --url` and the client under it, against a real server and against what is none."""

from __future__ import annotations

from collections.abc import Iterator
from http.client import IncompleteRead

import pytest

from minillm import SamplingParams, cli
from minillm.client import ServerClient, events_in, parts_of
from minillm.errors import ConfigError, RequestError
from minillm.types import FinishReason
from tests.server.live import TINY, Live, serving

KEY = "a-key-for-tests"
MESSAGES = [{"role": "user", "content": "baba"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(keys=[KEY]) as server:
        yield server


def test_an_answer_is_that_of_the_server(live: Live) -> None:
    client = ServerClient(live.url, KEY)
    assert client.model == TINY
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    expected = live.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"]
    *pieces, last = ServerClient(f"{live.url}/v1/", KEY).stream(MESSAGES, GREEDY)
    assert "".join(piece.text for piece in pieces) == expected
    assert last.output is not None and last.output.text == expected
    assert last.output.finish_reason is FinishReason.LENGTH and len(last.output.token_ids) == 8
    assert last.output.timings.num_prompt_tokens == 1 and last.output.timings.ttft is not None


def test_leaving_an_answer_ends_its_request(live: Live) -> None:
    chunks = ServerClient(live.url, KEY).stream(MESSAGES, SamplingParams(max_tokens=200, ignore_eos=True))
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    live.wait_idle()


def test_what_the_server_refuses_is_said(live: Live) -> None:
    with pytest.raises(RequestError, match="max_model_len"):
        list(ServerClient(live.url, KEY).stream([{"role": "user", "content": "ba " * 300}], GREEDY))


def test_streams_of_other_servers_are_read() -> None:
    lines = [
        b": a comment\r\n",
        b'data:{"choices":null,"error":null}\n',
        b'data: {"choices":[{"delta":null}],"usage":null}\n',
        b'data: {"choices":[{"delta":{"content":"hi"},"finish_reason":"length"}]}\n',
        b'data: {"choices":[],"usage":{"completion_tokens":3,"prompt_tokens":2,"prompt_tokens_details":null}}\n',
        b"data: [DONE]\n",
    ]
    read = [parts_of(event) for event in events_in(lines)]
    assert read == [("", "", None), ("", "", None), ("hi", "length", None), ("", "", (3, 2, 0))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"data: 5", "no JSON object"),
        (b"data: {", "no JSON object"),
        (b"data: \xff", "no JSON object"),
        (b'data: {"error": "overloaded"}', "overloaded"),
        (b'data: {"error": {"message": "overloaded"}}', "overloaded"),
        (b'data: {"choices": {"a": 1}}', "form of OpenAI"),
        (b'data: {"choices": [], "usage": 7}', "form of OpenAI"),
        (b'data: {"choices": [], "usage": {}}', "broke off"),
    ],
)
def test_what_is_no_stream_is_said(line: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        list(map(parts_of, events_in([line])))


@pytest.mark.parametrize("failure", [IncompleteRead(b""), ConnectionResetError()])
def test_a_server_that_breaks_off_is_said(failure: Exception) -> None:
    def lines() -> Iterator[bytes]:
        yield b'data: {"choices": [{"delta": {"content": "hi"}}]}'
        raise failure

    with pytest.raises(RequestError, match="broke off"):
        list(events_in(lines()))


def test_no_server_and_no_key(live: Live) -> None:
    for url, key in ((live.url, None), ("http://127.0.0.1:9", KEY), (f"{live.url}/elsewhere", KEY), ("ftp://x", KEY)):
        with pytest.raises(ConfigError, match="key|reached|Not Found|http"):
            ServerClient(url, key)


def test_chat_on_a_server(live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["baba", "ba " * 300, "bebe", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setenv("MINILLM_API_KEY", KEY)
    monkeypatch.setattr("sys.argv", ["minillm", "chat", "--url", live.url, "--max-tokens", "4", "--ignore-eos"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    out, err = capsys.readouterr()
    assert exit.value.code == 0 and len(out.strip().splitlines()) == 2
    assert f"{TINY} is ready" in err and err.count("· 4 tokens ·") == 2 and "max_model_len" in err


def test_options_of_an_engine_mean_nothing_to_a_server(
    live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["minillm", "chat", "--url", live.url, "--max-num-seqs", "4"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2 and "leave those of the engine out" in capsys.readouterr().err

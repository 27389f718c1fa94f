"""Logprobs in the forms of OpenAI's API are those of the engine, streamed or not, wherever the engine runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minillm import LLM, SamplingParams
from minillm.server.logprobs import completion_logprobs
from minillm.types import TokenScore
from tests.server.live import SMALL, TINY, Live

PROMPT = [5, 6, 7]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected() -> Any:
    """What the engine says without a server."""
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": SMALL.max_model_len}
    with LLM(TINY, num_kv_blocks=64, **options) as llm:
        return llm.generate([PROMPT], SamplingParams(logprobs=2, prompt_logprobs=2, **GREEDY))[0]


def streamed(live: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a stream."""
    response = live.post(path, stream=True, **body)
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]


def test_of_a_completion(live: Live, expected: Any) -> None:
    body = {"prompt": PROMPT, "logprobs": 2, **GREEDY}
    choice = live.post("/v1/completions", **body).json()["choices"][0]
    found = choice["logprobs"]
    own = [each[token].logprob for each, token in zip(expected.logprobs, expected.token_ids, strict=True)]
    assert found["token_logprobs"] == pytest.approx(own)
    assert "".join(found["tokens"]) == choice["text"]
    assert all(
        choice["text"][at:].startswith(token) for at, token in zip(found["text_offset"], found["tokens"], strict=True)
    )
    assert [max(top.values()) for top in found["top_logprobs"]] == pytest.approx(own), "greedy takes the likeliest"
    assert {len(top) for top in found["top_logprobs"]} == {2}
    pieces = [choice["logprobs"] for choice in streamed(live, "/v1/completions", body)]
    for name in found:
        assert sum((piece[name] for piece in pieces), []) == found[name]


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_are_the_same_while_text_is_held_back(live: Live, echo: bool) -> None:
    """As what might be the beginning of a stop string is."""
    body = {"prompt": PROMPT, "logprobs": 0, "echo": echo, **GREEDY}
    text = live.post("/v1/completions", **(body | {"echo": False})).json()["choices"][0]["text"]
    body |= {"stop": [text[:-1] + "?"]}
    whole = live.post("/v1/completions", **body).json()["choices"][0]
    choices = streamed(live, "/v1/completions", body)
    assert choices[0]["text"] in ("", whole["text"][: -len(text)]), "nothing is held back: the case tests nothing"
    assert sum((choice["logprobs"]["text_offset"] for choice in choices), []) == whole["logprobs"]["text_offset"]


def test_of_an_echoed_prompt(live: Live, expected: Any) -> None:
    body = {"prompt": PROMPT, "logprobs": 1, "echo": True, **GREEDY}
    choice = live.post("/v1/completions", **body).json()["choices"][0]
    found = choice["logprobs"]
    own = [each and each[token].logprob for each, token in zip(expected.prompt_logprobs, PROMPT, strict=True)]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:3] == pytest.approx(own[1:])
    assert len(found["tokens"]) == 9 and "".join(found["tokens"]) == choice["text"]
    pieces = [choice["logprobs"] for choice in streamed(live, "/v1/completions", body)]
    for name in found:
        assert sum((piece[name] for piece in pieces), []) == found[name]


def test_the_token_is_among_the_likeliest(live: Live) -> None:
    """Though it is not: one more than were asked for."""
    found = live.post("/v1/completions", prompt=PROMPT, logprobs=1, allowed_token_ids=[42], **GREEDY).json()
    columns = found["choices"][0]["logprobs"]
    for token, logprob, top in zip(
        *(columns[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert top[token] == logprob and len(top) in (1, 2)
    assert any(len(top) == 2 for top in columns["top_logprobs"])


def test_of_tokens_with_one_text_the_likelier_is_told() -> None:
    """Parts of characters read alike."""

    class Parts:
        def piece(self, token: int, *, skip_special_tokens: bool) -> bytes:
            return {1: b"\xe6", 2: b"\xe3", 3: b"a"}[token]

    score = TokenScore(1, -1.5, 1, ((1, -1.5), (3, -2.0), (2, -4.0)))
    columns = completion_logprobs(Parts(), [1], [score], 0)  # type: ignore[arg-type]
    assert columns["top_logprobs"] == [{"\ufffd": -1.5, "a": -2.0}]


def test_of_a_chat(live: Live) -> None:
    body = {"messages": [{"role": "user", "content": "baba"}], "logprobs": True, "top_logprobs": 3, **GREEDY}
    choice = live.post("/v1/chat/completions", **body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"] and entry["logprob"] <= 0
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(entry["logprob"])
    pieces = [choice["logprobs"]["content"] for choice in streamed(live, "/v1/chat/completions", body)]
    assert sum(pieces, []) == content
    without = live.post("/v1/chat/completions", **(body | {"logprobs": None, "top_logprobs": None})).json()
    assert without["choices"][0]["logprobs"] is None


def test_biases_come_with_texts_for_keys(live: Live) -> None:
    body = {"prompt": PROMPT, "logit_bias": {"9": 100}, **GREEDY}
    text = live.post("/v1/completions", **body).json()["choices"][0]["text"]
    assert text == live.post("/detokenize", tokens=[9] * 6).json()["prompt"]
    for bias in ({"x": 1}, {"9": "x"}, {"-1": 1}, {"512": 1}, [9]):
        response = live.post("/v1/completions", **(body | {"logit_bias": bias}))
        assert response.status_code == 400 and "logit_bias" in response.json()["error"]["message"]


def test_a_request_without_a_token_to_choose_is_the_clients_fault(live: Live) -> None:
    word = live.post("/detokenize", tokens=[9]).json()["prompt"].strip()
    response = live.post("/v1/completions", prompt=PROMPT, allowed_token_ids=[9], bad_words=[word], **GREEDY)
    assert response.status_code == 400 and "allowed_token_ids" in response.json()["error"]["message"]
    live.wait_idle()

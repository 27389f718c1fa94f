"""/v1/completions and /v1/chat/completions as clients use them, over a socket and in process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from minillm import LLM, SamplingParams
from minillm.server.app import create_app
from tests.server.live import SMALL, TINY, Live

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def expected() -> str:
    """What the engine says without a server."""
    with LLM(TINY, device="cpu", dtype="float32", max_model_len=SMALL.max_model_len, num_kv_blocks=128) as llm:
        return llm.generate([PROMPT], SamplingParams(**GREEDY))[0].text


def events_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The objects of a stream, which ends with [DONE]."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    yield from (json.loads(line.removeprefix("data: ")) for line in lines)


def test_completion(live: Live, expected: str) -> None:
    answer = live.post("/v1/completions", prompt=PROMPT, **GREEDY).json()
    assert answer["object"] == "text_completion" and answer["model"] == TINY
    assert [choice["text"] for choice in answer["choices"]] == [expected]
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 8, 11)


def test_every_answer_carries_timings(live: Live) -> None:
    timings = live.post("/v1/completions", prompt=PROMPT, **GREEDY).json()["timings"]
    assert (timings["prompt_tokens"], timings["output_tokens"], timings["chunks"], timings["steps"]) == (3, 8, 1, 8)
    assert timings["preemptions"] == timings["tokens_beside"] == 0
    parts = [timings[name] for name in ("queue_seconds", "prefill_seconds", "decode_seconds")]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(timings["total_seconds"], abs=1e-5)


def test_stream_equals_whole(live: Live, expected: str) -> None:
    body = {"prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}, **GREEDY}
    with live.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events_of(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["timings"]["output_tokens"] == 8
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8 and last["timings"]


def test_several_prompts_and_n(live: Live, expected: str) -> None:
    body = {"prompt": [PROMPT, [9, 8]], "n": 2, **GREEDY}
    answer = live.post("/v1/completions", **body).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == expected and texts[2] == texts[3] != expected
    assert answer["usage"]["prompt_tokens"] == 5 and answer["usage"]["completion_tokens"] == 32
    with live.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        streamed = ["", "", "", ""]
        for event in events_of(response):
            streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == texts


def test_seeds_make_answers_repeatable_and_n_different(live: Live) -> None:
    body = {"prompt": PROMPT, "n": 3, "seed": 4, "max_tokens": 8, "ignore_eos": True}
    first, second = (
        [choice["text"] for choice in live.post("/v1/completions", **body).json()["choices"]] for _ in range(2)
    )
    assert first == second and len(set(first)) == 3


def test_n_completions_compute_their_prompt_once(live: Live) -> None:
    prompt = [(7 * at) % 490 + 5 for at in range(100)]
    before = live.run(live.engine.ask("dump"))["load"]["num_computed"]
    answer = live.post(
        "/v1/completions", prompt=prompt, n=4, max_tokens=3, echo=True, logprobs=1, ignore_eos=True
    ).json()
    live.wait_idle()
    num_computed = live.run(live.engine.ask("dump"))["load"]["num_computed"] - before
    assert num_computed == len(prompt) + 2 + 3 * 3, (
        "two of the first one's tokens, and two and the prompt's last of each other"
    )
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    logprobs = [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]]
    assert all(len(each) == len(prompt) + 3 for each in logprobs)
    assert all(each[: len(prompt)] == logprobs[0][: len(prompt)] for each in logprobs)


def test_echo_begins_with_the_prompt(live: Live, expected: str) -> None:
    prompt = live.post("/detokenize", tokens=PROMPT).json()["prompt"]
    whole = live.post("/v1/completions", prompt=PROMPT, echo=True, **GREEDY).json()["choices"][0]["text"]
    assert whole == prompt + expected
    with live.client.stream(
        "POST", "/v1/completions", json={"prompt": PROMPT, "echo": True, "stream": True, **GREEDY}
    ) as r:
        assert "".join(event["choices"][0]["text"] for event in events_of(r)) == whole


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stop_string_ends_the_text_and_the_bill(live: Live, expected: str, is_streamed: bool) -> None:
    words = expected.split()
    body = {"prompt": PROMPT, "stop": [words[3]], **GREEDY, "max_tokens": 100, "stream": is_streamed}
    body |= {"stream_options": {"include_usage": True}} if is_streamed else {}
    with live.client.stream("POST", "/v1/completions", json=body) as response:
        if is_streamed:
            events = list(events_of(response))
            choices, usage = [event["choices"][0] for event in events[:-1]], events[-1]["usage"]
        else:
            answer = json.loads(response.read())
            choices, usage = answer["choices"], answer["usage"]
    assert "".join(choice["text"] for choice in choices) == expected.partition(words[3])[0]
    assert choices[-1]["finish_reason"] == "stop"
    assert usage["completion_tokens"] == 1 + words.index(words[3])
    live.wait_idle()


def test_the_openai_client_unchanged(live: Live, expected: str) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [TINY]
        whole = client.completions.create(
            model=TINY, prompt=PROMPT, temperature=0, max_tokens=8, extra_body={"ignore_eos": True}
        )
        assert whole.choices[0].text == expected and whole.usage is not None and whole.usage.completion_tokens == 8
        messages: Any = [{"role": "user", "content": "bababa"}]
        given: Any = {"model": TINY, "messages": messages, "temperature": 0, "max_tokens": 8}
        answer = client.chat.completions.create(**given)
        assert answer.choices[0].message.role == "assistant"
        stream = client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == answer.choices[0].message.content
        assert chunks[-1].usage is not None and chunks[-1].usage == answer.usage
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="gpt-9", prompt="x")
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model=TINY, prompt="x", temperature=-1)


def test_in_process(live: Live, expected: str) -> None:
    async def ask() -> dict[str, Any]:
        transport = httpx.ASGITransport(app=create_app(live.service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.post("/v1/completions", json={"prompt": PROMPT, **GREEDY})
            return dict(answer.json())

    assert live.run(ask())["choices"][0]["text"] == expected


def test_requests_at_once_do_not_disturb_each_other(live: Live, expected: str) -> None:
    async def ask() -> list[str]:
        async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
            bodies = [{"prompt": PROMPT if i % 2 else [20 + i] * (3 * i + 1), **GREEDY} for i in range(20)]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [answer.json()["choices"][0]["text"] for answer in answers]

    assert asyncio.run(ask())[1::2] == [expected] * 10
    live.wait_idle()

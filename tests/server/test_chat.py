"""Conversations: chat and responses, tools, and clients that know nothing of this server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from minillm.server.protocol import Message
from minillm.server.service import as_template_message
from minillm.server.tools import ToolReader
from minillm.text.stand_in import StandInTokenizer
from tests.server.live import TINY, Live, serving

MESSAGES: list[Any] = [{"role": "system", "content": "bebe"}, {"role": "user", "content": "baba"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
WEATHER = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {"city": {}}}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"name": "weather", "arguments": {"city": "Paris"}}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving() as server:
        yield server


def answer_of(live: Live, **body: Any) -> dict[str, Any]:
    response = live.post("/v1/chat/completions", messages=MESSAGES, **GREEDY, **body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_langchain_unchanged(live: Live) -> None:
    chat = ChatOpenAI(base_url=f"{live.url}/v1", api_key=SecretStr("none"), model=TINY, temperature=0, max_tokens=8)
    answer = chat.invoke("baba")
    assert isinstance(answer.content, str) and answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 8
    assert "".join(str(chunk.content) for chunk in chat.stream("baba")) == answer.content
    live.wait_idle()


def test_content_in_parts_is_one_text(live: Live) -> None:
    parts = [{"type": "text", "text": "ba"}, {"type": "text", "text": "ba"}]
    split = live.post("/v1/chat/completions", messages=[MESSAGES[0], {"role": "user", "content": parts}], **GREEDY)
    assert split.json()["choices"][0]["message"] == answer_of(live)["choices"][0]["message"]


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, {"type": "input_audio"}, {"text": "a"}]
)
def test_other_parts_are_refused(live: Live, part: dict[str, Any]) -> None:
    response = live.post("/v1/chat/completions", messages=[{"role": "user", "content": [part]}])
    assert response.status_code == 400 and "messages" in response.json()["error"]["message"]


def test_an_answer_can_be_sent_back(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        first = client.chat.completions.create(model=TINY, messages=MESSAGES, max_tokens=3)
        turn = first.choices[0].message.model_dump()
        again = client.chat.completions.create(model=TINY, messages=[*MESSAGES, turn, MESSAGES[1]], max_tokens=3)
        assert again.choices[0].message.role == "assistant"


def test_responses_with_the_openai_client(live: Live) -> None:
    text = answer_of(live)["choices"][0]["message"]["content"]
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        given: dict[str, Any] = {
            "model": TINY,
            "instructions": "bebe",
            "input": "baba",
            "temperature": 0,
            "max_output_tokens": 16,
            "extra_body": {"ignore_eos": True},
        }
        whole = client.responses.create(**given)
        assert whole.output_text.startswith(text) and whole.status == "incomplete"
        assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"
        assert whole.usage is not None and whole.usage.output_tokens == 16
        assert whole.model_extra is not None and whole.model_extra["timings"]["output_tokens"] == 16
        events = list(client.responses.create(**given, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert [event.type for event in events if not event.type.endswith("delta")] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_a_response_can_be_sent_back(live: Live) -> None:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        turns: list[Any] = [{"role": "user", "content": "baba"}]
        first = client.responses.create(model=TINY, input=turns, max_output_tokens=3)
        turns += [*first.output, {"role": "user", "content": "bebe"}]
        assert client.responses.create(model=TINY, input=turns, max_output_tokens=3).output_text


@pytest.mark.parametrize("field", ["priority", "parallel_tool_calls", "n", "stream", "stop", "user", "tools", "model"])
def test_null_is_as_good_as_nothing(live: Live, field: str) -> None:
    assert answer_of(live, **{field: None})["choices"]


@pytest.mark.parametrize(
    "body",
    [{"store": True}, {"previous_response_id": "x"}, {"tools": []}, {"n": 2}, {"input": []}, {"stream_options": {}}],
)
def test_responses_refuses_what_it_has_not(live: Live, body: dict[str, Any]) -> None:
    assert live.post("/v1/responses", **({"input": "baba", "max_output_tokens": 2} | body)).status_code == 400


def test_tools_need_a_template_with_a_place_for_them(live: Live) -> None:
    response = live.post("/v1/chat/completions", messages=MESSAGES, tools=TOOLS)
    assert response.status_code == 400 and "tools" in response.json()["error"]["message"]
    assert answer_of(live, tools=TOOLS, tool_choice="none")["choices"]


@pytest.mark.parametrize(
    ("choice", "tools"),
    [
        ("required", None),
        ("often", TOOLS),
        ({"type": "function", "function": {"name": "other"}}, TOOLS),
        ({"type": "function"}, TOOLS),
    ],
)
def test_a_choice_of_no_tool_is_refused(live: Live, choice: Any, tools: Any) -> None:
    response = live.post("/v1/chat/completions", messages=MESSAGES, tools=tools, tool_choice=choice)
    assert response.status_code == 400 and "tool_choice" in response.json()["error"]["message"]


class Scripted(StandInTokenizer):
    """A tokeniser with tools in its template, under which the model says what it is told to."""

    has_tools = True

    def __init__(self, text: str) -> None:
        super().__init__(512)
        self._left = [text[i : i + 7] for i in range(0, len(text), 7)]
        self.seen_tools: Any = None

    def encode_chat(self, messages: Any, *, tools: Any = None, add_generation_prompt: bool = True) -> list[int]:
        self.seen_tools = tools
        return [1, 2, 3]

    def piece(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        return self._left.pop(0).encode() if self._left else b""


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_call_comes_back_as_openai_has_it(live: Live, monkeypatch: pytest.MonkeyPatch, is_streamed: bool) -> None:
    text = f"I look. <tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    tokenizer = Scripted(text)
    monkeypatch.setattr(live.service, "tokenizer", tokenizer)
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        given: dict[str, Any] = {"model": TINY, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 60}
        given["extra_body"] = {"ignore_eos": True}
        if is_streamed:
            chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**given, stream=True)]
            content = "".join(chunk.delta.content or "" for chunk in chunks)
            calls: Any = chunks[-1].delta.tool_calls
        else:
            message = client.chat.completions.create(**given).choices[0].message
            content, calls = message.content, message.tool_calls
    assert content == "I look. "
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("weather", CALL["arguments"])
    ]
    assert calls[0].id.startswith("call_") and tokenizer.seen_tools == TOOLS


TWO = [CALL, {"name": "weather", "parameters": {"city": "Rome"}}]


@pytest.mark.parametrize(
    ("text", "content", "num_calls"),
    [
        ("no call at all <tool", "no call at all <tool", 0),
        (f"<tool_call>{json.dumps(CALL)}</tool_call>", "", 1),
        (f"a <tool_call>{json.dumps(TWO[0])}</tool_call>\n<tool_call>{json.dumps(TWO[1])}</tool_call>", "a ", 2),
        (f"[TOOL_CALLS] {json.dumps(TWO)}", "", 2),
        (json.dumps(TWO), "", 2),
        (f"  {json.dumps(TWO[1])}", "", 1),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', 0),
        ('{"name": "weather", "arguments": 7}', '{"name": "weather", "arguments": 7}', 0),
        ("<tool_call>{</tool_call>", "<tool_call>{</tool_call>", 0),
        ("{" * 5000, "{" * 5000, 0),
        ("[" * 100_000, "[" * 100_000, 0),
        ("   ", "   ", 0),
        ("", "", 0),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 10**6])
def test_calls_in_answers(text: str, content: str, num_calls: int, size: int) -> None:
    reader = ToolReader(["weather"])
    out = "".join(reader.feed(text[i : i + size]) for i in range(0, len(text), size)) + reader.finish()
    assert (out, len(reader.calls)) == (content, num_calls)


def test_templates_see_arguments_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    plain = as_template_message(Message.model_validate({"role": "assistant", "tool_calls": [call]}))
    assert plain["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"} and plain["content"] == ""
    assert as_template_message(Message(role="developer", content="a")) == {"role": "system", "content": "a"}

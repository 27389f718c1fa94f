"""Answers of a wanted form, on the model that has words: schemas, forced calls, and grammars that are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from minillm.config import EngineConfig
from minillm.server.config import ServerConfig
from minillm.text.tokenizer import Tokenizer
from tests.server.live import Live, serving
from tests.server.test_disconnect import connect, wait_until

ENGINE = EngineConfig(device="cpu", max_model_len=512, num_kv_blocks=128, max_num_seqs=4)
MESSAGES = [{"role": "user", "content": "Where is the Eiffel Tower?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY, "strict": True}}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": CITY}}]


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    with serving("smollm2", ENGINE, ServerConfig(port=0, engine_process=request.param)) as server:
        yield server


def ask(live: Live, **body: Any) -> dict[str, Any]:
    given = {"messages": MESSAGES, "temperature": 0, "max_tokens": 60} | body
    response = live.post("/v1/chat/completions", **given)
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def test_a_schema_is_kept(live: Live) -> None:
    choice = ask(live, response_format=SCHEMA)
    assert choice["finish_reason"] == "stop"
    assert json.loads(choice["message"]["content"])["city"] in ("Paris", "Rome")


def test_the_engines_own_field(live: Live) -> None:
    assert ask(live, structured_outputs={"choice": ["yes", "no"]})["message"]["content"] in ("yes", "no")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_call_can_be_forced(live: Live, monkeypatch: pytest.MonkeyPatch, choice: Any) -> None:
    monkeypatch.setattr(Tokenizer, "has_tools", True)  # this model's template has no place for tools
    answer = ask(live, tools=TOOLS, tool_choice=choice)
    (call,) = answer["message"]["tool_calls"]
    assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
    assert call["function"]["name"] == "look_up"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"regex": "(a+)+b" * 2000, "json": "{}"}},
        {"structured_outputs": {"made_up": 1}},
        {"structured_outputs": {}},
        {"structured_outputs": 7},
        {"structured_outputs": {"grammar": "start: start start"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "("}}}},
        {"response_format": SCHEMA, "structured_outputs": {"json_object": True}},
    ],
)
def test_a_grammar_that_is_none_is_refused_alone(live: Live, body: dict[str, Any]) -> None:
    given = {"messages": MESSAGES, "max_tokens": 3} | body
    response = live.post("/v1/chat/completions", **given)
    assert response.status_code == 400, response.text
    assert ask(live, max_tokens=2)["message"]["content"]
    live.wait_idle()


def test_leaving_while_a_grammar_is_compiled(live: Live) -> None:
    words = [f"{i:05}{'x' * 50}" for i in range(1000)]
    body = {"messages": MESSAGES, "structured_outputs": {"choice": words}, "stream": True}
    connection = connect(live, "/v1/chat/completions", body)
    wait_until(live, lambda state: live.engine.num_unfinished > 0)
    connection.close()
    live.wait_idle()

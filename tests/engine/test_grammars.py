"""Structured output in the engine, on SmolLM2: what is asked for comes out, in any company, in chunks, with drafts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from minillm import LLM, FinishReason, SamplingParams
from minillm.errors import RequestError
from minillm.types import StructuredOutputsParams
from tests.engine.schemas import SCHEMAS

OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 512, "num_kv_blocks": 300}
TOPICS = ("a fisherman from Lisbon", "the weather on Mars", "two old friends", "a very small town", "a trip by train")
CHOICE = StructuredOutputsParams(choice=["yes", "no, never", "maybe"])
REGEX = StructuredOutputsParams(regex=r"[a-z]{3,8}@[a-z]{2,9}\.(com|org)")
LARK = StructuredOutputsParams(grammar='start: "x" ("+" | "-") NUMBER\nNUMBER: /[1-9][0-9]{0,2}/')
GREEDY = {"temperature": 0.0, "max_tokens": 24}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("smollm2", **OPTIONS) as engine:
        yield engine


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def check_schemas(llm: LLM, num_each: int) -> None:
    """`num_each` outputs under each schema, greedy and random by turns, all in one batch: each stops and validates."""
    names = [name for name in SCHEMAS for _ in range(num_each)]
    prompts = [chat(f"Write JSON of a {name} about {TOPICS[i % len(TOPICS)]}.") for i, name in enumerate(names)]
    params = [
        SamplingParams(
            temperature=0.0 if i % 2 else 1.0,
            seed=i,
            max_tokens=300,
            structured_outputs=StructuredOutputsParams(json=SCHEMAS[name]),
        )
        for i, name in enumerate(names)
    ]
    for name, out in zip(names, llm.generate(prompts, params), strict=True):
        assert out.finish_reason is FinishReason.STOP, (name, out.text)
        jsonschema_rs.validate(SCHEMAS[name], json.loads(out.text))


def test_one_output_under_each_of_ten_schemas(llm: LLM) -> None:
    check_schemas(llm, 1)


@pytest.mark.soak
def test_200_outputs_under_ten_schemas(llm: LLM) -> None:
    check_schemas(llm, 20)


def test_regex_choice_and_grammar_beside_plain_rows(llm: LLM) -> None:
    prompt = chat("Name an address.")
    plain = SamplingParams(**GREEDY)
    alone = llm.generate([prompt], plain)[0]
    kinds = [SamplingParams(**GREEDY, structured_outputs=each) for each in (CHOICE, REGEX, LARK)]
    choice, regex, lark, beside = llm.generate([prompt] * 4, [*kinds, plain])
    assert choice.text in ("yes", "no, never", "maybe")
    assert re.fullmatch(r"[a-z]{3,8}@[a-z]{2,9}\.(com|org)", regex.text)
    assert re.fullmatch(r"x[+-][1-9][0-9]{0,2}", lark.text)
    assert all(out.finish_reason is FinishReason.STOP for out in (choice, regex, lark))
    assert beside.token_ids == alone.token_ids


def test_chunks_loops_and_completions_do_not_matter(llm: LLM) -> None:
    prompt = chat("Name an address of somebody who writes to us every day.")
    params = [
        SamplingParams(temperature=1.0, seed=3, max_tokens=24, structured_outputs=REGEX, logprobs=1, n=2),
        SamplingParams(**GREEDY, structured_outputs=LARK, repetition_penalty=1.2),
    ]
    expected = [[c.token_ids for c in out.completions] for out in llm.generate([prompt] * 2, params)]
    for options in ({"overlap": False, "max_num_batched_tokens": 16}, {"speculative": "ngram"}):
        with LLM("smollm2", **OPTIONS, **options) as other:
            got = [[c.token_ids for c in out.completions] for out in other.generate([prompt] * 2, params)]
        assert got == expected, options


@pytest.mark.parametrize("num_right", [0, 2])
def test_drafts_are_masked_as_well(llm: LLM, num_right: int) -> None:
    """Right drafts are kept, one that the grammar forbids ends them, and the tokens are those without drafts."""
    params = SamplingParams(**GREEDY, structured_outputs=REGEX)
    expected = llm.generate([[5, 6, 7]], params)[0].token_ids
    generation = llm.engine.add([5, 6, 7], params)
    request, gains = generation.request, []
    while llm.engine.has_work:
        if request.num_output and not request.num_unknown:
            request.drafts = [*expected[request.num_output : request.num_output + num_right], 0, 1]
        before = request.num_output
        llm.engine.step()
        gains.append(request.num_output - before)
    assert list(request.tokens[3:]) == expected
    assert max(gains) == num_right + 1


def test_max_tokens_cuts_a_grammar_short(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, structured_outputs=REGEX)
    assert llm.generate(["Hi"], params)[0].finish_reason is FinishReason.LENGTH


def test_a_grammar_that_other_parameters_forbid_fails_alone(llm: LLM) -> None:
    alone = llm.generate(["Hi"], SamplingParams(**GREEDY))[0].token_ids
    params = SamplingParams(**GREEDY, structured_outputs=CHOICE, allowed_token_ids=[5])
    bad, beside = llm.generate(["Hi", "Hi"], [params, SamplingParams(**GREEDY)])
    assert bad.finish_reason is FinishReason.ERROR
    assert beside.token_ids == alone


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"json": {"type": 5}}, "structured_outputs.json cannot be used: .*type"),
        ({"json": {"$ref": "http://127.0.0.1:9/x"}}, "structured_outputs.json cannot be used"),
        ({"regex": "("}, "structured_outputs.regex cannot be used: .*unclosed"),
        ({"regex": "(?=a)b"}, "structured_outputs.regex cannot be used"),
        ({"grammar": "nope"}, "structured_outputs.grammar cannot be used"),
        ({"grammar": "start: start"}, "structured_outputs.grammar cannot be used"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_its_field(llm: LLM, given: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=f"prompt 0: {words}"):
        llm.generate(["Hi"], SamplingParams(structured_outputs=StructuredOutputsParams(**given)))
    assert not llm.engine.has_work


def test_a_model_without_an_end_token_refuses() -> None:
    with LLM("random:tiny-llama", dtype="float32", device="cpu", max_model_len=64, num_kv_blocks=8) as tiny:
        with pytest.raises(RequestError, match="end token"):
            tiny.generate([[5]], SamplingParams(structured_outputs=CHOICE))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "exactly one"),
        ({"choice": []}, "exactly one"),
        ({"choice": ["a", ""]}, "choice"),
        ({"choice": ["a"] * 1025}, "choice"),
        ({"regex": 5}, "regex"),
        ({"grammar": b"a"}, "grammar"),
        ({"json": "{"}, "json must be"),
        ({"json": [1]}, "json must be"),
        ({"json": {"a": {1, 2}}}, "json must be"),
        ({"json_object": 1}, "json_object"),
        ({"regex": "a" * 65_537}, "65536"),
    ],
)
def test_bad_structured_outputs_name_their_field(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        StructuredOutputsParams(**given)


def test_structured_outputs_end_at_the_end_token() -> None:
    with pytest.raises(RequestError, match="ignore_eos"):
        SamplingParams(ignore_eos=True, structured_outputs=CHOICE)
    with pytest.raises(RequestError, match="StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def test_a_grammar_that_would_hold_up_every_step_is_refused(llm: LLM) -> None:
    """Every text has countless parses: a mask took seconds, and all others waited for it."""
    grammar = "start: s\ns: s s s | s s | /[a-z ]/ |"
    with pytest.raises(RequestError, match="structured_outputs.grammar cannot be used"):
        llm.generate("a", SamplingParams(structured_outputs=StructuredOutputsParams(grammar=grammar)))


def test_a_large_schema_has_room(llm: LLM) -> None:
    part = {"type": "object", "properties": {"name": {"type": "string"}, "tags": {"items": {"anyOf": [{}, {}]}}}}
    schema = {"type": "object", "properties": {f"part{i}": part for i in range(100)}, "required": ["part7", "part99"]}
    params = SamplingParams(max_tokens=60, structured_outputs=StructuredOutputsParams(json=schema))
    assert llm.generate("a", params)[0].finish_reason is not FinishReason.ERROR

"""Every field of SamplingParams at its extremes, alone and in pairs: no value ends the engine, leaves something behind
or changes a neighbour's tokens, and what is refused is refused before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest

from minillm import LLM, FinishReason, SamplingParams
from minillm.errors import RequestError

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 60,
    "num_kv_blocks": 250,
    "max_num_batched_tokens": 128,
}
NEIGHBOURS = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, top_k=30, seed=5, max_tokens=12, ignore_eos=True),
]
PROMPTS = [[5, 6, 7], [8] * 20]
VOCAB = 512
# structured_outputs needs a model with an end token: test_grammars.py
EXTREMES: dict[str, tuple[Any, ...]] = {
    "max_tokens": (1, 2**31 - 1),
    "temperature": (0.0, 1e-5, 100.0),
    "top_k": (-1, 1, 2**31 - 1),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "logit_bias": ({}, {0: 100.0, VOCAB - 1: -100.0}, dict.fromkeys(range(300), -100.0)),
    "bad_words": (["ba"] * 128, ["ba be bi bo " * 4]),
    "allowed_token_ids": ([0], [VOCAB - 1] * 3, list(range(VOCAB))),
    "seed": (0, 2**63 - 1),
    "stop": ("a", ["b" * 1000] * 64),
    "stop_token_ids": ([], list(range(VOCAB))),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
    "n": (1, 5),
    "min_tokens": (0, 1, 64),
    "ignore_eos": (False, True),
}
SINGLES = [{name: value} for name, values in EXTREMES.items() for value in values]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("random:tiny-llama", **OPTIONS) as engine:
        yield engine


def check_beside_neighbours(llm: LLM, cases: list[dict[str, Any]]) -> None:
    """All cases in one batch: each ends, and the neighbours' tokens are those that they have alone."""
    expected = [out.token_ids for out in llm.generate(PROMPTS, NEIGHBOURS)]
    params = []
    for case in cases:
        try:
            params.append(SamplingParams(**{"max_tokens": 8, "seed": 1, **case}))
        except RequestError:
            assert "min_tokens" in case, case  # more than max_tokens: the only pair that contradicts itself
    outputs = llm.generate([*PROMPTS, *([5, 9, 11] for _ in params)], [*NEIGHBOURS, *params])
    assert [out.token_ids for out in outputs[:2]] == expected
    for each, out in zip(params, outputs[2:], strict=True):
        assert len(out.completions) == each.n
        for completion in out.completions:
            assert completion.finish_reason is not None, each
            is_dead = (
                each.min_tokens > 0 and len(each.stop_token_ids) == VOCAB
            )  # every token is a stop token, and banned
            is_dead |= each.allowed_token_ids is not None and len(set(each.allowed_token_ids)) == 1
            if not is_dead:
                assert completion.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), each
    assert not llm.engine.has_work
    llm.engine.scheduler.check_invariants()
    assert llm.engine.scheduler.kv.usage == 0.0


def test_every_field_has_extremes() -> None:
    assert {field.name for field in fields(SamplingParams)} - set(EXTREMES) == {"structured_outputs"}


def test_fields_alone(llm: LLM) -> None:
    check_beside_neighbours(llm, SINGLES)


@pytest.mark.parametrize("part", range(6))
def test_fields_in_pairs(llm: LLM, part: int) -> None:
    pairs = [a | b for a, b in combinations(SINGLES, 2) if a.keys() != b.keys()][part::6]
    for at in range(0, len(pairs), 50):
        check_beside_neighbours(llm, pairs[at : at + 50])

"""Logprobs of outputs and prompts are log_softmax of the model's own logits; n completions share a prompt."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from minillm import LLM, FinishReason, SamplingParams
from minillm.errors import RequestError
from minillm.types import Logprob
from tests.engine.forward import forward_logits

MODEL = "random:tiny-qwen3"
BASE: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "block_size": 16,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 12,
    "max_model_len": 160,
    "num_kv_blocks": 100,
}
NUM_OUTPUT = 10


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, **BASE) as engine:
        yield engine


def prompts(num: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 250) for _ in range(rng.randrange(1, 100))] for _ in range(num)]


def check_scores(found: dict[int, Logprob], logits_V: torch.Tensor, token: int, num_top: int) -> None:
    """What is reported of a token is what a pass of the model says of it."""
    expected_V = logits_V.log_softmax(-1)
    best = expected_V.topk(num_top)
    assert list(found)[0] == token
    assert set(found) == {token, *best.indices.tolist()}
    for each, logprob in found.items():
        assert logprob.logprob == pytest.approx(float(expected_V[each]), abs=2e-4)
    assert found[token].rank == int((expected_V > expected_V[token]).sum()) + 1
    assert [found[t].rank for t in best.indices.tolist()] == list(range(1, num_top + 1))


@pytest.mark.parametrize("overlap", [False, True])
def test_output_logprobs_in_a_mixed_batch(overlap: bool) -> None:
    """Rows with 0, 1 and 20 likeliest tokens beside rows with none and rows with penalties, which they do not see."""
    batch = prompts(8)
    kinds: list[dict[str, Any]] = [
        {"logprobs": 0, "temperature": 0.0},
        {},
        {"logprobs": 1, "temperature": 0.7, "top_k": 5},
        {"logprobs": 20, "temperature": 1.5, "repetition_penalty": 1.5, "logit_bias": {9: 5.0}},
    ]
    params = [SamplingParams(**kinds[i % 4], seed=i, max_tokens=NUM_OUTPUT, ignore_eos=True) for i in range(8)]
    with LLM(MODEL, **BASE, overlap=overlap) as llm:
        outputs = llm.generate(batch, params)
        for prompt, each, out in zip(batch, params, outputs, strict=True):
            assert out.prompt_logprobs is None
            if each.logprobs is None:
                assert out.logprobs is None and out.completions[0].cumulative_logprob is None
                continue
            assert out.logprobs is not None and len(out.logprobs) == NUM_OUTPUT
            logits = forward_logits(llm, prompt + out.token_ids)[len(prompt) - 1 : -1]
            for found, logits_V, token in zip(out.logprobs, logits, out.token_ids, strict=True):
                check_scores(found, logits_V, token, each.logprobs)
                assert found[token].decoded_token == llm.tokenizer.decode([token])
            expected = sum(found[token].logprob for found, token in zip(out.logprobs, out.token_ids, strict=True))
            assert out.completions[0].cumulative_logprob == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 16, "overlap": False}, {"num_kv_blocks": 11}])
def test_prompt_logprobs_with_chunks_a_cached_prefix_and_preemption(options: dict[str, Any]) -> None:
    batch = [*prompts(6, seed=4), [7]]
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, prompt_logprobs=3, logprobs=2)
    plain = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    with LLM(MODEL, **(BASE | options)) as llm:
        expected = [out.token_ids for out in llm.generate(batch, plain)]
        outputs = llm.generate(batch, params)
        if "num_kv_blocks" in options:
            assert sum(out.timings.num_preemptions for out in outputs) > 0
        assert [out.token_ids for out in outputs] == expected
        for prompt, out in zip(batch, outputs, strict=True):
            assert out.prompt_logprobs is not None and out.logprobs is not None
            assert out.prompt_logprobs[0] is None
            assert (len(out.prompt_logprobs), len(out.logprobs)) == (len(prompt), 60)
            logits = forward_logits(llm, prompt + out.token_ids)[:-1]
            for found, logits_V, token in zip(
                [*out.prompt_logprobs[1:], *out.logprobs], logits, [*prompt[1:], *out.token_ids], strict=True
            ):
                assert found is not None
                assert found[token].logprob == pytest.approx(float(logits_V.log_softmax(-1)[token]), abs=2e-4)
            for found, logits_V, token in zip(out.prompt_logprobs[1:], logits, prompt[1:], strict=False):
                assert found is not None
                check_scores(found, logits_V, token, 3)


def test_drafts_that_do_not_hold_have_no_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=2)
    expected = llm.generate([[5, 6, 7]], params)[0]
    generation = llm.engine.add([5, 6, 7], params)
    request = generation.request
    request.is_stepwise = True
    while llm.engine.has_work:
        if request.num_output and not request.num_unknown:
            request.drafts = [*expected.token_ids[request.num_output : request.num_output + 2], 6]
        llm.engine.step()
    assert [score.token for score in generation.scores] == expected.token_ids
    assert expected.logprobs is not None
    for score, found in zip(generation.scores, expected.logprobs, strict=True):
        assert score.logprob == pytest.approx(found[score.token].logprob, abs=1e-4)
        assert {token for token, _ in score.top} <= set(found)


def test_a_stop_string_ends_the_logprobs_as_well(llm: LLM) -> None:
    params = {"temperature": 0.0, "max_tokens": NUM_OUTPUT, "ignore_eos": True, "logprobs": 0}
    free = llm.generate([[5, 6, 7]], SamplingParams(**params))[0]
    stopped = llm.generate([[5, 6, 7]], SamplingParams(**params, stop=llm.tokenizer.decode(free.token_ids[2:3])))[0]
    assert stopped.logprobs is not None
    assert len(stopped.logprobs) == len(stopped.token_ids) <= 3


def test_completions_are_those_of_their_seeds_and_share_the_prompt() -> None:
    prompt, n = prompts(1, seed=9)[0] * 2, 4
    single = [
        SamplingParams(temperature=1.0, seed=7 + i, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=1)
        for i in range(n)
    ]
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=1, n=n)
    neighbour = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    for options in ({}, {"enable_prefix_caching": False}, {"overlap": False}):
        with LLM(MODEL, **(BASE | options)) as llm:
            num_before = llm.engine.metrics.num_batched_tokens
            out, beside = llm.generate([prompt, [5, 6]], [params, neighbour])
            num_computed = llm.engine.metrics.num_batched_tokens - num_before
            assert num_computed <= len(prompt) + n * (NUM_OUTPUT + 2) + 24, "the prompt was computed again"
            expected = [llm.generate([prompt], each)[0] for each in single]
            assert beside.token_ids == llm.generate([[5, 6]], neighbour)[0].token_ids
        assert [c.index for c in out.completions] == list(range(n))
        assert [c.token_ids for c in out.completions] == [each.token_ids for each in expected]
        assert len({tuple(c.token_ids) for c in out.completions}) == n
        assert (out.text, out.token_ids, out.logprobs) == (
            out.completions[0].text,
            out.completions[0].token_ids,
            out.completions[0].logprobs,
        )
        assert all(c.logprobs is not None and len(c.logprobs) == NUM_OUTPUT for c in out.completions)


def test_completions_hold_the_blocks_of_one_prompt() -> None:
    prompt, n = [5 + i % 200 for i in range(96)], 8
    with LLM(MODEL, **(BASE | {"overlap": False})) as llm:
        params = SamplingParams(temperature=1.0, seed=1, max_tokens=8, ignore_eos=True, n=n)
        first = llm.engine.add(prompt, params)
        most = 0
        while llm.engine.has_work:
            llm.engine.step()
            held = [list(g.request.blocks) for g in (first, *first.siblings) if g.request.row]
            if len(held) == n:
                most = max(most, len({block for blocks in held for block in blocks}))
    assert most == 96 // 16 - 1 + n + n, "five whole blocks, and for each a copy of the sixth and its own output's"


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_every_completion_ends_whoever_ends_first(llm: LLM, max_tokens: int) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=max_tokens, ignore_eos=True, n=3)
    out = llm.generate([[5, 6, 7]], params)[0]
    assert [len(c.token_ids) for c in out.completions] == [max_tokens] * 3
    assert all(c.finish_reason is FinishReason.LENGTH for c in out.completions)


def test_aborting_one_completion_leaves_the_others(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=5, ignore_eos=True, n=3)
    expected = [c.token_ids for c in llm.generate([[5, 6, 7]], params)[0].completions]
    for number in range(3):
        first = llm.engine.add([5, 6, 7], params)
        each = [first, *first.siblings]
        llm.engine.finish(each[number], FinishReason.ABORT)
        assert each[number].finish_reason is FinishReason.ABORT
        while llm.engine.has_work:
            llm.engine.step()
        got = [g.take_new_tokens() for g in each]
        assert [t for i, t in enumerate(got) if i != number] == [t for i, t in enumerate(expected) if i != number]
        assert got[number] == []
    llm.engine.scheduler.check_invariants()


def test_a_stream_is_one_completion(llm: LLM) -> None:
    with pytest.raises(RequestError, match="n must be 1 for a stream"):
        llm.stream([5], SamplingParams(n=2))

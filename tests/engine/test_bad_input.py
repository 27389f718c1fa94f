"""Bad input is refused with a message that says what to change, and the requests beside it are unharmed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from minillm import LLM, BeamSearchParams, SamplingParams
from minillm.config import Configs
from minillm.engine import launch
from minillm.errors import ConfigError, EngineError, MemoryFitError, ModelNotFoundError, RequestError
from minillm.types import FinishReason

TINY = "random:tiny-llama"
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 128, "num_kv_blocks": 64}
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(TINY, **OPTIONS) as engine:
        yield engine


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ([5] * 128, "max_model_len"),
        ([5] * 5000, "max_model_len"),
        ([5, -1], "token 1 is -1"),
        ([5, 10**6], "token 1 is 1000000"),
        ([5, 1.5], "token 1 is 1.5"),
        ([5, True], "token 1 is True"),
    ],
)
def test_bad_prompts_name_their_index_and_start_nothing(llm: LLM, prompt: list[Any], words: str) -> None:
    with pytest.raises(RequestError, match=f"prompt 1: .*{words}"):
        llm.generate([[5, 6, 7], prompt], GREEDY)
    assert not llm.engine.has_work


def test_longer_than_the_cache() -> None:
    with LLM(TINY, **(OPTIONS | {"num_kv_blocks": 2, "block_size": 16})) as llm:
        with pytest.raises(RequestError, match="num_kv_blocks"):
            llm.generate([[5] * 40], GREEDY)
        assert len(llm.generate([[5] * 20], GREEDY)[0].token_ids) == 4


def test_output_stops_at_the_last_position(llm: LLM) -> None:
    out = llm.generate([[5] * 120], SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True))[0]
    assert len(out.token_ids) == 8
    assert out.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": math.nan},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": 10**400},
        {"temperature": "hot"},
        {"temperature": torch.tensor([0.5, 1.0])},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": -0.1},
        {"min_p": math.nan},
        {"max_tokens": 0},
        {"max_tokens": -5},
        {"max_tokens": True},
        {"max_tokens": 10**5000},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": [""]},
        {"stop": 5},
        {"stop": ["a"] * 65},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": "ab"},
        {"ignore_eos": 1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 101},
        {"repetition_penalty": math.inf},
        {"presence_penalty": 2.1},
        {"presence_penalty": math.nan},
        {"frequency_penalty": -2.1},
        {"frequency_penalty": "a"},
        {"logit_bias": [(5, 1.0)]},
        {"logit_bias": {5: 101}},
        {"logit_bias": {5: math.nan}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": dict.fromkeys(range(301), 1.0)},
        {"bad_words": [""]},
        {"bad_words": "word"},
        {"bad_words": ["a"] * 129},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [-1]},
        {"allowed_token_ids": 5},
        {"logprobs": 21},
        {"logprobs": -1},
        {"prompt_logprobs": 21},
        {"prompt_logprobs": True},
        {"n": 0},
        {"n": 129},
        {"min_tokens": -1},
        {"min_tokens": 257},
        {"min_tokens": 3, "max_tokens": 2},
    ],
)
def test_bad_parameters_name_their_field(field: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(field))):
        SamplingParams(**field)


def test_numbers_of_numpy_are_numbers_like_others(llm: LLM) -> None:
    """Their sums overflow: 28 tokens and 100 more are less than none in eight bits, and a search found no end."""
    prompt = [5] * 28
    given = {"max_tokens": np.int8(100), "seed": np.int64(3), "n": np.int8(2), "min_tokens": np.int8(100)}
    assert SamplingParams(max_tokens=np.int32(2**31 - 1)).max_tokens + 1 == 2**31  # type: ignore[arg-type]
    got, expected = (
        llm.generate([prompt], SamplingParams(**each, stop_token_ids=[*range(1, 99)]))[0]
        for each in (given, {name: int(value) for name, value in given.items()})
    )
    assert [each.token_ids for each in got.completions] == [each.token_ids for each in expected.completions]
    assert len(got.token_ids) == 100
    beams = BeamSearchParams(max_tokens=np.int8(100), beam_width=np.int8(2), length_penalty=np.float16(8))  # type: ignore[arg-type]
    assert repr(beams) == repr(BeamSearchParams(max_tokens=100, beam_width=2, length_penalty=8.0))


def test_unknown_options_are_errors() -> None:
    with pytest.raises(TypeError, match="tempratur"):
        SamplingParams(tempratur=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="max_len"):
        LLM(TINY, max_len=5)


def test_stop_token_out_of_range(llm: LLM) -> None:
    with pytest.raises(RequestError, match="stop_token_ids"):
        llm.generate([[5]], SamplingParams(stop_token_ids=[10**6]))


def test_params_per_prompt_must_match(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 prompts and 3"):
        llm.generate([[5], [6]], [GREEDY] * 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int4"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:99"}, "device"),
        ({"block_size": 17}, "block_size"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_model_len": 1}, "max_model_len must be an integer from 2"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": math.nan}, "gpu_memory_utilization"),
        ({"min_chunk_size": 64, "max_chunk_size": 16}, "max_chunk_size"),
        ({"max_model_len": 10**9}, "max_model_len"),
        ({"seed": -1}, "seed"),
        ({"overlap": "yes"}, "overlap"),
        ({"device": None}, "device"),
        ({"block_size": 16.0}, "block_size"),
        ({"num_kv_blocks": 10**400}, "num_kv_blocks"),
        ({"max_num_seqs": 10**8}, "max_num_seqs"),
        ({"gpu_memory_utilization": "a"}, "gpu_memory_utilization"),
        ({"seed": True}, "seed"),
        ({"min_chunk_size": True}, "min_chunk_size"),
        ({"min_chunk_size": None}, "min_chunk_size"),
        ({"enable_chunked_prefill": False, "max_chunk_size": 16}, "max_chunk_size"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(TINY, **options)


def test_a_cache_that_does_not_fit_gives_three_numbers() -> None:
    with pytest.raises(MemoryFitError, match=r"weights .* GiB, activations .* GiB .* cache .* KiB per token.*Try"):
        LLM(TINY, **(OPTIONS | {"num_kv_blocks": 10**9}))


def test_a_model_of_endless_positions_takes_a_max_model_len(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = replace(Configs.TINY_LLAMA, max_position=2**31 - 1)
    monkeypatch.setattr(launch, "load_config", lambda files: endless)
    options = OPTIONS | {"max_model_len": None}
    with pytest.raises(MemoryFitError, match=r"rotary table of max_model_len 2147483647 .*lower max_model_len"):
        LLM(TINY, **options)
    with LLM(TINY, **(options | {"max_model_len": 64})) as llm:
        assert len(llm.generate([[5]], GREEDY)[0].token_ids) == 4


def test_unknown_model() -> None:
    with pytest.raises(ModelNotFoundError, match="smollm2"):
        LLM("no-such-model")
    with pytest.raises(ModelNotFoundError, match="tiny-llama"):
        LLM("random:no-such-shape")
    with pytest.raises(ModelNotFoundError, match="smollm2"):
        LLM("x" * 400)


def test_one_failing_row_fails_alone() -> None:
    """A request whose logits are not finite ends as `error`; its neighbours' tokens do not change."""
    with LLM(TINY, **OPTIONS) as llm:
        expected = llm.generate([[5, 6, 7], [8, 9]], GREEDY)
        embedding = llm._runner.model.embedding.weight
        embedding[11] = math.nan
        good, bad, other = llm.generate([[5, 6, 7], [11], [8, 9]], GREEDY)
    assert bad.finish_reason is FinishReason.ERROR
    assert [good.token_ids, other.token_ids] == [out.token_ids for out in expected]


@pytest.mark.parametrize("priority", ["high", None, float("nan"), 2**40, True])
def test_a_priority_that_cannot_be_compared_harms_nobody(priority: Any) -> None:
    with LLM(TINY, **OPTIONS) as llm:
        alone = llm.generate([[7, 8]], GREEDY)[0].token_ids
        stream = llm.stream([7, 8], GREEDY)
        tokens = [*next(stream).token_ids]
        for ask in (
            lambda: llm.generate([[5], [6]], GREEDY, priority=priority),
            lambda: llm.stream([5], GREEDY, priority=priority),
            lambda: llm.beam_search([5], priority=priority),
            lambda: llm.engine.add([5], GREEDY, priority),
        ):
            with pytest.raises(RequestError, match="priority must be an integer from"):
                ask()
        assert tokens + [token for chunk in stream for token in chunk.token_ids] == alone


def test_a_scheduler_that_fails_ends_every_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the scheduler is broken")

    with LLM(TINY, **OPTIONS) as llm:
        generations = [llm.engine.add([5, 6, 7], GREEDY) for _ in range(3)]
        llm.engine.step()
        monkeypatch.setattr(llm.engine.scheduler, "schedule", broken)
        monkeypatch.setattr(llm.engine.scheduler, "finish", broken)
        with pytest.raises(EngineError, match="a step failed"):
            while llm.engine.has_work:
                llm.engine.step()
        assert [g.finish_reason for g in generations] == [FinishReason.ERROR] * 3
        assert not llm.engine.has_work


def test_a_failing_step_ends_every_request_once() -> None:
    with LLM(TINY, **OPTIONS) as llm:
        generations = [llm.engine.add([5, 6, 7], GREEDY) for _ in range(3)]
        llm._runner.kv_cache = None  # type: ignore[assignment]
        with pytest.raises(EngineError, match="a step failed"):
            while llm.engine.has_work:
                llm.engine.step()
        assert [g.finish_reason for g in generations] == [FinishReason.ERROR] * 3
        with pytest.raises(EngineError, match="stopped"):
            llm.generate([[5]], GREEDY)

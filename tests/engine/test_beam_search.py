"""Beam search in the engine finds what transformers finds, beside any other requests, and changes none of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm import LLM, BeamSearchParams, FinishReason
from minillm.engine.replay import replay
from minillm.errors import RequestError
from tests.engine.checkpoints import write_word_tokenizer
from tests.engine.test_invariance import BASE, PARAMS, prompts, tokens_of

MODEL = "random:tiny-llama"
RULES: list[dict[str, Any]] = [
    {"beam_width": 4},
    {"beam_width": 2, "length_penalty": 2.0, "early_stopping": True},
    {"beam_width": 3, "length_penalty": -0.5, "early_stopping": "never"},
    {"beam_width": 5, "length_penalty": 0.0, "early_stopping": False},
    {"beam_width": 1, "early_stopping": True},
]


def found_by_transformers(
    model: Any, ids: list[int], params: BeamSearchParams, stops: list[int]
) -> tuple[list[list[int]], list[float]]:
    """Tokens and scores of all beams, best first, without padding."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[0],
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = [row[len(ids) :].tolist() for row in out.sequences]
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
    scores = out.sequences_scores.tolist() if params.beam_width > 1 else []
    return [row[:end] for row, end in zip(rows, ends, strict=True)], scores


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with peaked choices and ends among them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        eos_token_id=[3, 9],
        bos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(shape).save_pretrained(folder)
    write_word_tokenizer(folder, shape.vocab_size)
    return folder


@pytest.mark.parametrize("overlap", [False, True])
def test_many_searches_of_a_tiny_model_are_those_of_transformers(tiny: Path, overlap: bool) -> None:
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = [[5, 6, 7], list(range(10, 50)), [20] * 16, [8]]
    num_ended = 0
    with LLM(str(tiny), **(BASE | {"overlap": overlap, "max_num_seqs": 16})) as llm:
        for rules in RULES:
            for max_tokens in (1, 2, 24):
                params = BeamSearchParams(max_tokens=max_tokens, **rules)
                for prompt, output in zip(ids, llm.beam_search(ids, params), strict=True):
                    tokens, scores = found_by_transformers(oracle, prompt, params, [3, 9])
                    assert [s.token_ids for s in output.sequences] == tokens
                    assert [s.score for s in output.sequences][: len(scores)] == pytest.approx(scores, abs=1e-4)
                    num_ended += sum(s.finish_reason is FinishReason.STOP for s in output.sequences)
        llm.engine.scheduler.check_invariants()
        assert llm.engine.scheduler.num_running == 0 and llm.engine.metrics.kv_usage == 0.0
    assert num_ended > 20, "no search met an end: the case tests nothing"


TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time",
]


def test_searches_of_a_real_model_are_those_of_transformers(smollm2_oracle: torch.nn.Module) -> None:
    with LLM("smollm2", **(BASE | {"max_num_seqs": 16})) as llm:
        ids = [llm.encode(text) for text in TEXTS]
        stops = list(llm.model_config.eos_token_ids)
        for rules in (RULES[0], RULES[1]):
            params = BeamSearchParams(max_tokens=10, **rules)
            for prompt, output in zip(ids, llm.beam_search(ids, params), strict=True):
                tokens, scores = found_by_transformers(smollm2_oracle, prompt, params, stops)
                assert [s.token_ids for s in output.sequences] == tokens
                assert [s.score for s in output.sequences] == pytest.approx(scores, abs=1e-3)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap, prefix cache": {"overlap": True, "enable_prefix_caching": True},
    "budget 16": {"max_num_batched_tokens": 16, "overlap": True},
    "blocks of 32": {"block_size": 32, "num_kv_blocks": 350},
    "n-gram drafts": {"speculative": "ngram", "overlap": True},
    "a cache too small for all": {"num_kv_blocks": 26, "max_num_seqs": 4, "overlap": True},
}
SEARCH = BeamSearchParams(beam_width=3, max_tokens=12)


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, list[list[int]]], list[list[list[int]]]]:
    """Generations and searches, each by itself."""
    with LLM(MODEL, **BASE) as llm:
        greedy = {
            kind: [tokens_of(llm, [p], [s])[0] for p, s in zip(prompts(), params, strict=True)]
            for kind, params in PARAMS.items()
        }
        beams = [[s.token_ids for s in llm.beam_search([p], SEARCH)[0].sequences] for p in prompts()]
    return greedy, beams


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_one_batch_with_greedy_and_sampled_requests(alone: Any, variant: str) -> None:
    """Searches do not depend on their neighbours, nor these on them."""
    expected, expected_beams = alone
    with LLM(MODEL, **(BASE | VARIANTS[variant])) as llm:
        engine = llm.engine
        runs = [engine.add_beams(prompt, SEARCH) for prompt in prompts()]
        each = [engine.add(p, s) for params in PARAMS.values() for p, s in zip(prompts(), params, strict=True)]
        num_steps = 0
        while engine.has_work:
            engine.step()
            engine.scheduler.check_invariants()
            num_steps += 1
        got = [generation.take_new_tokens() for generation in each]
        beams = [[list(f.tokens) for f in run.search.hypotheses.finished] for run in runs]
        assert engine.metrics.kv_usage == 0.0
        if "small" in variant:
            assert engine.scheduler.num_preemptions > 0, "nothing ran short: the case tests nothing"
    assert got == [output for outputs in expected.values() for output in outputs]
    assert beams == expected_beams


def test_a_long_prompt_is_held_once() -> None:
    """1,000 tokens are 62 full blocks of 16 and a part: four beams add their own last blocks, nothing else."""
    options = BASE | {"max_model_len": 2048, "num_kv_blocks": 400, "max_num_batched_tokens": 1024}
    with LLM(MODEL, **options) as llm:
        run = llm.engine.add_beams([5 + i % 200 for i in range(1000)], BeamSearchParams(beam_width=4, max_tokens=30))
        num_used = 0
        while llm.engine.has_work:
            llm.engine.step()
            num_used = max(num_used, 400 - llm.engine.scheduler.num_free_blocks)
        assert len(run.search.hypotheses.finished) == 4
        assert 62 + 4 <= num_used <= 62 + 4 * 3


def test_timings_and_text(tiny: Path) -> None:
    with LLM(str(tiny), **BASE) as llm:
        output = llm.beam_search([[5, 6, 7]], BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True))[0]
        assert [len(s.token_ids) for s in output.sequences] == [6, 6]
        assert output.sequences[0].score == pytest.approx(output.sequences[0].cumulative_logprob / 6)
        assert output.sequences[0].text == llm.tokenizer.decode(output.sequences[0].token_ids)
        assert len(output.timings.token_times) == 6 and output.timings.finished is not None
        assert output.timings.num_prompt_tokens == 3 and output.prompt_token_ids == [5, 6, 7]


def test_a_search_that_is_left_leaves_nothing_behind() -> None:
    with LLM(MODEL, **BASE) as llm:
        run = llm.engine.add_beams([5, 6, 7], SEARCH)
        for _ in range(4):
            llm.engine.step()
        llm.engine.finish_beams(run, FinishReason.ABORT)
        llm.engine.drain()
        assert not llm.engine.has_work and llm.engine.scheduler.num_running == 0
        assert run.finish_reason is FinishReason.ABORT


def test_a_recording_with_searches_can_be_replayed() -> None:
    with LLM(MODEL, **(BASE | {"overlap": True, "max_num_seqs": 4})) as llm:
        llm.beam_search(prompts(), SEARCH)
        replayed = replay(json.loads("".join(llm.engine.scheduler.recording())))  # type: ignore[attr-defined]
    assert replayed.difference is None and replayed.num_steps > 20


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"beam_width": 0}, "beam_width must be an integer from 1 to 64"),
        ({"beam_width": 65}, "beam_width must be an integer from 1 to 64"),
        ({"max_tokens": 0}, "max_tokens must be an integer from 1"),
        ({"length_penalty": float("nan")}, r"length_penalty must be a number in \[-10.0, 10.0\]"),
        ({"length_penalty": 11}, r"length_penalty must be a number in \[-10.0, 10.0\]"),
        ({"early_stopping": "always"}, "early_stopping must be True, False or 'never'"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be an integer"),
        ({"stop_token_ids": [512]}, "stop_token_ids has 512"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False"),
        ({"beam_width": 41}, "the engine has 40: lower beam_width or raise max_num_seqs"),
        ({"beam_width": 30, "stop_token_ids": list(range(100, 120))}, "different tokens and the model has 512"),
        ({"beam_width": 40, "max_tokens": 250}, "lower beam_width or max_tokens, or raise num_kv_blocks"),
    ],
)
def test_what_cannot_be_searched_is_refused(values: dict[str, Any], words: str) -> None:
    with LLM(MODEL, **(BASE | {"num_kv_blocks": 400})) as llm:
        with pytest.raises(RequestError, match=words):
            llm.beam_search([[5, 6, 7]], BeamSearchParams(**values))
        assert not llm.engine.has_work


def test_more_candidates_than_the_device_keeps_are_refused() -> None:
    with LLM("smollm2", **BASE) as llm:
        params = BeamSearchParams(beam_width=16, max_tokens=2, stop_token_ids=list(range(1000, 1064)))
        with pytest.raises(RequestError, match="1056 candidates a beam and 1024 are the most"):
            llm.beam_search([[5, 6, 7]], params)
        assert not llm.engine.has_work
        most = BeamSearchParams(beam_width=16, max_tokens=2, stop_token_ids=list(range(1000, 1062)))
        assert len(llm.beam_search([[5, 6, 7]], most)[0].sequences) == 16

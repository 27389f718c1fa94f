"""The engine on a GPU: bf16 bit-equal with graphs and overlap on or off, fp32 invariant, bf16 logits as near to fp32 as
those of transformers, no host sync in the steady loop. Run with `pytest -m gpu`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm import LLM, BeamSearchParams, SamplingParams
from minillm.decoding.controller import Fixed
from tests.engine.checkpoints import write_word_tokenizer
from tests.engine.forward import forward_logits

pytestmark = pytest.mark.gpu

NAMES = ("num_drafts", "num_accepted_drafts")
BASE: dict[str, Any] = {
    "device": "cuda",
    "max_num_batched_tokens": 256,
    "max_num_seqs": 40,
    "max_model_len": 512,
    "num_kv_blocks": 600,
    "block_size": 16,
    "enable_prefix_caching": False,
}


def prompts(num: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 500) for _ in range(rng.randrange(1, 200))] for _ in range(num)]


def params(num: int) -> list[SamplingParams]:
    """Greedy, plain random, filtered and edited rows by turns, of different lengths."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "logit_bias": {7: 1.0}},
        {"temperature": 0.7, "presence_penalty": 0.5, "bad_words": ["baba bade"], "min_tokens": 3},
        {"temperature": 0.7, "top_p": 0.9, "allowed_token_ids": list(range(3, 400, 2)), "logprobs": 2},
    ]
    return [SamplingParams(**kinds[i % 6], seed=i, max_tokens=20 + i, ignore_eos=True) for i in range(num)]


def outputs(model: str, options: dict[str, Any], num: int = 20) -> list[list[int]]:
    with LLM(model, **(BASE | options)) as llm:
        return [out.token_ids for out in llm.generate(prompts(num), params(num))]


@pytest.mark.parametrize("model", ["random:tiny-qwen3", "random:smollm2-135m"])
def test_bf16_is_bit_equal_with_graphs_and_overlap_on_or_off(model: str) -> None:
    plain = outputs(model, {"enforce_eager": True, "overlap": False})
    assert outputs(model, {"enforce_eager": True, "overlap": True}) == plain
    assert outputs(model, {"enforce_eager": False, "overlap": False}) == plain
    assert outputs(model, {"enforce_eager": False, "overlap": True}) == plain


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 16},
        {"max_num_batched_tokens": 64, "block_size": 32, "num_kv_blocks": 300},
        {"max_num_batched_tokens": 1024},
        {"enable_prefix_caching": True},
        {"enforce_eager": True, "overlap": False},
        {"num_kv_blocks": 45},
        {"speculative": "ngram"},
        {"speculative": "random:tiny-llama", "num_drafts": 3},
        {"speculative": "random:tiny-llama", "num_drafts": 3, "draft_device": "cpu"},
    ],
)
def test_fp32_does_not_depend_on_how_it_runs(options: dict[str, Any]) -> None:
    model = "random:tiny-llama"
    expected = outputs(model, {"dtype": "float32"}, num=9)
    assert outputs(model, {"dtype": "float32"} | options, num=9) == expected


def test_bf16_logits_are_as_near_to_fp32_as_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        initializer_range=0.05,
    )
    Qwen3ForCausalLM(shape).save_pretrained(tmp_path)
    write_word_tokenizer(tmp_path, shape.vocab_size)
    ids = prompts(1)[0] + prompts(2)[1] * 3
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).cuda().eval()
        with torch.inference_mode():
            logits[dtype] = model(torch.tensor([ids], device="cuda")).logits[0].float()
        del model
    theirs = logits[torch.bfloat16] - logits[torch.float32]
    with LLM(str(tmp_path), **(BASE | {"dtype": "bfloat16"})) as llm:
        ours = forward_logits(llm, ids) - logits[torch.float32]
    scale = float(logits[torch.float32].abs().mean())
    print(f"bf16 error rms / mean |logit|: ours {rms(ours) / scale:.4f}, transformers {rms(theirs) / scale:.4f}")
    assert rms(ours) <= 1.05 * rms(theirs)


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def test_the_steady_loop_never_waits_but_for_its_results() -> None:
    with LLM("random:tiny-qwen3", **BASE) as llm:
        llm.generate(prompts(20), params(20))  # every kernel is compiled
        for prompt, each in zip(prompts(20), params(20), strict=True):
            llm.engine.add(prompt, each)
        torch.cuda.set_sync_debug_mode("error")
        try:
            while llm.engine.has_work:
                llm.engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_heads_that_no_kernel_takes_are_served(tmp_path: Path) -> None:
    """By standard attention, which no graph can hold; a warning says so."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=288)
    shape.num_attention_heads = shape.num_key_value_heads = 1
    LlamaForCausalLM(shape).save_pretrained(tmp_path)
    write_word_tokenizer(tmp_path, shape.vocab_size)
    with pytest.warns(RuntimeWarning, match="head size of 288"), LLM(str(tmp_path), **BASE) as llm:
        assert len(llm.generate(prompts(2), SamplingParams(max_tokens=4, ignore_eos=True))[1].token_ids) == 4


def test_the_cache_fills_what_is_left() -> None:
    options = {"device": "cuda", "max_num_batched_tokens": 512, "max_num_seqs": 8}
    with LLM("random:smollm2-135m", **options, gpu_memory_utilization=0.2) as llm:
        free, total = torch.cuda.mem_get_info()
        assert total - free < 0.3 * total
        assert llm.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids


def test_logprobs_are_those_of_a_pass_of_the_model() -> None:
    each = SamplingParams(temperature=0.7, seed=1, max_tokens=8, ignore_eos=True, logprobs=5, prompt_logprobs=5)
    with LLM("random:tiny-llama", **(BASE | {"dtype": "float32"})) as llm:
        for prompt, out in zip(prompts(6), llm.generate(prompts(6), each), strict=True):
            assert out.prompt_logprobs is not None and out.logprobs is not None
            expected = forward_logits(llm, prompt + out.token_ids)[:-1].log_softmax(-1)
            found = [*out.prompt_logprobs[1:], *out.logprobs]
            for logprobs, expected_V, token in zip(found, expected, [*prompt[1:], *out.token_ids], strict=True):
                assert logprobs is not None
                for other, logprob in logprobs.items():
                    assert logprob.logprob == pytest.approx(float(expected_V[other]), abs=1e-3)
                assert token in logprobs and len(logprobs) in (5, 6)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_outputs_match_their_schemas(enforce_eager: bool) -> None:
    from tests.engine.test_grammars import check_schemas

    with LLM("smollm2", device="cuda", max_model_len=512, max_num_seqs=40, enforce_eager=enforce_eager) as llm:
        check_schemas(llm, 4)


@pytest.mark.parametrize("overlap", [False, True])
def test_fp32_searches_do_not_depend_on_their_neighbours(overlap: bool) -> None:
    search = BeamSearchParams(beam_width=4, max_tokens=20)
    with LLM("random:tiny-llama", **(BASE | {"dtype": "float32", "overlap": overlap})) as llm:
        alone = [[s.token_ids for s in llm.beam_search([p], search)[0].sequences] for p in prompts(5)]
        expected = [out.token_ids for out in llm.generate(prompts(9, seed=1), params(9))]
        runs = [llm.engine.add_beams(prompt, search) for prompt in prompts(5)]
        others = [llm.engine.add(p, each) for p, each in zip(prompts(9, seed=1), params(9), strict=True)]
        while llm.engine.has_work:
            llm.engine.step()
    assert [[list(f.tokens) for f in run.search.hypotheses.finished] for run in runs] == alone
    assert [generation.take_new_tokens() for generation in others] == expected


@pytest.mark.parametrize("model", ["random:tiny-qwen3", "random:smollm2-135m"])
def test_bf16_drafts_are_bit_equal_with_graphs_on_or_off(model: str) -> None:
    """Both pad steps of drafts alike; few rows go through fused layers, many and those beside chunks do not."""
    found = []
    for enforce_eager in (True, False):
        with LLM(model, **BASE, speculative=model, num_drafts=4, enforce_eager=enforce_eager) as llm:
            assert llm.engine.speculator is not None
            llm.engine.speculator.policy = Fixed(4)
            outputs = llm.generate(prompts(9), params(9))
        found.append([out.token_ids for out in outputs])
        num_drafts, num_held = (sum(getattr(out.timings, name) for out in outputs) for name in NAMES)
        print(f"{model}: {num_held} of {num_drafts} drafts of the model itself held in bf16")
        assert num_held > num_drafts / 2
    assert found[0] == found[1]


def test_fp32_drafts_that_always_hold() -> None:
    """Every shape of a drafting step: a model that drafts for itself, from one row to all of them."""
    options = BASE | {"dtype": "float32", "speculative": "random:tiny-llama", "num_drafts": 4}
    with LLM("random:tiny-llama", **(BASE | {"dtype": "float32"})) as llm:
        expected = [out.token_ids for out in llm.generate(prompts(9), params(9))]
    with LLM("random:tiny-llama", **options) as llm:
        assert llm.engine.speculator is not None
        llm.engine.speculator.policy = Fixed(4)
        outputs = llm.generate(prompts(9), params(9))
    assert [out.token_ids for out in outputs] == expected
    assert all((out.timings.acceptance_rate or 0.0) > 0.9 for out in outputs)


@pytest.mark.multigpu
@pytest.mark.parametrize("devices", [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")])
def test_fp32_drafts_of_another_gpu_always_hold(devices: tuple[str, str]) -> None:
    options = BASE | {"dtype": "float32", "device": devices[0]}
    with LLM("random:tiny-llama", **options) as llm:
        expected = [out.token_ids for out in llm.generate(prompts(9), params(9))]
    drafting = {"speculative": "random:tiny-llama", "num_drafts": 4, "draft_device": devices[1]}
    with LLM("random:tiny-llama", **(options | drafting)) as llm:
        assert llm.engine.speculator is not None
        llm.engine.speculator.policy = Fixed(4)
        outputs = llm.generate(prompts(9), params(9))
    assert [out.token_ids for out in outputs] == expected
    assert all((out.timings.acceptance_rate or 0.0) > 0.9 for out in outputs)

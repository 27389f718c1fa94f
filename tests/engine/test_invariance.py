"""The engine's contract: in fp32 the same tokens, greedy and seeded, whatever the budget, block size, company, prefix
cache, preemption, loop or drafts (`test_speculation.py` has more of those). Neighbours change the order of sums inside
matrix products, so the prompts that are compared are those whose every choice has a margin, and the test counts them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from minillm import LLM, SamplingParams
from tests.engine.forward import forward_logits

NUM_OUTPUT = 12
MARGIN = 1e-3
BASE = {
    "dtype": "float32",
    "device": "cpu",
    "block_size": 16,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 40,
    "max_model_len": 256,
    "num_kv_blocks": 700,
    "enable_prefix_caching": False,
    "overlap": False,
}
VARIANTS = {
    "budget 16": {"max_num_batched_tokens": 16},
    "budget 64": {"max_num_batched_tokens": 64},
    "budget 512": {"max_num_batched_tokens": 512},
    "whole prompt": {"enable_chunked_prefill": False},
    "chunks of 20 to 33": {"min_chunk_size": 20, "max_chunk_size": 33},
    "blocks of 32": {"block_size": 32, "num_kv_blocks": 350},
    "prefix cache": {"enable_prefix_caching": True},
    "prefix cache, blocks of 32, budget 64": {
        "enable_prefix_caching": True,
        "block_size": 32,
        "num_kv_blocks": 350,
        "max_num_batched_tokens": 64,
    },
    "overlap": {"overlap": True},
    "overlap, prefix cache, budget 64": {"overlap": True, "enable_prefix_caching": True, "max_num_batched_tokens": 64},
    "n-gram drafts": {"speculative": "ngram"},
    "n-gram drafts, overlap, prefix cache, budget 64": {
        "speculative": "ngram",
        "overlap": True,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 64,
    },
}
TIGHT = {"num_kv_blocks": 26}
TIGHT_VARIANTS = {
    "plain": TIGHT,
    "overlap": TIGHT | {"overlap": True},
    "overlap, prefix cache": TIGHT | {"overlap": True, "enable_prefix_caching": True},
    "n-gram drafts": TIGHT | {"speculative": "ngram"},
    "chunks of 8 to 24": TIGHT | {"min_chunk_size": 8, "max_chunk_size": 24},
}


def params_of(kind: str, num_requests: int, num_output: int) -> list[SamplingParams]:
    """Greedy, or seeded with a seed of its own for each request."""
    if kind == "greedy":
        return [SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)] * num_requests
    seeded = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
    return [SamplingParams(**seeded, seed=i, max_tokens=num_output, ignore_eos=True) for i in range(num_requests)]


PARAMS = {kind: params_of(kind, 6, NUM_OUTPUT) for kind in ("greedy", "seeded")}


def prompts() -> list[list[int]]:
    """Lengths at and beside the edges of blocks; the last two share a prefix. The seed gives choices with margins."""
    rng = random.Random(14)
    ids = [[rng.randrange(5, 250) for _ in range(n)] for n in (1, 16, 33, 100)]
    prefix = [rng.randrange(5, 250) for _ in range(64)]
    return [*ids, [*prefix, 7], [*prefix, 9, 11]]


def others() -> list[list[int]]:
    """32 neighbours, some of which start like the prompts under test."""
    rng = random.Random(6)
    mixed = [[rng.randrange(5, 250) for _ in range(rng.randrange(1, 90))] for _ in range(28)]
    return mixed + [prompts()[-1][:40] + [i] for i in range(4)]


def tokens_of(llm: LLM, batch: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    return [out.token_ids for out in llm.generate(batch, params)]


@pytest.fixture(scope="module", params=["random:tiny-llama", "random:tiny-qwen3"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(model: str) -> dict[str, list[list[int]]]:
    """Each prompt by itself, in the plain loop: the reference."""
    with LLM(model, **BASE) as llm:
        return {
            kind: [tokens_of(llm, [p], [s])[0] for p, s in zip(prompts(), params, strict=True)]
            for kind, params in PARAMS.items()
        }


def smallest_margin(llm: LLM, prompt: list[int], output: list[int]) -> float:
    """The smallest gap between the two best logits over the choices of a greedy output, by one pass of the model."""
    best = forward_logits(llm, prompt + output)[len(prompt) - 1 : -1].topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_tokens(model: str, alone: dict[str, list[list[int]]], variant: str, kind: str) -> None:
    with LLM(model, **(BASE | VARIANTS[variant])) as llm:
        got = tokens_of(llm, prompts(), PARAMS[kind])
        if "prefix cache" in variant:
            again = tokens_of(llm, prompts(), PARAMS[kind])
            assert llm.engine.metrics.num_cached_tokens > 0, "nothing was cached: the case tests nothing"
            assert again == alone[kind]
    assert got == alone[kind]


def preempted_prompts() -> list[list[int]]:
    """Prompts whose outputs are long enough to lose their seats midway; the seeds give choices with margins."""
    generators = ((3, random.Random(2)), (17, random.Random(16)), (30, random.Random(6)), (40, random.Random(6)))
    return [[rng.randrange(5, 250) for _ in range(num_tokens)] for num_tokens, rng in generators]


@pytest.mark.parametrize("kind", PARAMS)
def test_preemption_does_not_matter(model: str, kind: str) -> None:
    """A crowd that came first fills the cache until those who came later lose their seats, and it is they who count."""
    rng = random.Random(6)
    crowd = [[rng.randrange(5, 250) for _ in range(8)] for _ in range(8)]
    crowd_params = [SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)] * len(crowd)
    batch = preempted_prompts()
    params = params_of(kind, len(batch), 40)
    with LLM(model, **BASE) as llm:
        alone = [tokens_of(llm, [prompt], [p])[0] for prompt, p in zip(batch, params, strict=True)]
        if kind == "greedy":
            margins = [smallest_margin(llm, prompt, out) for prompt, out in zip(batch, alone, strict=True)]
            assert min(margins) > MARGIN, f"these prompts have near-ties and prove nothing: {margins}"
    for name, options in TIGHT_VARIANTS.items():
        with LLM(model, **(BASE | options)) as llm:
            outputs = llm.generate([*crowd, *batch], [*crowd_params, *params])[len(crowd) :]
        preemptions = [out.timings.num_preemptions for out in outputs]
        assert sum(preemptions) > 0, f"{name}: those compared were not preempted: the case tests nothing"
        assert [out.token_ids for out in outputs] == alone, f"{name}: preempted {preemptions} times"


def test_budgets_that_cut_a_long_prompt(model: str) -> None:
    """600 tokens in 38, 10 and 2 chunks and whole, beside one that shares half of it and a short one."""
    rng = random.Random(3)
    long = [rng.randrange(5, 250) for _ in range(600)]
    batch = [long, [*long[:300], 8], long[300:303]]
    for kind in PARAMS:
        found = {}
        for num_tokens in (16, 64, 512, 1024):
            for cached in (False, True):
                options = {"max_num_batched_tokens": num_tokens, "enable_prefix_caching": cached, "max_model_len": 1024}
                with LLM(model, **(BASE | options)) as llm:
                    first = llm.generate([long], PARAMS[kind][0])[0]
                    assert first.timings.num_chunks == -(-600 // num_tokens)
                    found[num_tokens, cached] = tokens_of(llm, batch, PARAMS[kind][:3])
                    assert found[num_tokens, cached][0] == first.token_ids
                    if kind == "greedy" and not cached and num_tokens == 1024:
                        margins = [smallest_margin(llm, *pair) for pair in zip(batch, found[1024, False], strict=True)]
                        assert min(margins) > MARGIN, f"these prompts have near-ties and prove nothing: {margins}"
        assert all(tokens == found[1024, False] for tokens in found.values())


@pytest.mark.parametrize("overlap", [False, True])
def test_neighbours_do_not_matter(model: str, alone: dict[str, list[list[int]]], overlap: bool) -> None:
    neighbours = [SamplingParams(temperature=1.0, max_tokens=5 + i, seed=i, ignore_eos=True) for i in range(32)]
    with LLM(model, **(BASE | {"overlap": overlap, "enable_prefix_caching": True})) as llm:
        for kind, params in PARAMS.items():
            got = tokens_of(llm, [*prompts(), *others()], [*params, *neighbours])[: len(params)]
            assert got == alone[kind]
        margins = [smallest_margin(llm, p, out) for p, out in zip(prompts(), alone["greedy"], strict=True)]
    assert min(margins) > MARGIN, f"these prompts have near-ties and prove nothing: {margins}"


REAL = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "In the beginning, the ship left the harbour with forty sailors, two cats and a map that nobody could read.",
]


def test_same_tokens_on_a_real_model() -> None:
    """SmolLM2: budgets of 16 and 512, whole prompts, blocks of 32, prefix cache and overlap, greedy and seeded."""
    params = [SamplingParams(temperature=t, top_k=50, seed=4, max_tokens=8, ignore_eos=True) for t in (0.0, 0.8)]
    each = [p for p in params for _ in REAL]
    found = []
    for options in (
        {"max_num_batched_tokens": 16, "overlap": True, "enable_prefix_caching": True},
        {"block_size": 32, "num_kv_blocks": 350},
        {"enable_chunked_prefill": False},
    ):
        with LLM("smollm2", **(BASE | options)) as llm:
            found.append(tokens_of(llm, [llm.encode(text) for text in REAL * 2], each))
    assert found[0] == found[1] == found[2]

"""Penalties, biases, bans and min_tokens in the engine: the naive engine's tokens, beside plain rows and in any order,
with drafts, after preemption, with and without overlap; neighbours are unharmed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from minillm import LLM, FinishReason, SamplingParams
from minillm.errors import RequestError
from tests.engine import naive

MODEL = "random:tiny-llama"
BASE: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "block_size": 16,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 20,
    "max_model_len": 128,
    "num_kv_blocks": 200,
    "enable_prefix_caching": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"overlap": False},
    "overlap": {"overlap": True},
    "overlap, prefix cache, budget 16": {
        "overlap": True,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 16,
    },
    "tight": {"overlap": True, "num_kv_blocks": 7},
}
NUM_OUTPUT = 24
# The stand-in tokeniser has no pieces: "w v" is the two tokens of w and v.
EDITS: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.4},
    "repetition below 1": {"repetition_penalty": 0.8, "presence_penalty": 0.5},
    "presence": {"presence_penalty": 0.7},
    "frequency": {"frequency_penalty": 0.4},
    "negative": {"frequency_penalty": -0.6, "presence_penalty": -0.3},
    "bias": {"logit_bias": {7: 1.5, 9: -100, 400: 2.0}},
    "allowed": {"allowed_token_ids": list(range(5, 80, 3)), "repetition_penalty": 1.2},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": list(range(3, 500, 2))},
    "all": {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {5: 1.0},
        "allowed_token_ids": list(range(2, 400)),
        "min_tokens": 3,
        "stop_token_ids": [11, 12],
    },
}


def params_of(kind: str, seed: int) -> SamplingParams:
    how = {"temperature": 0.0} if seed % 2 == 0 else {"temperature": 0.9, "top_k": 40, "seed": seed}
    return SamplingParams(**how, **EDITS[kind], max_tokens=NUM_OUTPUT, ignore_eos=True)


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Each kind twice, greedy and random, with prompts that repeat tokens."""
    rng = random.Random(3)
    return [
        ([rng.randrange(5, 60) for _ in range(rng.randrange(1, 50))], params_of(kind, seed))
        for seed, kind in enumerate(kind for kind in EDITS for _ in range(2))
    ]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with LLM(MODEL, **BASE) as llm:
        return [naive.generate(llm, prompt, params) for prompt, params in requests()]


def test_each_edit_changes_something(expected: list[list[int]]) -> None:
    with LLM(MODEL, **BASE) as llm:
        batch = [
            (prompt, SamplingParams(temperature=p.temperature, top_k=p.top_k, seed=p.seed, max_tokens=NUM_OUTPUT))
            for prompt, p in requests()
        ]
        plain = [out.token_ids for out in llm.generate([p for p, _ in batch], [p for _, p in batch])]
    kinds = [kind for kind in EDITS for _ in range(2)]
    differs = {kind: False for kind in EDITS}
    for kind, output, edited_output in zip(kinds, plain, expected, strict=True):
        differs[kind] |= output != edited_output
    assert [kind for kind, differ in differs.items() if not differ] == ["none"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_those_of_the_naive_engine(expected: list[list[int]], variant: str) -> None:
    with LLM(MODEL, **(BASE | VARIANTS[variant])) as llm:
        outputs = llm.generate([prompt for prompt, _ in requests()], [params for _, params in requests()])
    if variant == "tight":
        num_preemptions = [out.timings.num_preemptions for out in outputs]
        assert sum(num_preemptions) > 3, f"hardly any was preempted: the case tests little ({num_preemptions})"
    kinds = [kind for kind in EDITS for _ in range(2)]
    differing = [k for k, out, tokens in zip(kinds, outputs, expected, strict=True) if out.token_ids != tokens]
    assert differing == []


@pytest.mark.parametrize("num_right", [0, 1, 3])
def test_drafts_before_a_position_count(expected: list[list[int]], num_right: int) -> None:
    """Rows with drafts, some right and the rest wrong, give the tokens of rows without."""
    with LLM(MODEL, **BASE) as llm:
        generations = [llm.engine.add(prompt, params) for prompt, params in requests()]
        for generation in generations:
            generation.request.is_stepwise = True
        num_gained = []
        while llm.engine.has_work:
            for generation, tokens in zip(generations, expected, strict=True):
                request = generation.request
                if request.row and request.num_output and not request.num_unknown:
                    true = tokens[request.num_output : request.num_output + num_right]
                    request.drafts = [*true, 6, 6]
            before = [g.request.num_output for g in generations]
            llm.engine.step()
            num_gained += [g.request.num_output - n for g, n in zip(generations, before, strict=True)]
        assert max(num_gained) > num_right
        got = [list(g.request.tokens[g.request.num_prompt :]) for g in generations]
    kinds = [kind for kind in EDITS for _ in range(2)]
    assert [k for k, tokens, true in zip(kinds, got, expected, strict=True) if tokens != true] == []


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, **BASE) as engine:
        yield engine


def test_bad_words_of_one_and_of_two_tokens(llm: LLM) -> None:
    greedy = {"temperature": 0.0, "max_tokens": NUM_OUTPUT, "ignore_eos": True}
    prompt = [5, 6, 7]
    free = llm.generate([prompt], SamplingParams(**greedy))[0].token_ids
    single, pair = llm.tokenizer.decode([free[4]]).strip(), llm.tokenizer.decode(free[8:10]).strip()
    for words in ([single], [pair], [single, pair]):
        params = SamplingParams(**greedy, bad_words=words)
        got = llm.generate([prompt, prompt], [params, SamplingParams(**greedy)])
        assert got[0].token_ids == naive.generate(llm, prompt, params) != free
        assert got[1].token_ids == free
    # A bad word that the prompt begins and the output ends is none: it is not in the output.
    bridge = llm.tokenizer.decode([7, free[0]]).strip()
    assert llm.generate([prompt], SamplingParams(**greedy, bad_words=[bridge]))[0].token_ids == free


def test_a_bad_word_may_have_sixteen_tokens_though_a_space_makes_them_more() -> None:
    word = "1" * 16
    with LLM("smollm2", device="cpu", dtype="float32", max_model_len=64, num_kv_blocks=8) as llm:
        lengths = [len(llm.tokenizer.encode(text, add_special_tokens=False)) for text in (word, f" {word}")]
        assert lengths == [16, 17]
        llm.engine.check([5], SamplingParams(bad_words=[word]))
        with pytest.raises(RequestError, match="not 1 to 16 tokens"):
            llm.engine.check([5], SamplingParams(bad_words=[word + "1"]))


def test_a_request_without_a_token_to_choose_fails_alone(llm: LLM) -> None:
    greedy = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}
    plain = SamplingParams(**greedy)
    nothing = SamplingParams(**greedy, allowed_token_ids=[9], bad_words=[llm.tokenizer.decode([9]).strip()])
    alone = llm.generate([[5, 6]], plain)[0].token_ids
    outputs = llm.generate([[5, 6], [5, 6]], [nothing, plain])
    assert outputs[0].finish_reason is FinishReason.ERROR
    assert outputs[1].token_ids == alone


def test_min_tokens_holds_back_stop_strings(llm: LLM) -> None:
    greedy = {"temperature": 0.0, "max_tokens": NUM_OUTPUT, "ignore_eos": True}
    free = llm.generate([[5, 6, 7]], SamplingParams(**greedy))[0].token_ids
    first = llm.tokenizer.decode(free[:1])
    stopped = llm.generate([[5, 6, 7]], SamplingParams(**greedy, stop=first))[0]
    assert (stopped.finish_reason, len(stopped.token_ids)) == (FinishReason.STOP, 1)
    later = llm.generate([[5, 6, 7]], SamplingParams(**greedy, stop=first, min_tokens=2))[0]
    assert later.token_ids == free[: free.index(free[0], 2) + 1]
    assert later.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"logit_bias": {10**6: 1.0}}, "logit_bias has 1000000"),
        ({"allowed_token_ids": [5, 10**6]}, "allowed_token_ids has 1000000"),
        ({"bad_words": ["a " * 17]}, "bad_words has"),
        ({"bad_words": [" "]}, "bad_words has ' '"),
    ],
)
def test_what_the_model_lacks_is_refused(llm: LLM, field: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        llm.generate([[5]], SamplingParams(**field))
    assert not llm.engine.has_work

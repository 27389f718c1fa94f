"""Speculation changes nothing but the time: same tokens with drafts good and bad, ends where they are, counts that are
true, and the two loops by turns."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from minillm import LLM, BeamSearchParams, FinishReason, SamplingParams
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler
from minillm.decoding.controller import Controller, Fixed
from minillm.decoding.draft_model import DraftModel
from minillm.errors import ConfigError
from minillm.runtime.cuda_graphs import padded_shapes
from tests.engine.test_invariance import BASE, PARAMS, TIGHT, params_of, preempted_prompts, prompts, tokens_of

MODEL = "random:tiny-llama"
OPTIONS: dict[str, Any] = BASE | {"speculative": "ngram", "num_drafts": 4}


class Foreseen:
    """Drafts what is known to come, each token wrong by the given chance."""

    def __init__(self, texts: list[list[int]], chance: float) -> None:
        self.texts, self.chance, self.rng = texts, chance, random.Random(0)

    def has_guess(self, request: Request) -> bool:
        return True

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        return {request: self.drafts(list(request.tokens), num) for request, num in wanted.items()}

    def drafts(self, tokens: list[int], num: int) -> list[int]:
        text = next(text for text in self.texts if text[: len(tokens)] == tokens)
        return [t if self.rng.random() >= self.chance else t ^ 1 for t in text[len(tokens) : len(tokens) + num]]

    def go_on(self) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass


class ByTurns(Fixed):
    """Drafts in three steps of every five."""

    num_asked = 0

    def is_on(self, num_rows: int) -> bool:
        self.num_asked += 1
        return self.num_asked % 5 < 3


def force(llm: LLM, policy: Fixed, drafter: Foreseen | None = None) -> None:
    """Draft whether it pays or not."""
    assert llm.engine.speculator is not None
    llm.engine.speculator.policy = policy
    if drafter is not None:
        llm.engine.speculator.drafter = drafter


@pytest.fixture(scope="module")
def alone() -> dict[str, list[list[int]]]:
    with LLM(MODEL, **BASE) as llm:
        return {
            kind: [tokens_of(llm, [p], [s])[0] for p, s in zip(prompts(), params, strict=True)]
            for kind, params in PARAMS.items()
        }


VARIANTS: dict[str, dict[str, Any]] = {
    "plain loop": {},
    "overlap": {"overlap": True},
    "overlap, prefix cache, budget 64": {"overlap": True, "enable_prefix_caching": True, "max_num_batched_tokens": 64},
    "budget 16": {"max_num_batched_tokens": 16},
    "blocks of 32": {"block_size": 32, "num_kv_blocks": 350},
}


CASES = [(variant, 0.3, policy) for variant in VARIANTS for policy in (Fixed, ByTurns)]


@pytest.mark.parametrize(("variant", "chance", "policy"), [*CASES, ("overlap", 0.0, Fixed), ("overlap", 1.0, Fixed)])
def test_same_tokens_with_good_and_bad_drafts(
    alone: dict[str, list[list[int]]], variant: str, chance: float, policy: type[Fixed]
) -> None:
    with LLM(MODEL, **(OPTIONS | VARIANTS[variant])) as llm:
        for kind, params in PARAMS.items():
            texts = [prompt + output for prompt, output in zip(prompts(), alone[kind], strict=True)]
            force(llm, policy(4), Foreseen(texts, chance))
            outputs = llm.generate(prompts(), params)
            assert [out.token_ids for out in outputs] == alone[kind]
            rates = [out.timings.acceptance_rate for out in outputs]
            assert None not in rates, "a request had no drafts: the case tests nothing"
            assert {0.0: min(rates) == 1.0, 0.3: 0.0 < max(rates), 1.0: max(rates) == 0.0}[chance]


def test_same_tokens_with_a_row_for_each_draft(alone: dict[str, list[list[int]]]) -> None:
    """As on a GPU, where drafts are rows that share a seat; beside chunks too, and whole when they are too many."""
    seen = set()
    for most in (40, 8):
        shapes = replace(padded_shapes(most, 64, is_drafting=True), mixed_sizes=())  # no CPU kernel takes empty rows
        with LLM(MODEL, **(OPTIONS | {"max_num_batched_tokens": 32})) as llm:
            llm._runner.shapes = shapes
            run_layers = llm._runner._run_layers

            llm._runner._run_layers = lambda bounds, *inputs, most=most, run=run_layers: (  # type: ignore
                seen.add((most, bounds.has_drafts, bounds.max_query_len > 1)) or run(bounds, *inputs)  # type: ignore
            )
            for kind, params in PARAMS.items():
                texts = [prompt + output for prompt, output in zip(prompts(), alone[kind], strict=True)]
                force(llm, Fixed(4), Foreseen(texts, 0.3))
                assert [out.token_ids for out in llm.generate(prompts(), params)] == alone[kind]
    beside_chunks, alone_in_a_step = {(40, True, True)}, {(40, True, False), (8, True, False)}
    assert seen >= beside_chunks | alone_in_a_step | {(8, False, True)}, "a kind of step did not come up"


@pytest.mark.parametrize("kind", PARAMS)
def test_preemption_of_drafting_rows_does_not_matter(kind: str) -> None:
    params = params_of(kind, 4, 40)
    with LLM(MODEL, **BASE) as llm:
        expected = [tokens_of(llm, [p], [s])[0] for p, s in zip(preempted_prompts(), params, strict=True)]
    texts = [prompt + output for prompt, output in zip(preempted_prompts(), expected, strict=True)]
    with LLM(MODEL, **(OPTIONS | TIGHT | {"num_kv_blocks": 9})) as llm:
        force(llm, Fixed(4), Foreseen(texts, 0.3))
        outputs = llm.generate(preempted_prompts(), params)
        llm.engine.scheduler.check_invariants()
    assert sum(out.timings.num_preemptions for out in outputs) > 0
    assert [out.token_ids for out in outputs] == expected


@pytest.mark.parametrize("policy", [Fixed, ByTurns])
def test_searches_beside_drafts(alone: dict[str, list[list[int]]], policy: type[Fixed]) -> None:
    """The next step is planned when beams have been chosen, whether it drafts or not."""
    search = BeamSearchParams(beam_width=3, max_tokens=10)
    found = []
    for options in (BASE, OPTIONS | {"overlap": True}):
        with LLM(MODEL, **options) as llm:
            if "speculative" in options:
                texts = [prompt + output for prompt, output in zip(prompts(), alone["seeded"], strict=True)]
                force(llm, policy(4), Foreseen(texts, 0.3))
            runs = [llm.engine.add_beams(prompt, search) for prompt in prompts()[:3]]
            others = [llm.engine.add(p, each) for p, each in zip(prompts(), PARAMS["seeded"], strict=True)]
            while llm.engine.has_work:
                llm.engine.step()
            assert [generation.take_new_tokens() for generation in others] == alone["seeded"]
        found.append([[list(f.tokens) for f in run.search.hypotheses.finished] for run in runs])
    assert found[0] == found[1]


def test_penalties_count_the_drafts_before_each_position() -> None:
    edits = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "min_tokens": 5}
    params = [SamplingParams(**edits, temperature=t, seed=i, max_tokens=24) for i, t in enumerate((0.0, 0.9, 0.0))]  # type: ignore[arg-type]
    batch = [[5, 6, 7], [8] * 20, list(range(5, 45))]
    with LLM(MODEL, **BASE) as llm:
        expected = [out.token_ids for out in llm.generate(batch, params)]
    texts = [prompt + output for prompt, output in zip(batch, expected, strict=True)]
    for chance in (0.0, 0.3):
        with LLM(MODEL, **OPTIONS) as llm:
            force(llm, Fixed(4), Foreseen(texts, chance))
            outputs = llm.generate(batch, params)
        assert [out.token_ids for out in outputs] == expected
        assert all(out.timings.num_drafts > 0 for out in outputs)


def test_counts_are_those_of_the_steps() -> None:
    """Foreseen drafts of 4, 12 tokens: one from the prompt's step, then 5, 5 and the last with none to draft."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(MODEL, **OPTIONS) as llm:
        output = llm.generate([[5, 6, 7]], params)[0].token_ids
        force(llm, Fixed(4), Foreseen([[5, 6, 7, *output]], 0.0))
        timings = llm.generate([[5, 6, 7]], params)[0].timings
        assert (timings.num_verifications, timings.num_drafts, timings.num_accepted_drafts) == (2, 8, 8)
        assert (timings.acceptance_rate, timings.mean_accepted_length) == (1.0, 5.0)
        assert len(timings.token_times) == 12
        assert llm.engine.metrics.num_accepted_drafts >= 8
    with LLM(MODEL, **BASE) as llm:
        timings = llm.generate([[5, 6, 7]], params)[0].timings
        assert (timings.acceptance_rate, timings.mean_accepted_length) == (None, None)


def test_an_end_among_the_drafts_is_an_end() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(MODEL, **OPTIONS) as llm:
        output = llm.generate([[5, 6, 7]], params)[0].token_ids
        stop = next(i for i in range(3, 12) if output[i] not in output[:i])
        force(llm, Fixed(8), Foreseen([[5, 6, 7, *output]], 0.0))
        ending = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[output[stop]])
        out = llm.generate([[5, 6, 7]], ending)[0]
        assert out.token_ids == output[: stop + 1]
        assert out.finish_reason is FinishReason.STOP
        assert not llm.engine.has_work


def test_drafts_that_hold_behind_a_stop_string_are_no_output() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
    with LLM(MODEL, **OPTIONS) as llm:
        output = llm.generate([[5, 6, 7]], params)[0].token_ids
        stop = next(i for i in range(3, 12) if output[i] not in output[:i])
        force(llm, Fixed(8), Foreseen([[5, 6, 7, *output]], 0.0))
        out = llm.generate([[5, 6, 7]], replace(params, stop=llm.tokenizer.decode([output[stop]])))[0]
    assert out.token_ids == output[: stop + 1] and out.finish_reason is FinishReason.STOP
    assert len(out.timings.token_times) == len(out.logprobs or ()) == stop + 1
    assert out.timings.num_accepted_drafts > stop, "no draft held behind the stop string: the case tests nothing"


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 6])
def test_no_draft_goes_past_the_last_token(max_tokens: int) -> None:
    with LLM(MODEL, **OPTIONS) as llm:
        long = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        output = llm.generate([[5, 6, 7]], long)[0].token_ids
        force(llm, Fixed(4), Foreseen([[5, 6, 7, *output]], 0.0))
        short = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        out = llm.generate([[5, 6, 7]], short)[0]
        assert out.token_ids == output[:max_tokens] and out.finish_reason is FinishReason.LENGTH
        assert out.timings.num_drafts == max(0, min(4, max_tokens - 2))


@pytest.fixture(scope="module")
def smollm2_plain() -> Iterator[LLM]:
    with LLM("smollm2", device="cpu", dtype="float32", max_model_len=512, num_kv_blocks=200) as llm:
        yield llm


TEXT = (
    "The committee met on Tuesday to discuss the annual budget. The treasurer, Mrs Ellis, presented the accounts, and "
    "the members agreed to repair the roof before the winter."
)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_n_gram_drafts_on_a_real_model(smollm2_plain: LLM, temperature: float) -> None:
    asked = [{"role": "user", "content": f"Repeat the following text exactly:\n\n{TEXT}"}]
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=32)
    expected = smollm2_plain.generate([asked, "The sea"], params)
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 512, "num_kv_blocks": 200}
    with LLM("smollm2", **options, speculative="ngram") as llm:
        assert isinstance(llm.engine.speculator and llm.engine.speculator.policy, Controller)
        outputs = llm.generate([asked, "The sea"], params)
    assert [out.token_ids for out in outputs] == [out.token_ids for out in expected]
    assert (outputs[0].timings.mean_accepted_length or 0) > 2


def test_a_real_model_drafts_for_itself(smollm2_plain: LLM) -> None:
    asked = [{"role": "user", "content": f"Repeat the following text exactly:\n\n{TEXT}"}]
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=12)
    expected = smollm2_plain.generate([asked], params)[0].token_ids
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 512, "num_kv_blocks": 200}
    with LLM("smollm2", **options, speculative="smollm2", num_drafts=3) as llm:
        force(llm, Fixed(3))
        output = llm.generate([asked], params)[0]
    assert output.token_ids == expected
    assert output.timings.acceptance_rate == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_drafts": 4}, "num_drafts means nothing without speculative"),
        ({"speculative": "ngram", "num_drafts": 0}, "num_drafts must be an integer from 1 to 32"),
        ({"speculative": "ngram", "num_drafts": 33}, "num_drafts must be an integer from 1 to 32"),
        ({"speculative": "ngram", "num_drafts": True}, "num_drafts must be an integer"),
        ({"speculative": ""}, "speculative must be a name or None"),
        ({"speculative": 5}, "speculative must be a name or None"),
        ({"draft_device": "cpu"}, "draft_device means nothing without a small model"),
        ({"speculative": "ngram", "draft_device": "cpu"}, "draft_device means nothing without a small model"),
        ({"speculative": "smollm2"}, "a vocabulary of 49152 tokens and 'random:tiny-llama' one of 512"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(MODEL, **(BASE | options))


DRAFTED = {
    "plain loop": {},
    "overlap": {"overlap": True},
    "budget 16, blocks of 32": {"max_num_batched_tokens": 16, "block_size": 32, "num_kv_blocks": 350},
}


@pytest.mark.parametrize("variant", DRAFTED)
@pytest.mark.parametrize("small", [MODEL, "random:tiny-mistral"])
def test_a_small_model_drafts(alone: dict[str, list[list[int]]], small: str, variant: str) -> None:
    """All drafts of the model itself hold, sampled ones as well as greedy ones; another model's change no token."""
    with LLM(MODEL, **(BASE | DRAFTED[variant] | {"speculative": small, "num_drafts": 4})) as llm:
        force(llm, Fixed(4))
        for kind, params in PARAMS.items():
            outputs = llm.generate(prompts(), params)
            assert [out.token_ids for out in outputs] == alone[kind]
            rates = [out.timings.acceptance_rate for out in outputs]
            assert rates == [1.0] * len(rates) if small == MODEL else max(rates) < 1.0


@pytest.mark.parametrize("small", [MODEL, "random:tiny-mistral"])
def test_a_small_model_goes_on_while_its_guesses_are_verified(alone: dict[str, list[list[int]]], small: str) -> None:
    """As it does beside a GPU: its steps are enqueued and read later, with the prompts of others among them."""
    with LLM(MODEL, **(BASE | {"speculative": small, "num_drafts": 3, "max_num_batched_tokens": 32})) as llm:
        force(llm, Fixed(3))
        drafter = llm.engine.speculator and llm.engine.speculator.drafter
        assert isinstance(drafter, DraftModel)
        drafter._goes_on, drafter._is_lazy = True, False
        for kind, params in PARAMS.items():
            outputs = llm.generate(prompts(), params)
            assert [out.token_ids for out in outputs] == alone[kind]
            rates = [out.timings.acceptance_rate for out in outputs]
            assert rates == [1.0] * len(rates) if small == MODEL else max(rates) < 1.0
        drafter._run()
        drafter._scheduler.check_invariants()
        assert drafter._scheduler.kv.usage == 0 and not (drafter._keys or drafter._guessed or drafter._ahead)


def test_a_small_model_heeds_penalties_and_bans() -> None:
    """It guesses after the same edits of its logits, so all drafts of the model itself hold here too."""
    edits: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "logit_bias": {7: 1.0}},
        {"presence_penalty": 0.5, "bad_words": ["baba bade"], "min_tokens": 3, "temperature": 0.7},
        {"allowed_token_ids": list(range(3, 400, 2)), "logprobs": 2, "prompt_logprobs": 1, "temperature": 0.7},
    ]
    params = [SamplingParams(**({"temperature": 0.0} | e), seed=3, max_tokens=20, ignore_eos=True) for e in edits]
    batch = prompts()[1:4]
    with LLM(MODEL, **BASE) as llm:
        expected = [tokens_of(llm, [p], [each])[0] for p, each in zip(batch, params, strict=True)]
    with LLM(MODEL, **(BASE | {"speculative": MODEL, "num_drafts": 4})) as llm:
        force(llm, Fixed(4))
        outputs = llm.generate(batch, params)
    assert [out.token_ids for out in outputs] == expected
    assert [out.timings.acceptance_rate for out in outputs] == [1.0] * 3


def test_a_small_model_finds_what_it_computed() -> None:
    """A long prompt is computed once, then no more than a block of it and what was gained since."""
    with LLM(MODEL, **(BASE | {"speculative": MODEL, "num_drafts": 4})) as llm:
        force(llm, Fixed(4))
        drafter = llm.engine.speculator and llm.engine.speculator.drafter
        assert isinstance(drafter, DraftModel)
        sizes, submit = [], drafter._runner.submit
        drafter._runner.submit = lambda plan: sizes.append(plan.num_batched_tokens) or submit(plan)  # type: ignore
        llm.generate([list(range(5, 205))], SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    assert sizes[0] > 190 and max(sizes[1:]) <= 16 + 5


def test_prompts_too_long_for_the_small_model_are_not_drafted() -> None:
    long = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with LLM(MODEL, **(BASE | {"speculative": MODEL})) as llm:
        force(llm, Fixed(4))
        drafter = llm.engine.speculator and llm.engine.speculator.drafter
        assert isinstance(drafter, DraftModel)
        drafter._scheduler = Scheduler(replace(drafter._scheduler.limits, max_model_len=40))
        outputs = llm.generate([[5] * 50, [6] * 20], long)
    assert [out.timings.num_drafts > 0 for out in outputs] == [False, True]
    assert [len(out.token_ids) for out in outputs] == [8, 8]

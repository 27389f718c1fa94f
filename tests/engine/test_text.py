"""Text around the engine: strings, chat messages, streams, stop strings, timings and cached tokens on SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from minillm import LLM, FinishReason, SamplingParams

FRANCE = "What is the capital of France?"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("smollm2", device="cpu", max_model_len=512) as engine:
        yield engine


def test_chat_answers(llm: LLM) -> None:
    out = llm.generate([{"role": "user", "content": FRANCE}], SamplingParams(temperature=0.0, max_tokens=40))[0]
    assert "Paris" in out.text
    assert out.finish_reason is FinishReason.STOP
    assert "<|im_end|>" not in out.text
    assert len(out.token_ids) == len(out.timings.token_times)


def test_stream_equals_generate(llm: LLM) -> None:
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=30)
    whole = llm.generate("Rain in Spain 🙂 是", params)[0]
    chunks = list(llm.stream("Rain in Spain 🙂 是", params))
    assert "".join(c.text for c in chunks) == whole.text
    assert [t for c in chunks for t in c.token_ids] == whole.token_ids
    assert [c.output is None for c in chunks] == [True] * (len(chunks) - 1) + [False]
    assert all("\ufffd" not in c.text for c in chunks[:-1])


def test_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40)
    free = llm.generate("Count: one, two, three,", params)[0]
    word = free.text.split()[3]
    out = llm.generate("Count: one, two, three,", SamplingParams(temperature=0.0, max_tokens=40, stop=word))[0]
    assert out.text == free.text[: free.text.index(word)]
    assert out.finish_reason is FinishReason.STOP
    assert not llm.engine.has_work


def test_leaving_a_stream_early_frees_everything(llm: LLM) -> None:
    for _ in llm.stream("Tell me a long story.", SamplingParams(max_tokens=200, ignore_eos=True)):
        break
    assert not llm.engine.has_work
    assert llm.engine.scheduler.num_running == 0


def test_a_repeated_prompt_is_cached(llm: LLM) -> None:
    prompt = "A sentence that is long enough to fill some blocks of the cache, again and again. " * 4
    params = SamplingParams(temperature=0.0, max_tokens=4)
    first, second = (llm.generate(prompt, params)[0] for _ in range(2))
    assert first.timings.num_cached_tokens == 0
    assert second.timings.num_cached_tokens >= len(second.prompt_token_ids) // 16 * 16 - 16
    assert second.token_ids == first.token_ids


def test_timings_are_in_order(llm: LLM) -> None:
    timings = llm.generate("Hello", SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))[0].timings
    assert timings.first_planned is not None
    assert timings.finished is not None
    assert timings.arrival <= timings.first_planned <= timings.token_times[0]
    assert timings.token_times == sorted(timings.token_times)
    assert timings.token_times[-1] <= timings.finished
    assert len(timings.itl) == 4

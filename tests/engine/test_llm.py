"""LLM as its callers use it: several streams at once, interruptions, odd prompts, the end."""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from minillm import LLM, BeamSearchParams, FinishReason, SamplingParams
from minillm.core.kv_manager import KVManager
from minillm.core.queue import RequestQueue
from minillm.engine.interrupts import interrupts_deferred
from minillm.engine.output import TextStream
from minillm.errors import ConfigError, EngineError, RequestError

OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "num_kv_blocks": 64}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("random:tiny-llama", **OPTIONS) as engine:
        yield engine


def tokens(chunks: Iterator[Any]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def test_streams_by_turns_do_not_disturb_each_other(llm: LLM) -> None:
    prompts = ([5, 6, 7], [8, 9], [10] * 30)
    alone = [out.token_ids for out in llm.generate(prompts, GREEDY)]
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts]
    first = [next(stream).token_ids for stream in streams]
    rest = [tokens(stream) for stream in reversed(streams)][::-1]
    assert [a + b for a, b in zip(first, rest, strict=True)] == alone
    assert not llm.engine.has_work


@pytest.mark.parametrize("overlap", [False, True])
def test_the_first_step_begins_once_it_is_full(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM("random:tiny-llama", **OPTIONS, max_num_batched_tokens=64, overlap=overlap) as llm:
        prompts = [[token] * 30 for token in range(5, 12)]
        alone = [llm.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
        events: list[str] = []
        submit, add = llm.engine.runner.submit, llm.engine.add
        monkeypatch.setattr(llm.engine.runner, "submit", lambda plan: events.append("step") or submit(plan))
        monkeypatch.setattr(llm.engine, "add", lambda *args, **options: events.append("add") or add(*args, **options))
        assert [out.token_ids for out in llm.generate(prompts, GREEDY)] == alone
        assert events[:5] == ["add", "add", "add", "step", "add"]
        assert events.count("add") == 7
        assert not llm.engine.has_work


def test_generate_inside_a_stream_ends_neither(llm: LLM) -> None:
    expected = llm.generate([[5, 6, 7], [8, 9]], GREEDY)
    got, inner = [], None
    for chunk in llm.stream([5, 6, 7], GREEDY):
        got += chunk.token_ids
        inner = inner or llm.generate([[8, 9]], GREEDY)[0]
    assert got == expected[0].token_ids
    assert inner is not None and inner.token_ids == expected[1].token_ids
    assert chunk.finish_reason is FinishReason.LENGTH
    assert chunk.output is not None


def test_leaving_one_stream_leaves_the_others(llm: LLM) -> None:
    expected = llm.generate([[8, 9]], GREEDY)[0].token_ids
    left, kept = llm.stream([5, 6, 7], GREEDY), llm.stream([8, 9], GREEDY)
    next(left)
    first = next(kept).token_ids
    left.close()  # type: ignore[attr-defined]
    assert first + tokens(kept) == expected
    assert not llm.engine.has_work


def test_a_stop_string_on_the_last_token_allowed_is_a_stop(llm: LLM) -> None:
    word = llm.tokenizer.decode(llm.generate([[5, 6, 7]], GREEDY)[0].token_ids[:1]).strip()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, stop=word)
    out = llm.generate([[5, 6, 7]], params)[0]
    assert (out.text, out.finish_reason) == ("", FinishReason.STOP)


def test_interrupts_wait_for_the_end_of_a_step(llm: LLM) -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached


def test_an_interrupted_generate_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate([[5, 6, 7]], GREEDY)[0].token_ids
    step = llm.engine.step

    def interrupted() -> Any:
        signal.raise_signal(signal.SIGINT)
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5, 6, 7], [8] * 20], GREEDY)
    llm.engine.drain()
    assert not llm.engine.has_work
    llm.engine.scheduler.check_invariants()
    assert llm.generate([[5, 6, 7]], GREEDY)[0].token_ids == expected


@pytest.mark.parametrize(
    "ask",
    [
        lambda llm: llm.generate([[5, 6, 7], [8] * 20, [9]], GREEDY),
        lambda llm: list(llm.stream([5, 6, 7], GREEDY)),
        lambda llm: llm.beam_search([[5, 6, 7], [8, 9]], BeamSearchParams(beam_width=2, max_tokens=4)),
    ],
    ids=["generate", "stream", "beam_search"],
)
def test_an_interrupt_while_prompts_are_queued_leaves_nothing_behind(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, ask: Callable[[LLM], object]
) -> None:
    expected, push = llm.generate([[5, 6, 7]], GREEDY)[0].token_ids, RequestQueue.push

    def interrupted(queue: RequestQueue, request: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        push(queue, request)

    with monkeypatch.context() as patch:
        patch.setattr(RequestQueue, "push", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(llm)
    assert not llm.engine.has_work
    llm.engine.scheduler.check_invariants()
    assert llm.generate([[5, 6, 7]], GREEDY)[0].token_ids == expected


def test_threads_may_share_it(llm: LLM) -> None:
    prompts = [[token, 6, 7] for token in range(20, 40)]
    expected = [out.token_ids for out in llm.generate(prompts, GREEDY)]
    with ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(llm.generate, prompts, GREEDY) for _ in range(3)]
        streams = pool.map(lambda prompt: list(llm.stream(prompt, GREEDY)), prompts)
        assert [tokens(iter(chunks)) for chunks in streams] == expected
        assert all([out.token_ids for out in each.result()] == expected for each in whole)
    assert not llm.engine.has_work


def test_a_stream_that_is_collected_within_a_step_ends_after_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row would be another's in the same plan."""
    prompts = [list(range(30, 60)), [8, 9]]
    expected = [out.token_ids for out in llm.generate(prompts, GREEDY)]
    stream, match = llm.stream([5, 6, 7], SamplingParams(max_tokens=50, ignore_eos=True)), KVManager.match
    next(stream), next(stream)

    def collected(*args: Any) -> Any:
        stream.close()  # type: ignore[attr-defined]
        return match(*args)

    monkeypatch.setattr(KVManager, "match", collected)
    assert [out.token_ids for out in llm.generate(prompts, GREEDY)] == expected
    assert not llm.engine.has_work


def test_a_step_looks_at_few_of_many_prompts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, num_looks, is_done = [[token] for token in range(5, 305)], 0, TextStream.is_done

    def counted(stream: TextStream) -> bool:
        nonlocal num_looks
        num_looks += 1
        assert is_done.fget is not None
        return bool(is_done.fget(stream))

    monkeypatch.setattr(TextStream, "is_done", property(counted))
    assert len(llm.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True))) == len(prompts)
    assert num_looks < 4 * len(prompts)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (None, "a prompt is a text"),
        (3.5, "a prompt is a text"),
        (b"ab", "a prompt is a text"),
        (["a", 3], "token 0 is 'a'"),
        ({"role": "user", "content": "hi"}, "list of messages"),
    ],
)
def test_what_is_no_prompt_is_refused_by_index(llm: LLM, prompt: Any, words: str) -> None:
    with pytest.raises(RequestError, match=f"prompt 1: .*{words}"):
        llm.generate([[5], prompt], GREEDY)


def test_numpy_prompts_and_numbers_are_taken(llm: LLM) -> None:
    expected = llm.generate([[5, 6, 7]], GREEDY)[0].token_ids
    params = SamplingParams(temperature=np.float32(0.0), max_tokens=np.int64(8), ignore_eos=True)  # type: ignore[arg-type]
    assert llm.generate([np.array([5, 6, 7])], params)[0].token_ids == expected  # type: ignore[list-item]
    assert llm.generate([[np.int64(5), 6, 7]], params)[0].token_ids == expected  # type: ignore[list-item]


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []


@pytest.mark.parametrize("params", ["hot", [None], {"temperature": 1}])
def test_what_are_no_params_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError, match="params must be"):
        llm.generate([[5]], params)


def test_a_bad_stream_is_refused_before_its_first_turn(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.stream([], GREEDY)


@pytest.mark.parametrize("temperature", [1e-39, 1e-12, 1e-6])
def test_a_temperature_next_to_nothing_is_greedy(llm: LLM, temperature: float) -> None:
    expected = llm.generate([[5, 6, 7], [8, 9]], GREEDY)
    params = SamplingParams(temperature=temperature, max_tokens=8, ignore_eos=True)
    got = llm.generate([[5, 6, 7], [8, 9]], [GREEDY, params])
    assert [out.token_ids for out in got] == [out.token_ids for out in expected]


def test_priority_goes_first() -> None:
    with LLM("random:tiny-llama", **OPTIONS, max_num_seqs=1, overlap=False) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        low, high = (llm.engine.add([5, 6], params, priority) for priority in (1, 0))
        while high.finish_reason is None:
            llm.engine.step()
        assert low.finish_reason is None


def test_weights_and_cache_are_freed_with_the_object() -> None:
    """At once, by counts of references: a device is not to be full until the garbage collector comes by."""
    gc.collect()
    gc.disable()
    try:
        llm = LLM("random:tiny-llama", max_model_len=64, num_kv_blocks=20, speculative="ngram")
        llm.generate(["a b c"], SamplingParams(max_tokens=3))
        llm.beam_search(["a b c"], BeamSearchParams(beam_width=2, max_tokens=3))
        next(llm.stream("a b c", SamplingParams(max_tokens=9)))
        model = weakref.ref(llm._runner.model)
        llm.close()
        del llm
        assert model() is None
    finally:
        gc.enable()


def test_the_collector_spares_what_was_there_while_tokens_are_made(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full walk over what torch alone brings takes a tenth of a second."""
    step, num_spared = llm.engine.step, []

    def spied() -> Any:
        num_spared.append(gc.get_freeze_count())
        return step()

    monkeypatch.setattr(llm.engine, "step", spied)
    gc.unfreeze()
    llm.generate([[5, 6, 7]], GREEDY)
    with pytest.raises(RequestError):
        llm.generate([[]], GREEDY)
    assert min(num_spared) > 10_000
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        llm.generate([[5, 6, 7]], GREEDY)
        assert gc.get_freeze_count() > 10_000, "somebody else's choice"
    finally:
        gc.unfreeze()


def test_after_close_it_says_so() -> None:
    llm = LLM("random:tiny-llama", **OPTIONS)
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate([[5]], GREEDY)


@pytest.mark.parametrize("model", [None, 5, ["smollm2"]])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="model must be"):
        LLM(model)


def test_timings_count_the_steps_of_a_request_and_the_tokens_beside_it(llm: LLM) -> None:
    alone = llm.generate([[5, 6, 7]], GREEDY)[0].timings
    assert (alone.num_steps, alone.num_tokens_beside) == (GREEDY.max_tokens, 0)
    both = [out.timings for out in llm.generate([[15, 16, 17], [18, 19, 20, 21]], GREEDY)]
    assert [t.num_steps for t in both] == [GREEDY.max_tokens] * 2
    assert [t.num_tokens_beside for t in both] == [4 + GREEDY.max_tokens - 1, 3 + GREEDY.max_tokens - 1]

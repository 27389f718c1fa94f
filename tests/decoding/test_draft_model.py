"""The small model works on while the large one verifies: the order of what both are told, and whose guesses go on.

Both are devices that compute hashes, so a small one with the large one's rule guesses right, and another wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from minillm import SamplingParams
from minillm.core.plan import StepPlan, StepResult
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler, SchedulerLimits
from minillm.decoding.controller import Fixed
from minillm.decoding.draft_model import DraftModel
from minillm.decoding.speculator import Speculator
from minillm.engine.engine import Engine
from tests.core.fake_runner import EOS, VOCAB, FakeRunner

LIMITS = SchedulerLimits(
    max_num_batched_tokens=64, max_num_seqs=4, max_model_len=128, num_kv_blocks=129, block_size=4, min_chunk_size=1
)
PROMPTS = [[5, 6, 7], [8] * 9, [9, 10, 11, 12, 13]]


class Pending:
    def __init__(self, device: Device, plan: StepPlan) -> None:
        self.device, self.plan = device, plan

    def wait(self) -> StepResult:
        self.device.events.append(f"{self.device.name} read")
        result = self.device.runner.run(self.plan)
        if self.device.is_wrong:
            for i, token in enumerate(result.tokens):
                result.tokens[i] = (token + self.device.is_wrong(len(self.device.events))) % VOCAB
        return result


class Device:
    """Notes what it is told to do; `is_wrong` says what is added to a token."""

    num_compiles = num_captures = 0

    def __init__(self, name: str, events: list[str], is_wrong: Any = None) -> None:
        self.name, self.events, self.is_wrong = name, events, is_wrong
        self.runner = FakeRunner(LIMITS.num_kv_blocks, LIMITS.block_size, LIMITS.max_num_seqs)

    def submit(self, plan: StepPlan) -> Pending:
        self.events.append(f"{self.name} submit")
        return Pending(self, plan)


def run(events: list[str], speculator: Speculator | None, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Outputs of an engine whose large model is a device called `large`."""
    engine = Engine(
        Scheduler(LIMITS), Device("large", events), vocab_size=VOCAB, eos_token_ids=[EOS], speculator=speculator
    )
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    generations = [engine.add(prompt, params) for prompt in prompts]
    while engine.has_work:
        engine.step()
    engine.scheduler.check_invariants()
    return [generation.take_new_tokens() for generation in generations]


def drafting(events: list[str], is_wrong: Any = None, **options: Any) -> Speculator:
    drafter = DraftModel(Scheduler(LIMITS), Device("small", events, is_wrong), **options)
    return Speculator(drafter, Fixed(3), 16)


def test_the_small_model_is_told_to_go_on_before_the_large_ones_samples_are_read() -> None:
    events: list[str] = []
    outputs = run(events, drafting(events, goes_on=True), PROMPTS[:1], 40)
    assert outputs == run([], None, PROMPTS[:1], 40)
    # A guess and three drafts behind it are enqueued, and when the large model is done nothing is left to wait for.
    together = ["large submit", *["small submit"] * 4, "large read", *["small read"] * 4]
    begin = next(i for i in range(len(events)) if events[i : i + len(together)] == together)
    assert events[begin : begin + 6 * len(together)] == together * 6


def test_with_one_device_it_waits_for_its_turn() -> None:
    events: list[str] = []
    assert run(events, drafting(events), PROMPTS, 30) == run([], None, PROMPTS, 30)
    for i, event in enumerate(events):
        if event.startswith("small"):
            assert events[:i].count("large submit") == events[:i].count("large read")


def test_a_lazy_runner_computes_while_the_large_model_does() -> None:
    events: list[str] = []
    assert run(events, drafting(events, goes_on=True, is_lazy=True), PROMPTS, 30) == run([], None, PROMPTS, 30)
    spans = " ".join(events).split("large submit")
    assert any(span.index("small read") < span.index("large read") for span in spans if "small read" in span)


@pytest.mark.parametrize("chance", [2, 5, 17])
@pytest.mark.parametrize("is_lazy", [False, True])
def test_wrong_guesses_change_no_token(chance: int, is_lazy: bool) -> None:
    """Guesses that hold sometimes: what went on is taken where it is right, and made again where it is not."""
    events: list[str] = []
    speculator = drafting(events, lambda i: int(i % chance == 0), goes_on=True, is_lazy=is_lazy)
    assert run(events, speculator, PROMPTS, 60) == run([], None, PROMPTS, 60)


def test_nobody_goes_on_whose_guesses_do_not_hold() -> None:
    events: list[str] = []
    assert run(events, drafting(events, lambda i: 1, goes_on=True), PROMPTS, 30) == run([], None, PROMPTS, 30)
    assert "large submit small submit" not in " ".join(events)


class Rarely:
    """Guesses, wrongly, behind every seventh token alone."""

    def has_guess(self, request: Request) -> bool:
        return len(request.tokens) % 7 == 0

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        return {request: [1] * num for request, num in wanted.items() if self.has_guess(request)}

    def go_on(self) -> None:
        pass

    def forget(self, request: Request) -> None:
        pass


def test_without_a_guess_the_large_model_runs_ahead() -> None:
    events: list[str] = []
    speculator = Speculator(Rarely(), Fixed(3), 16)
    assert run(events, speculator, PROMPTS[:1], 60) == run([], None, PROMPTS[:1], 60)
    ahead = [events[:i].count("large submit") - events[:i].count("large read") for i in range(len(events))]
    assert max(ahead) == 2, "a step was enqueued while one was in flight"
    assert ahead.count(0) > 4, "and drafts waited for it"

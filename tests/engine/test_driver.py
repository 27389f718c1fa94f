"""The engine's side of the seam: commands in, reports out, and nothing left behind whatever the commands are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.engine.driver import EngineDriver, drive
from minillm.engine.messages import Ending, Report, Submission
from minillm.types import FinishReason, SamplingParams
from tests.core.fake_runner import generate
from tests.engine.fakes import fake_driver


def submission(key: int, prompt: list[int] | None = None, **fields: Any) -> Submission:
    own = {name: fields.pop(name) for name in ("priority", "user", "salt") if name in fields}
    params = SamplingParams(**({"max_tokens": 5, "seed": key, "ignore_eos": True} | fields))
    return Submission(key=key, prompt=prompt or [1, 2, 3], params=params, arrival=0.0, **own)


class Log:
    """What reports said, by key."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.endings: dict[int, Ending] = {}
        self.started: list[int] = []

    def note(self, report: Report) -> None:
        at = 0
        for key, num in zip(report.keys, report.counts, strict=True):
            assert key not in self.endings, "tokens after the end"
            if key not in self.tokens:
                self.started.append(key)
            self.tokens.setdefault(key, []).extend(report.tokens[at : at + num])
            at += num
        assert at == len(report.tokens)
        for ending in report.endings:
            assert ending.key not in self.endings, "ended twice"
            self.endings[ending.key] = ending


def run(driver: EngineDriver, log: Log | None = None) -> Log:
    log = log or Log()
    while driver.has_work:
        log.note(driver.turn())
    driver.engine.scheduler.check_invariants()
    assert driver.engine.scheduler.kv.usage == 0.0
    return log


def test_tokens_are_those_of_the_engine_alone() -> None:
    driver, _ = fake_driver()
    for key in range(1, 8):
        driver.submit(submission(key, [key, 2, 3]))
    log = run(driver)
    for key in range(1, 8):
        assert log.tokens[key] == generate([key, 2, 3], key, 5, frozenset())
        assert log.endings[key].reason is FinishReason.LENGTH and log.endings[key].number > 0


def test_a_request_that_can_never_be_served_ends_alone() -> None:
    driver, _ = fake_driver()
    driver.submit(submission(1))
    driver.submit(submission(2, [1] * 64))
    driver.submit(submission(3, [99]))
    log = run(driver)
    assert [log.endings[key].reason for key in (1, 2, 3)] == ["length", "rejected", "rejected"]
    assert "max_model_len" in log.endings[2].error and "token ids" in log.endings[3].error


def test_an_unforeseen_error_at_the_start_of_a_request_ends_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, _ = fake_driver()
    add = driver.engine.add

    def failing_add(prompt: Any, *args: Any, **values: Any) -> Any:
        if prompt == [7]:
            raise KeyError("surprise")
        return add(prompt, *args, **values)

    monkeypatch.setattr(driver.engine, "add", failing_add)
    driver.submit(submission(1, [7]))
    driver.submit(submission(2))
    log = run(driver)
    assert [log.endings[key].reason for key in (1, 2)] == ["error", "length"]


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    driver, device = fake_driver()
    device.failing = lambda request: request == 1
    driver.submit(submission(1))
    driver.submit(submission(2))
    log = run(driver)
    assert [log.endings[key].reason for key in (1, 2)] == ["error", "length"]
    assert log.tokens[2] == generate([1, 2, 3], 2, 5, frozenset())


def test_a_failed_step_is_reported_and_leaves_no_work() -> None:
    driver, device = fake_driver()

    def fail() -> None:
        raise RuntimeError("the device is gone")

    driver.submit(submission(1))
    device.before_step = fail
    reports = []
    while driver.has_work:
        reports.append(driver.turn())
    assert "the device is gone" in reports[-1].failure
    driver.submit(submission(2))
    assert run(driver).endings[2].reason is FinishReason.ERROR


def test_users_take_turns_and_priorities_come_first() -> None:
    driver, _ = fake_driver(max_num_seqs=1)
    driver.submit(submission(1, user="flood"))
    log = Log()
    log.note(driver.turn())
    for key in range(2, 100):
        driver.submit(submission(key, user="flood", max_tokens=2))
    driver.submit(submission(100, user="other", max_tokens=2))
    driver.submit(submission(101, user="flood", max_tokens=2, priority=-1))
    run(driver, log)
    assert log.started.index(101) == 1
    assert log.started.index(100) <= 18  # after a quantum of the flood's, and what the scheduler has already


def test_a_salt_keeps_prefixes_apart() -> None:
    driver, _ = fake_driver()
    prompt, cached = list(range(20)), []
    for key, salt in enumerate((b"a", b"b", b"a"), start=1):
        driver.submit(submission(key, prompt, salt=salt))
        cached.append(run(driver).endings[key].timings.num_cached_tokens)
    assert cached[:2] == [0, 0] and cached[2] > 0


def test_completions_of_one_prompt_share_its_blocks() -> None:
    """Without the prefix cache: what they share they share as forks."""
    driver, _ = fake_driver(max_num_seqs=8, enable_prefix_caching=False)
    prompt = list(range(20))
    driver.submit(submission(1, prompt, n=4))
    log = run(driver)
    assert [log.tokens[key] for key in range(1, 5)] == [generate(prompt, key, 5, frozenset()) for key in range(1, 5)]
    assert driver.engine.num_computed == 20 + 4 * 4 + 3, "the prompt once, its last token for each of the others"


def test_completions_end_one_by_one_in_every_state() -> None:
    driver, _ = fake_driver(max_num_seqs=2)
    driver.submit(submission(1, [5] * 20, n=4))
    driver.submit(submission(5, [6] * 20, n=3))
    log = Log()
    driver.finish(6, FinishReason.ABORT)  # held back, as those beside it
    log.note(driver.turn())
    driver.finish(1, FinishReason.ABORT)  # the one that computes the prompt
    driver.finish(3, FinishReason.ABORT)  # one that waits for it
    run(driver, log)
    reasons = {key: str(log.endings[key].reason) for key in sorted(log.endings)}
    assert [key for key in reasons if reasons[key] == "abort"] == [1, 3, 6]
    assert all(log.tokens[key] == generate([5] * 20, key, 5, frozenset()) for key in (2, 4))
    assert all(log.tokens[key] == generate([6] * 20, key, 5, frozenset()) for key in (5, 7))
    assert not driver.has_work


def test_queries_are_answered_and_unknown_ones_too() -> None:
    driver, _ = fake_driver()
    driver.submit(submission(1))
    driver.turn()
    driver.ask(1, "dump", {})
    driver.ask(2, "made up", {})
    driver.ask(3, "dump", {"made_up": 1})
    (first, dump), *others = driver.turn().answers
    assert first == 1 and others == [(2, None), (3, None)]
    assert [row["num_prompt"] for row in dump["requests"]] == [3]
    assert "tokens" not in str(dump)


def test_a_long_answer_is_written_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece a turn, by a clock that goes on at each look; one that fails is none, and harms nobody."""
    driver, _ = fake_driver()
    ticks = count()
    monkeypatch.setattr(driver.engine, "clock", lambda: float(next(ticks)))

    def failing() -> Iterator[str]:
        yield "a"
        raise ValueError("no more")

    driver._queries |= {"long": lambda: iter(["a", "b", "c"]), "failing": failing}
    driver.submit(submission(1))
    driver.ask(1, "failing", {})
    driver.ask(2, "long", {})
    driver.ask(3, "dump", {})
    reports = [driver.turn() for _ in range(30)]
    numbers = [[number for number, _ in report.answers] for report in reports]
    assert numbers[0] == [3] and numbers.index([1]) < numbers.index([2]) and sum(numbers, []) == [3, 1, 2]
    assert [answer for report in reports[1:] for _, answer in report.answers] == [None, "abc"]
    assert any(report.tokens for report in reports[: numbers.index([2])]), "steps waited for the answer"
    assert not driver.has_work


def test_drive_ends_everything_when_commands_end() -> None:
    driver, _ = fake_driver()
    batches = [[("submit", (submission(key),)) for key in range(1, 9)], [("finish", (3, FinishReason.STOP))], [], None]
    log = Log()
    drive(driver, lambda may_wait: batches.pop(0), log.note)
    assert log.endings[3].reason is FinishReason.STOP
    assert sorted(log.endings) == list(range(1, 9))
    assert driver.engine.scheduler.kv.usage == 0.0 and not driver.engine.has_work


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_commands_leave_nothing_behind(data: st.DataObject) -> None:
    driver, _ = fake_driver(num_kv_blocks=data.draw(st.sampled_from((17, 33))))
    log, keys, ended = Log(), [0], set()
    for _ in range(data.draw(st.integers(1, 40))):
        match data.draw(st.sampled_from(("submit", "finish", "turn", "turn"))):
            case "submit":
                first, n = len(keys), data.draw(st.sampled_from((1, 1, 3)))
                keys += range(first, first + n)
                prompt = [1] * data.draw(st.integers(1, 40))
                user = data.draw(st.sampled_from("abc"))
                driver.submit(submission(first, prompt, user=user, priority=data.draw(st.integers(-1, 1)), n=n))
            case "finish":
                key = data.draw(st.sampled_from(keys))
                driver.finish(key, FinishReason.ABORT)
                ended.add(key)
            case "turn":
                log.note(driver.turn())
    run(driver, log)
    assert sorted(log.endings) == keys[1:]
    for key in keys[1:]:
        if log.endings[key].reason is FinishReason.LENGTH:
            assert len(log.tokens[key]) == 5
        else:
            assert log.endings[key].reason is FinishReason.ABORT and key in ended

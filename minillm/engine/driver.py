"""EngineDriver: obeys a front end's commands and runs the engine turn by turn. One thread calls all of it.

Requests wait here, in a FairQueue, until the engine's next step could start them: what the scheduler has queued is
served in its own order, so it is given no more than that. It knows no text, sockets or threads.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from minillm.engine.engine import Engine, Generation
from minillm.engine.fair_queue import FairQueue
from minillm.engine.insight import Insight
from minillm.engine.messages import Ending, Load, Report, Submission
from minillm.errors import EngineError, RequestError
from minillm.types import FinishReason, Timings

__all__ = ["Command", "EngineDriver", "drive"]

LOG = logging.getLogger(__name__)
Command = tuple[str, tuple[Any, ...]]
"""submit, finish or ask, and its arguments."""

MAX_NUMBERS = 4096
"""Requests whose numbers are kept for those who ask of them later."""
NUM_CHECKERS = 4
CHECK_SECONDS = 0.01
WRITE_SECONDS, WRITE_SHARE = 0.003, 0.1
NUM_AHEAD = 4
"""Requests given to the scheduler beyond its rows, for it to choose among when memory is short."""


def drive(
    driver: EngineDriver, take: Callable[[bool], Sequence[Command] | None], deliver: Callable[[Report], None]
) -> None:
    """Obey commands and run turns until `take` gives None; it may wait for a command if its argument is True."""
    obey: dict[str, Callable[..., None]] = {"submit": driver.submit, "finish": driver.finish, "ask": driver.ask}
    while (commands := take(not driver.has_work)) is not None:
        for name, arguments in commands:
            obey[name](*arguments)
        deliver(driver.turn())
    deliver(driver.close())


class Writing(NamedTuple):
    """A long answer: what is to come of its text, and what is there."""

    number: int
    texts: Iterator[str]
    written: list[str]


class EngineDriver:
    """The engine's side of the seam between front end and engine."""

    def __init__(self, engine: Engine, queries: Mapping[str, Callable[..., Any]] | None = None) -> None:
        """`queries`: what a front end may ask beside `dump` and what `Insight` tells, each between two steps; they take
        and give plain values."""
        self.engine = engine
        self._numbers: OrderedDict[int, int] = OrderedDict()  # the front end's key -> the engine's request number
        self._queries = {"dump": self.dump, **Insight(engine, self._numbers).queries, **(queries or {})}
        self._queue: FairQueue[Submission] = FairQueue()
        self._checking: dict[int, tuple[Submission, Future[None]]] = {}
        self._pending: dict[int, Submission] = {}  # by the key of each completion in either of the two
        self._pool = ThreadPoolExecutor(NUM_CHECKERS, "check")
        self._live: dict[int, Generation] = {}
        self._keys: dict[int, int] = {}  # the engine's request number -> the front end's key
        self._starting: dict[int, Generation] = {}  # whose prompts are not planned, or not computed and to be shared
        self._report = Report(load=Load())
        self._writing: deque[Writing] = deque()
        self._step_seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._pending or self.engine.has_work or self._writing or self._has_news)

    @property
    def _has_news(self) -> bool:
        return bool(self._report.endings or self._report.answers)

    @property
    def load(self) -> Load:
        """What there is to do."""
        scheduler = self.engine.scheduler
        num_waiting = len(self._queue) + scheduler.num_waiting
        applied = self.engine.num_applied, self.engine.num_computed
        return Load(applied[0], scheduler.num_running, num_waiting, scheduler.kv.usage, applied[1])

    def submit(self, submission: Submission) -> None:
        """Queue a request. One that cannot be served ends at once, alone; a grammar is compiled on another thread."""
        self._pending.update(dict.fromkeys(submission.keys, submission))
        if submission.params.structured_outputs is not None:
            check = self._pool.submit(self.engine.check, submission.prompt, submission.params)
            self._checking[submission.key] = submission, check
            return
        try:
            self.engine.check(submission.prompt, submission.params)
        except Exception as error:
            self._refuse(submission, error)
        else:
            self._enqueue(submission)

    def finish(self, key: int, reason: FinishReason) -> None:
        """End a completion in whatever state it is; nothing happens if it ended before."""
        submission, generation = self._pending.get(key), self._live.get(key)
        if submission is not None:
            self._end_pending(submission, key, reason)
            if self._pending.keys().isdisjoint(submission.keys):
                self._drop(submission)
        elif generation is not None:
            self.engine.finish(generation, reason)
            self._end(key, generation)

    def ask(self, number: int, query: str, arguments: Mapping[str, Any]) -> None:
        """Answer a query in the next report, or a later one if the answer is text in pieces.

        The answer to a wrong query, or one that fails, is None.
        """
        answer: Any = None
        try:
            if query in self._queries:
                answer = self._queries[query](**arguments)
        except Exception:  # no question ends the engine
            LOG.exception("the query %s failed", query)
        if isinstance(answer, Iterator):
            self._writing.append(Writing(number, answer, []))
        else:
            self._report.answers.append((number, answer))

    def turn(self) -> Report:
        """Start what fits, run one step, and report since the last turn. After a failure nothing is left to do."""
        failure = ""
        self._take_checked()
        self._write()
        try:
            self._release()
            if self.engine.has_work:
                began = self.engine.clock()
                for generation in self.engine.step():
                    self._collect(generation)
                self._step_seconds = self.engine.clock() - began
        except EngineError as error:
            failure = str(error)
            self._queue, self._pending, self._checking = FairQueue(), {}, {}
            self._live, self._keys, self._starting = {}, {}, {}
        report, self._report = self._report, Report(load=self.load)
        report.load, report.failure = self._report.load, failure
        return report

    def dump(self) -> dict[str, Any]:
        """The scheduler's state for a person to read: numbers, never contents."""
        scheduler = self.engine.scheduler
        columns = ("num_prompt", "num_output", "num_computed", "num_planned", "row", "num_preemptions", "arrival")
        rows = [
            {"number": generation.request.number, "num_blocks": len(generation.request.blocks)}
            | {name: getattr(generation.request, name) for name in columns}
            for generation in self._live.values()
        ]
        return {
            "load": self.load._asdict(),
            "num_free_blocks": scheduler.num_free_blocks,
            "num_blocks": scheduler.limits.num_kv_blocks,
            "num_in_fair_queue": len(self._queue),
            "requests": rows,
        }

    def close(self) -> Report:
        """End every request and take no more."""
        for key in [*self._pending, *self._live]:
            self.finish(key, FinishReason.ABORT)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.engine.close()
        return self._report

    def _refuse(self, submission: Submission, error: BaseException) -> None:
        reason = FinishReason.REJECTED
        if not isinstance(error, RequestError):
            LOG.error("a request could not be checked or started", exc_info=error)
            reason = FinishReason.ERROR
        for key in submission.keys:
            if key in self._pending:
                self._end_pending(submission, key, reason, str(error))

    def _drop(self, submission: Submission) -> None:
        """Nobody wants any of its completions any more."""
        checking = self._checking.pop(submission.key, None)
        if checking is None:
            self._queue.remove(submission, priority=submission.priority, user=submission.user)
        else:
            checking[1].cancel()

    def _enqueue(self, submission: Submission) -> None:
        limits = self.engine.info.limits
        num_output = min(submission.params.max_tokens, limits.max_model_len - len(submission.prompt))
        cost = len(submission.prompt) + num_output * submission.params.n
        self._queue.push(submission, priority=submission.priority, user=submission.user, cost=cost)

    def _take_checked(self) -> None:
        """Queue the requests whose grammars are ready; wait a moment for them if there is nothing else to do."""
        checks = [check for _, check in self._checking.values()]
        is_idle = not (self._queue or self.engine.has_work or self._writing or self._has_news)
        if checks and is_idle:
            wait(checks, CHECK_SECONDS, FIRST_COMPLETED)
        for key, (submission, check) in list(self._checking.items()):
            if check.done():
                del self._checking[key]
                error = check.exception()
                if error is None:
                    self._enqueue(submission)
                else:
                    self._refuse(submission, error)

    def _write(self) -> None:
        """Go on with long answers for a small part of a step's time: those who read tokens wait no longer than that."""
        end = self.engine.clock() + max(WRITE_SECONDS, WRITE_SHARE * self._step_seconds)
        while self._writing:
            number, texts, written = self._writing[0]
            answer: str | None = None
            try:
                for text in texts:
                    written.append(text)
                    if self.engine.clock() >= end:
                        return
                answer = "".join(written)
            except Exception:
                LOG.exception("an answer failed")
            self._writing.popleft()
            self._report.answers.append((number, answer))

    def _release(self) -> None:
        """Hand the engine what its next step could start: rows for all, and one step's budget of prompt tokens."""
        self._starting = {n: g for n, g in self._starting.items() if g.waiting or g.request.first_planned is None}
        scheduler, limits = self.engine.scheduler, self.engine.info.limits
        starting = self._starting.values()
        num_tokens = sum(g.request.num_prompt for g in starting if g.request.first_planned is None)
        num_seats = limits.max_num_seqs + NUM_AHEAD - scheduler.num_running - scheduler.num_waiting
        num_seats -= sum(len(generation.waiting) for generation in starting)
        while self._queue and num_seats > 0 and num_tokens < limits.max_num_batched_tokens:
            submission = self._queue.pop()
            self._start(submission)
            num_seats -= submission.params.n
            num_tokens += len(submission.prompt)

    def _start(self, submission: Submission) -> None:
        try:
            generation = self.engine.add(
                submission.prompt,
                submission.params,
                submission.priority,
                arrival=submission.arrival,
                salt=submission.salt,
                is_streamed=submission.is_streamed,
                is_checked=True,  # by `submit`
            )
        except Exception as error:
            self._refuse(submission, error)
            return
        self._starting[generation.request.number] = generation
        for key, each in zip(submission.keys, (generation, *generation.siblings), strict=True):
            self._live[key] = each
            self._keys[each.request.number] = key
            self._numbers[key] = each.request.number
            if len(self._numbers) > MAX_NUMBERS:
                self._numbers.popitem(last=False)
            if self._pending.pop(key, None) is None:  # it was ended before
                self.engine.finish(each, FinishReason.ABORT)
                self._forget(key, each)

    def _collect(self, generation: Generation) -> None:
        key = self._keys[generation.request.number]
        tokens = generation.take_new_tokens()
        report = self._report
        report.keys.append(key)
        report.counts.append(len(tokens))
        report.tokens.extend(tokens)
        start, params = generation.request.num_output - len(tokens), generation.params
        if params.logprobs is not None and tokens:
            report.scores.append((key, generation.scores[start:]))
        if params.prompt_logprobs is not None and tokens and not start:
            report.prompt_scores.append((key, generation.prompt_scores))
        if generation.finish_reason is not None:
            self._end(key, generation)

    def _end(self, key: int, generation: Generation) -> None:
        self._forget(key, generation)
        assert generation.finish_reason is not None
        number = generation.request.number
        self._report.endings.append(Ending(key, generation.finish_reason, generation.timings, number))

    def _forget(self, key: int, generation: Generation) -> None:
        del self._live[key]
        del self._keys[generation.request.number]
        self._starting.pop(generation.request.number, None)

    def _end_pending(self, submission: Submission, key: int, reason: FinishReason, error: str = "") -> None:
        del self._pending[key]
        timings = Timings(
            arrival=submission.arrival,
            num_prompt_tokens=len(submission.prompt),
            finished=self.engine.clock(),
        )
        self._report.endings.append(Ending(key, reason, timings, 0, error))

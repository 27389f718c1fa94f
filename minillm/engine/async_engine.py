"""AsyncEngine: the engine as an event loop sees it: requests in, streams of tokens out, bounded and watched.

It owns admission (what waits is bounded, for all and for each user), deadlines, the drain and the watchdog. It knows
no text and no HTTP, and does not care where the engine runs. All of it belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from minillm.engine.info import EngineInfo
from minillm.engine.links import Link
from minillm.engine.messages import Ending, Load, Report, Submission
from minillm.engine.wait import WaitPredictor
from minillm.errors import BusyError, ClosingError, EngineError
from minillm.types import FinishReason, SamplingParams, Timings, TokenScore

__all__ = ["AsyncEngine", "AsyncLimits", "TokenStream"]

LOG = logging.getLogger(__name__)
CHECKS_PER_STALL = 4
ANSWER_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class AsyncLimits:
    """What a front end takes on."""

    max_waiting: int = 1024
    """Most requests that wait for their first token."""
    max_per_user: int = 512
    """Most unfinished requests of one user; those that name none are not counted together."""
    stall_seconds: float = 120.0
    """Without progress for this long while there is work, the engine counts as stuck."""


class TokenStream:
    """One completion's tokens as they come. `take` until `is_done`; then `ending` says how it ended."""

    def __init__(self, submission: Submission, key: int, prompt_scores: list[TokenScore | None]) -> None:
        """`prompt_scores`: a list that all completions of the prompt have in common."""
        self.submission, self.key = submission, key
        self.num_tokens = 0
        self.scores: list[TokenScore] = []
        """Of all its tokens, if their logprobs were asked for."""
        self.prompt_scores = prompt_scores
        self.ending: Ending | None = None
        self.is_expired = False
        """Whether its deadline ended it."""
        self.timer: asyncio.TimerHandle | None = None
        self._new: list[int] = []
        self._reader: asyncio.Future[None] | None = None

    @property
    def is_done(self) -> bool:
        """Whether it has ended and all its tokens were taken."""
        return self.ending is not None and not self._new

    async def take(self) -> list[int]:
        """New tokens, waiting for them; none only at the end. One reader at a time."""
        while not self._new and self.ending is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        tokens, self._new = self._new, []
        return tokens

    def gain(self, tokens: Sequence[int]) -> None:
        """The engine's side: tokens came."""
        self._new.extend(tokens)
        self.num_tokens += len(tokens)
        self._wake()

    def end(self, ending: Ending) -> None:
        """The engine's side: that was all."""
        self.ending = ending
        if self.timer is not None:
            self.timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class AsyncEngine:
    """Requests in, streams out. `open` first, `close` at the end."""

    def __init__(
        self, link: Link, limits: AsyncLimits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = AsyncLimits() if limits is None else limits
        self.load = Load()
        self.failure: str | None = None
        """Why the engine stopped for good."""
        self.is_stalled = self.is_closing = False
        self.predictor = WaitPredictor()
        self.on_end: Callable[[TokenStream], None] = lambda stream: None
        """Called with every request that ended."""
        self._link, self._clock = link, clock
        self._streams: dict[int, TokenStream] = {}
        self._waiting: dict[int, TokenStream] = {}  # those without a first token
        self.num_of_user: Counter[str] = Counter()
        self._num_keys, self._questions = 0, count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._progress = clock()
        self._idle = asyncio.Event()
        self._idle.set()
        self._watchdog: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start the engine and the watchdog. Raises what starting raises."""
        self.info: EngineInfo = await self._link.open(self._on_report)
        self._watchdog = asyncio.create_task(self._watch())

    @property
    def is_healthy(self) -> bool:
        """Whether the engine runs, and its steps advance while there is work."""
        return self.failure is None and not self.is_stalled

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def predicted_wait(self) -> float:
        """Seconds until all that is here has been served: who waits for a row waits for those that run."""
        max_len = self.info.limits.max_model_len
        owed = sum(
            min(s.submission.params.max_tokens, max_len - len(s.submission.prompt)) - s.num_tokens
            for s in self._streams.values()
        )
        firsts = [s.submission for s in self._waiting.values() if s.key == s.submission.key]
        return self.predictor.seconds(sum(len(s.prompt) for s in firsts), owed)

    def check_room(self, user: str, num: int) -> None:
        """Raise EngineError, BusyError or ClosingError unless `num` more requests of `user` may come."""
        if self.failure is not None:
            raise EngineError(f"the engine stopped: {self.failure}")
        if self.is_closing:
            raise ClosingError("the server is shutting down", self.predicted_wait)
        if self.is_stalled:
            raise ClosingError("the engine makes no progress", self.limits.stall_seconds)
        if len(self._waiting) + num > self.limits.max_waiting:
            raise BusyError(
                f"{len(self._waiting)} requests wait already, of at most {self.limits.max_waiting}", self.predicted_wait
            )
        if user and self.num_of_user[user] + num > self.limits.max_per_user:
            raise BusyError(
                f"{self.num_of_user[user]} requests of this user are unfinished, of at most "
                f"{self.limits.max_per_user} for each",
                self.predicted_wait,
            )

    def submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        user: str = "",
        salt: bytes = b"",
        is_streamed: bool = True,
        timeout: float | None = None,
    ) -> list[TokenStream]:
        """Queue a request, which ends unfinished after `timeout` seconds; a stream for each of its completions.

        Raises RequestError, BusyError, ClosingError, EngineError.
        """
        self.info.check(prompt, params)
        self.check_room(user, params.n)
        now = self._clock()
        submission = Submission(
            key=self._num_keys + 1,
            prompt=prompt,
            params=params,
            arrival=now,
            priority=priority,
            user=user,
            salt=salt,
            is_streamed=is_streamed,
        )
        self._link.send(("submit", (submission,)))  # if that fails, nothing is left of it
        self._num_keys += params.n
        if not self._streams:
            self._progress = now  # it was idle, not stuck
            self._idle.clear()
        prompt_scores: list[TokenScore | None] = []
        streams = [TokenStream(submission, key, prompt_scores) for key in submission.keys]
        for stream in streams:
            self._streams[stream.key] = self._waiting[stream.key] = stream
            if timeout is not None:
                stream.timer = asyncio.get_running_loop().call_later(timeout, self._expire, stream)
        self.num_of_user[user] += params.n
        return streams

    def finish(self, stream: TokenStream, reason: FinishReason) -> None:
        """End a request, in whatever state it is; nothing happens if it has ended."""
        if stream.key in self._streams:
            self._link.send(("finish", (stream.key, reason)))

    def is_unfinished(self, key: int) -> bool:
        """Whether the request of this key has not ended."""
        return key in self._streams

    async def ask(self, query: str, **arguments: Any) -> Any:
        """The engine's answer to a query between two steps; None for one that it does not know. Raises EngineError."""
        if self.failure is not None:
            raise EngineError(f"the engine stopped: {self.failure}")
        number = next(self._questions)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._link.send(("ask", (number, query, arguments)))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        except TimeoutError:
            raise EngineError(f"the engine did not answer within {ANSWER_SECONDS:g} s") from None

    async def drain(self, timeout: float) -> None:
        """Take no more requests and wait for those that run; abort what is left after `timeout` seconds."""
        self.is_closing = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            self.abort_all()

    def abort_all(self) -> None:
        """End every request now."""
        self.is_closing = True
        for stream in list(self._streams.values()):
            self.finish(stream, FinishReason.ABORT)

    async def close(self) -> None:
        """End every request and the engine."""
        self.is_closing = True
        if self._watchdog is not None:
            self._watchdog.cancel()
        await self._link.close()
        self._fail_all("the engine was closed")

    def _on_report(self, report: Report) -> None:
        now = self._clock()
        if report.load.num_steps != self.load.num_steps or report.endings:
            self._progress, self.is_stalled = now, False
        self.load = report.load
        self.predictor.note_progress(now, report.load.num_computed)
        self._note_scores(report)
        at = 0
        for key, num in zip(report.keys, report.counts, strict=True):
            stream = self._streams.get(key)
            if stream is not None and num:
                self._waiting.pop(key, None)
                stream.gain(report.tokens[at : at + num])
            at += num
        for ending in report.endings:
            self._end(ending)
        for number, answer in report.answers:
            question = self._answers.pop(number)
            if not question.done():  # who asked may have gone
                question.set_result(answer)
        if report.failure:
            LOG.error("the engine stopped: %s", report.failure)
            self._fail_all(report.failure)

    def _note_scores(self, report: Report) -> None:
        for key, scores in report.scores:
            if key in self._streams:
                self._streams[key].scores += scores
        for key, prompt_scores in report.prompt_scores:
            if key in self._streams:
                self._streams[key].prompt_scores += prompt_scores

    def _end(self, ending: Ending) -> None:
        stream = self._streams.pop(ending.key, None)
        if stream is None:
            return
        self._waiting.pop(ending.key, None)
        submission = stream.submission
        self.num_of_user[submission.user] -= 1
        if not self.num_of_user[submission.user]:
            del self.num_of_user[submission.user]
        if ending.reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.predictor.note_finished(stream.num_tokens, submission.params.max_tokens)
        stream.end(ending)
        self.on_end(stream)
        if not self._streams:
            self._idle.set()

    def _fail_all(self, why: str) -> None:
        """The engine is gone; end what it has not."""
        self.failure = self.failure or why
        for key, stream in list(self._streams.items()):
            timings = Timings(arrival=stream.submission.arrival, finished=self._clock())
            self._end(Ending(key, FinishReason.ERROR, timings, 0, why))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineError(f"the engine stopped: {why}"))
        self._answers.clear()

    def _expire(self, stream: TokenStream) -> None:
        stream.is_expired = True
        self.finish(stream, FinishReason.ABORT if stream.num_tokens else FinishReason.REJECTED)

    async def _watch(self) -> None:
        """Notice when there is work and no progress; say once where the engine is."""
        stall_seconds = self.limits.stall_seconds
        while True:
            await asyncio.sleep(stall_seconds / CHECKS_PER_STALL)
            if self._streams and not self.is_stalled and self._clock() - self._progress > stall_seconds:
                self.is_stalled = True
                LOG.error(
                    "no step has ended for %.1f s; the engine's state:\n%s", stall_seconds, await self._link.dump()
                )

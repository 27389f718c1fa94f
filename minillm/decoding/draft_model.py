"""A small model drafts: each guess is a short generation on a scheduler, cache and runner of its own.

It samples as the large model does, after the same penalties and bans and with the noise of the same seed and position,
so guesses agree as often as the two models do (a grammar alone it does not follow). What it computed for a request is
found again in its prefix cache, but for the tokens since the last full block. It knows of the large model only the
requests' tokens.

While the large model verifies, the small one goes on as if all will hold, with those whose last guesses all did:

    large  |           | verify a b c    |  verify e f g    |        a b c held, and d is what it sampled behind them
    small  |  a  b  c  |  d? e  f  g     |  h?  i  j  k     |        e f g are there already
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from minillm.core.plan import RowParams, StepPlan, StepResult
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler

__all__ = ["DraftModel"]


class Pending(Protocol):
    """A step that was enqueued."""

    def wait(self) -> StepResult:
        """Block until its tokens are here."""


class StepRunner(Protocol):
    """Whatever runs the small model's plans."""

    def submit(self, plan: StepPlan) -> Pending:
        """Enqueue a step."""


class DraftModel:
    """Guesses of one small model for the requests of an engine."""

    def __init__(
        self, scheduler: Scheduler, runner: StepRunner, *, goes_on: bool = False, is_lazy: bool = False
    ) -> None:
        """`scheduler`: with a prefix cache; it and the runner are nobody else's.

        `goes_on`: whether the two models can compute at the same time. `is_lazy`: whether `runner` computes only as
        somebody waits.
        """
        self._scheduler, self._runner = scheduler, runner
        self._goes_on, self._is_lazy = goes_on, is_lazy
        self._in_flight: deque[tuple[StepPlan, Pending]] = deque()
        self._keys: dict[int, list[bytes]] = {}
        self._guessed: dict[int, array[int]] = {}  # tokens and last guesses, by request
        self._ahead: dict[int, Request] = {}  # twins that went on
        self._trusted: dict[Request, list[int]] = {}  # whose guesses before the last all held, and the last

    def has_guess(self, request: Request) -> bool:
        """It always has."""
        return True

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        """As many drafts as wanted, or fewer where a text ends; none for a request too long for the small model."""
        self._run()
        drafts = {request: self._foreseen(request)[:num] for request, num in wanted.items()}
        twins = {
            request: twin
            for request, num in wanted.items()
            if not drafts[request] and (twin := self._added(request, [], num)) is not None
        }
        self._run()
        drafts |= {request: list(twin.tokens[twin.num_prompt :]) for request, twin in twins.items()}
        self._trusted = {request: each for request, each in drafts.items() if self._has_held(request)}
        for request, each in drafts.items():
            self._guessed[request.number] = request.tokens + array("i", each)
        return {request: each for request, each in drafts.items() if each}

    def go_on(self) -> None:
        """The last guesses are being verified: enqueue what follows them if they hold, and read nothing."""
        if not self._goes_on:
            return
        for request, drafts in self._trusted.items():
            num_left = request.max_len - len(request.tokens) - len(drafts) - 2  # behind the token that no draft is for
            if drafts and num_left > 0:
                twin = self._added(request, drafts, 1 + min(len(drafts), num_left))
                if twin is not None:
                    self._ahead[request.number] = twin
        while self._try_enqueue():
            pass
        if self._is_lazy:
            self._run()

    def forget(self, request: Request) -> None:
        """The request ended."""
        for known in (self._keys, self._guessed, self._ahead):
            known.pop(request.number, None)

    def _foreseen(self, request: Request) -> list[int]:
        """What a twin that went on has behind the request's tokens, if it has those."""
        twin, num_known = self._ahead.pop(request.number, None), len(request.tokens)
        is_right = twin is not None and twin.tokens[:num_known] == request.tokens
        return list(twin.tokens[num_known:]) if twin is not None and is_right else []

    def _has_held(self, request: Request) -> bool:
        guessed = self._guessed.get(request.number)
        return guessed is not None and request.tokens[: len(guessed)] == guessed

    def _added(self, request: Request, drafts: Sequence[int], num: int) -> Request | None:
        """A twin that is to add `num` tokens to the request's and `drafts`; None if the small model is too small."""
        known = request.tokens + array("i", drafts)
        if self._scheduler.check(len(known), num) is not None:
            return None
        twin = Request(
            request.number,
            known,
            max_tokens=num,
            params=drafting_params(request.params),
            stop_token_ids=request.stop_token_ids,
            priority=request.priority,
            salt=request.salt,
        )
        twin.keys = self._keys.get(request.number, [])[:]
        self._scheduler.add(twin)
        self._keys[request.number] = twin.keys[: len(request.tokens) // self._scheduler.limits.block_size]
        return twin

    def _run(self) -> None:
        """The overlapped loop, to the end of all twins."""
        while self._scheduler.has_work or self._in_flight:
            is_ahead = self._try_enqueue()
            if not is_ahead or len(self._in_flight) > 1:
                plan, pending = self._in_flight.popleft()
                self._scheduler.update(plan, pending.wait())

    def _try_enqueue(self) -> bool:
        plan = self._scheduler.schedule(0.0)
        if plan is not None:
            self._in_flight.append((plan, self._runner.submit(plan)))
        return plan is not None


def drafting_params(params: RowParams) -> RowParams:
    """A row's own parameters, but for what is reported beside its tokens and for masks that only its engine makes."""
    edits = None if params.edits is None else params.edits._replace(has_grammar=False)
    return params._replace(edits=edits, num_logprobs=-1, num_prompt_logprobs=-1)

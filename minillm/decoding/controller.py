"""How many drafts pay. It reads results of steps (rows, tokens gained, seconds) and nothing else.

Two loops are in question: one that drafts and must wait for each result, one that drafts nothing and runs ahead. For
each size of the batch both are measured; the one that costs less per token goes on, the other is tried again after a
while, less and less often while it keeps losing. So the drafts of a step fall to zero when verifying them costs more
than they bring (256 rows, a text that repeats nothing), and come back when they bring more.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

__all__ = ["Controller", "DraftPolicy", "Fixed"]

FREE_TOKENS = 16
"""A step of so few tokens costs what its weights cost: each row may draft all it can."""
NUM_MEASURED = 16
"""Steps that a loop's cost is taken from."""
NUM_TRIAL_ROWS = 16
"""Rows that a trial of drafting verifies at least, and at least two steps."""
NUM_PLAIN_STEPS = 3
"""Steps of a trial of the other loop, which gain the same each."""
FEW_ROWS = 8
"""Up to so many rows drafting has the first turn."""
FIRST_PATIENCE = 128
"""Steps of more rows until drafting is first tried: a trial may cost what three or four of them do."""
MIN_PATIENCE, MAX_PATIENCE = 32, 512
"""Steps until the losing loop is tried again; four times as many each time it loses."""
CLEAR_LOSS = 1.3
"""A trial ends at once if a token costs so many times what it costs the other loop."""
MAX_PAUSE = 32
"""Most steps that a row whose drafts are refused goes without."""


class DraftPolicy(Protocol):
    """Who decides about drafts."""

    def is_on(self, num_rows: int) -> bool:
        """Whether the next step of so many rows is to draft."""

    def num_drafts(self, request: int, num_rows: int) -> int:
        """Drafts that a request may have in a drafting step; asked once a step."""

    def note_row(self, request: int, num_drafts: int, num_accepted: int) -> None:
        """So many of a request's drafts held."""

    def note_step(self, num_rows: int, num_gained: int, seconds: float, was_on: bool) -> None:
        """A step of decodes alone gained so many tokens, and came so many seconds after the one before it."""

    def forget(self, request: int) -> None:
        """The request ended."""


class Fixed:
    """Always the same number, whatever it costs: the controller's slow twin, which tests and checks use."""

    def __init__(self, num_drafts: int) -> None:
        self._num_drafts = num_drafts

    def is_on(self, num_rows: int) -> bool:
        return True

    def num_drafts(self, request: int, num_rows: int) -> int:
        return self._num_drafts

    def note_row(self, request: int, num_drafts: int, num_accepted: int) -> None:
        pass

    def note_step(self, num_rows: int, num_gained: int, seconds: float, was_on: bool) -> None:
        pass

    def forget(self, request: int) -> None:
        pass


class Pace:
    """How many drafts one request may have: twice as many after all held, one more than held after some did not."""

    __slots__ = ("_limit", "_max_drafts", "_num_refused", "_pause")

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = self._limit = max_drafts
        self._num_refused = self._pause = 0

    def next(self) -> int:
        """Drafts for the next step; 0 while it pauses."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._limit

    def note(self, num_drafts: int, num_accepted: int) -> None:
        """Go by what became of the last drafts; refused ones in a row bring ever longer pauses."""
        if num_accepted == num_drafts:
            self._limit = min(2 * self._limit, self._max_drafts)
        else:
            self._limit = min(num_accepted + 1, self._max_drafts)
        self._num_refused = 0 if num_accepted else self._num_refused + 1
        self._pause = min(2 ** max(0, self._num_refused - 2), MAX_PAUSE) if self._num_refused > 1 else 0


class Cost:
    """Seconds per token and row of a loop, over its last steps without the slowest: a hiccup is no verdict."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=NUM_MEASURED)

    def note(self, seconds: float, tokens_per_row: float) -> None:
        """One step."""
        self._steps.append((seconds, tokens_per_row))

    def forget(self) -> None:
        """Start over."""
        self._steps.clear()

    @property
    def per_token(self) -> float:
        """Infinite before the first step."""
        steps = sorted(self._steps)
        steps = steps[:-1] if len(steps) > 1 else steps
        num_tokens = sum(tokens for _, tokens in steps)
        return sum(seconds for seconds, _ in steps) / num_tokens if num_tokens else float("inf")


class Contest:
    """The two loops at one size of the batch, by turns: `is_on` says whether the one that drafts runs now."""

    def __init__(self, num_rows: int) -> None:
        self.is_on = self._best_is_on = num_rows <= FEW_ROWS
        self._is_trial = False
        self._num_trial_steps = (NUM_PLAIN_STEPS, max(2, NUM_TRIAL_ROWS // num_rows))
        self._patience = MIN_PATIENCE if self.is_on else FIRST_PATIENCE
        self._num_run = 0
        self._num_due = self._num_trial_steps[True] if self.is_on else self._patience
        self._costs = (Cost(), Cost())

    def note(self, seconds: float, tokens_per_row: float, was_on: bool) -> None:
        """A step, run by either loop: the last steps of a loop come in after the other was chosen."""
        self._costs[was_on].note(seconds, tokens_per_row)
        if was_on is self.is_on:
            self._num_run += 1
        if self._num_run < self._num_due and not self._is_settled():
            return
        self._num_run = 0
        if not self._is_trial:
            self._begin_trial()
            return
        is_better_on = self._costs[True].per_token < self._costs[False].per_token
        is_same = is_better_on is self._best_is_on
        self._patience = min(4 * self._patience, MAX_PATIENCE) if is_same else MIN_PATIENCE
        self._best_is_on = self.is_on = is_better_on
        self._is_trial = False
        self._num_due = self._patience

    def _is_settled(self) -> bool:
        """Whether drafting need not go on to the end of its turn: plain steps are cheap to try."""
        num_needed, loss = (1, CLEAR_LOSS) if self._is_trial else (NUM_MEASURED, 1.0)
        return self.is_on and self._num_run >= num_needed and self._loss() > loss

    def _loss(self) -> float:
        return self._costs[True].per_token / self._costs[False].per_token

    def _begin_trial(self) -> None:
        self.is_on = not self._best_is_on
        self._costs[self.is_on].forget()
        self._is_trial = True
        self._num_due = self._num_trial_steps[self.is_on]


class Controller:
    """As few as none, at most `max_drafts` for each request."""

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = max_drafts
        self._contests: dict[int, Contest] = {}
        self._paces: dict[int, Pace] = {}

    def is_on(self, num_rows: int) -> bool:
        """Whether the next step of so many rows is to draft."""
        return num_rows > 0 and self._contest(num_rows).is_on

    def num_drafts(self, request: int, num_rows: int) -> int:
        """Drafts that a request may have in a drafting step; asked once a step."""
        if num_rows * (1 + self._max_drafts) <= FREE_TOKENS:
            return self._max_drafts
        return self._pace(request).next()

    def note_row(self, request: int, num_drafts: int, num_accepted: int) -> None:
        """So many of a request's drafts held."""
        self._pace(request).note(num_drafts, num_accepted)

    def note_step(self, num_rows: int, num_gained: int, seconds: float, was_on: bool) -> None:
        """A step of decodes alone gained so many tokens, and came so many seconds after the one before it."""
        self._contest(num_rows).note(seconds, num_gained / num_rows, was_on)

    def forget(self, request: int) -> None:
        """The request ended; what it brought says little of the next, if few rows were all that was measured."""
        self._paces.pop(request, None)
        for size in [size for size in self._contests if 1 << size <= 2 * FEW_ROWS]:
            del self._contests[size]

    def _pace(self, request: int) -> Pace:
        if request not in self._paces:
            self._paces[request] = Pace(self._max_drafts)
        return self._paces[request]

    def _contest(self, num_rows: int) -> Contest:
        size = num_rows.bit_length()  # of one row, 2 to 3, 4 to 7, ...
        if size not in self._contests:
            self._contests[size] = Contest(num_rows)
        return self._contests[size]

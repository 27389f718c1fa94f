"""RequestQueue: requests without a row, in the order in which they are served. It knows no blocks or budgets.

A place in line counts tokens to compute, by what the cache holds when a request comes: those of all prompts that came
before, and twice its own. So shorter prompts go first, within bounds:

    came     A of 100   B of 30   C of 40   D of 10
    place    0 + 200    100 + 60  130 + 80  170 + 20        served: B, D, A, C

For a later request of m tokens to go before an earlier one of n, 2 m and all that came in between must be less than n.
Hence one that does has less than half of n, and all that ever do have less than n together: nobody starves. Those of
equal length stay in the order in which they came. A fork has its parent's place.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from minillm.core.request import Request

__all__ = ["RequestQueue", "insert", "try_remove"]

RANK = attrgetter("rank")
LENGTH_WEIGHT = 2


def insert(requests: list[Request], request: Request) -> None:
    """Put `request` at its rank into an ordered list."""
    insort(requests, request, key=RANK)


def try_remove(requests: list[Request], request: Request) -> bool:
    """Take `request` out of an ordered list; False if it is not there."""
    at = bisect_left(requests, request.rank, key=RANK)
    if at == len(requests) or requests[at] is not request:
        return False
    del requests[at]
    return True


class RequestQueue:
    """Waiting requests by (priority, place in line, number); a preempted one returns to its old place.

    A head that waits for memory may be overtaken by requests that fit, `max_overtakes` times while it heads the queue.
    """

    MAX_TRIED = 4
    """Candidates behind the head that one step looks at: a long queue costs no more than a short one."""

    def __init__(self, max_overtakes: int) -> None:
        self.max_overtakes = max_overtakes
        self._requests: list[Request] = []
        self._num_tokens = 0
        """Of the prompts of all that ever came."""

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]

    def next_place(self, num_tokens: int) -> int:
        """The place in line of a request that comes now and has `num_tokens` to compute, at least one."""
        place = self._num_tokens + LENGTH_WEIGHT * num_tokens
        self._num_tokens += num_tokens
        return place

    def push(self, request: Request) -> None:
        """Queue `request` at its rank."""
        insert(self._requests, request)

    def remove(self, request: Request) -> None:
        """Take `request` out, wherever it is."""
        is_removed = try_remove(self._requests, request)
        assert is_removed, f"request {request.number} is not queued"

    def pop(self, index: int) -> None:
        """Take out the request at `index`; the head notes that it was overtaken if that is not its own."""
        if index:
            self._requests[0].num_overtaken += 1
        del self._requests[index]

    def may_try(self, index: int, prompt: Request | None) -> bool:
        """Whether the request at `index` may be admitted before those ahead of it, which wait for memory, and before
        the half-done `prompt`, if there is one."""
        if index >= len(self._requests) or index > self.MAX_TRIED:
            return False
        if prompt is not None and prompt.rank < self._requests[index].rank:
            return False
        return index == 0 or self._requests[0].num_overtaken < self.max_overtakes

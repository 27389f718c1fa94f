"""RequestQueue: requests without a row, in the order in which they are served. It knows no blocks or budgets."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from minillm.core.request import Request

__all__ = ["RequestQueue", "insert", "try_remove"]

RANK = attrgetter("rank")


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
    """Waiting requests by (priority, arrival, number); a preempted one returns to its old place, ahead of later ones.

    A head that waits for memory may be overtaken by requests that fit, `max_overtakes` times while it heads the queue.
    """

    MAX_TRIED = 4
    """Candidates behind the head that one step looks at: a long queue costs no more than a short one."""

    def __init__(self, max_overtakes: int) -> None:
        self.max_overtakes = max_overtakes
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __getitem__(self, place: int) -> Request:
        return self._requests[place]

    def push(self, request: Request) -> None:
        """Queue `request` at its rank."""
        insert(self._requests, request)

    def remove(self, request: Request) -> None:
        """Take `request` out, wherever it is."""
        is_removed = try_remove(self._requests, request)
        assert is_removed, f"request {request.number} is not queued"

    def pop(self, place: int) -> None:
        """Take out the request at `place`; the head notes that it was overtaken if that is not its own."""
        if place:
            self._requests[0].num_overtaken += 1
        del self._requests[place]

    def may_try(self, place: int) -> bool:
        """Whether the request at `place` may be admitted before those ahead of it, which wait for memory."""
        if place >= len(self._requests) or place > self.MAX_TRIED:
            return False
        return place == 0 or self._requests[0].num_overtaken < self.max_overtakes

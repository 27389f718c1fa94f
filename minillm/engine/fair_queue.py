"""FairQueue: who is served next when requests wait: the most urgent priority first, and within it every user in turn.

Deficit round robin (Shreedhar and Varghese 1995): each user at the head of the ring may spend a quantum of tokens
more before the next one's turn, so that users get equal shares of tokens however many requests each one sends.
It knows no engine: an item is anything, its cost a number of tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

__all__ = ["FairQueue"]

Item = TypeVar("Item")

QUANTUM = 64
"""Tokens that a turn adds to what a user may spend."""


class Entry(NamedTuple):
    """A waiting item and its cost in tokens."""

    item: object
    cost: int


@dataclass(slots=True)
class Turn:
    """What a user has waiting, and tokens that it may spend."""

    entries: deque[Entry] = field(default_factory=deque)
    deficit: int = 0


class FairQueue(Generic[Item]):
    """Items by priority (lower first) and user; of one user in order of arrival."""

    def __init__(self) -> None:
        self._rings: dict[int, dict[str, Turn]] = {}
        self._num_items = 0

    def __len__(self) -> int:
        return self._num_items

    def push(self, item: Item, *, priority: int, user: str, cost: int) -> None:
        """Queue `item`; `cost` is at least 1."""
        assert cost >= 1
        ring = self._rings.setdefault(priority, {})
        ring.setdefault(user, Turn()).entries.append(Entry(item, cost))
        self._num_items += 1

    def pop(self) -> Item:
        """Take the next item out. The queue must not be empty."""
        priority = min(self._rings)
        ring = self._rings[priority]
        users = list(ring)
        # How often each one's turn must pass before it can pay; who pays first has the next turn.
        num_passed = [-(min(0, ring[user].deficit - ring[user].entries[0].cost) // QUANTUM) for user in users]
        fewest = min(num_passed)
        first = num_passed.index(fewest)
        for place, user in enumerate(users):
            ring[user].deficit += QUANTUM * (fewest + (place < first))
        for user in users[:first]:
            ring[user] = ring.pop(user)  # to the end of the ring
        user, turn = users[first], ring[users[first]]
        item, cost = turn.entries.popleft()
        turn.deficit -= cost
        self._forget_empty(priority, user)
        self._num_items -= 1
        return item  # type: ignore[return-value]

    def remove(self, item: Item, *, priority: int, user: str) -> None:
        """Take `item` out, wherever it is."""
        entries = self._rings[priority][user].entries
        entries.remove(next(entry for entry in entries if entry.item is item))
        self._forget_empty(priority, user)
        self._num_items -= 1

    def _forget_empty(self, priority: int, user: str) -> None:
        """A user with nothing waiting saves up nothing."""
        ring = self._rings[priority]
        if not ring[user].entries:
            del ring[user]
        if not ring:
            del self._rings[priority]

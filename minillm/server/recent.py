"""RecentRequests: which requests of the engine an answer's id stands for. It knows ids and numbers, never contents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from minillm.engine.async_engine import TokenStream

__all__ = ["RecentRequests"]

MAX_KEPT = 10_000


class RecentRequests:
    """The streams of the last requests by the id that their clients were given."""

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        self._max_kept = max_kept
        self._keys: OrderedDict[str, list[int]] = OrderedDict()

    def add(self, request_id: str, streams: Sequence[TokenStream]) -> None:
        """Remember a request; the oldest is forgotten when there are too many."""
        self._keys[request_id] = [stream.key for stream in streams]
        if len(self._keys) > self._max_kept:
            self._keys.popitem(last=False)

    def find(self, request_id: str) -> list[int] | None:
        """Keys under which the engine's side knows the request's completions, in order; None if it is not known."""
        return self._keys.get(request_id)

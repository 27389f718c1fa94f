"""Prompt lookup: what followed the last few tokens when they last appeared is a guess at what follows now.

(Saxena, "Prompt Lookup Decoding", 2023.) Each request has an index of its n-grams that grows by the tokens it gains, so
a guess costs no scan of the context. It knows no model, no device and no rule by which guesses are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from minillm.core.request import Request

__all__ = ["NgramDrafter", "NgramIndex"]

NGRAM = 2
"""Tokens that must be equal for a place in the context to be looked at."""
MAX_PLACES = 8
"""Places that are compared, the last one first."""
MAX_MATCH = 16
"""Of two places the one with more equal tokens before it is better, up to so many."""
NOWHERE = -1


class NgramIndex:
    """Where each n-gram of one growing sequence ended last, and before that: a chain of places per n-gram."""

    __slots__ = ("_earlier", "_last")

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}
        self._earlier = array("i")  # by place: the place before it with the same n-gram

    def guess(self, tokens: Sequence[int], num_drafts: int) -> list[int]:
        """Up to `num_drafts` tokens that may follow `tokens`, which start with the tokens of every earlier call."""
        place, best_match = NOWHERE, 0
        self._extend(tokens)
        candidate = self._last.get(tuple(tokens[-NGRAM:]), NOWHERE)
        for _ in range(MAX_PLACES):
            if candidate == NOWHERE:
                break
            num_equal = count_equal(tokens, candidate)
            if num_equal > best_match:
                place, best_match = candidate, num_equal
            if best_match == MAX_MATCH:
                break
            candidate = self._earlier[candidate]
        if place == NOWHERE:
            return []
        # A place less than `num_drafts` before the end is a loop: it goes round again.
        period = len(tokens) - place
        return [tokens[place + i % period] for i in range(num_drafts)]

    def _extend(self, tokens: Sequence[int]) -> None:
        """Index the n-grams that end before the last token: those that a token follows."""
        last, earlier = self._last, self._earlier
        for place in range(len(earlier), len(tokens)):
            if place < NGRAM:
                earlier.append(NOWHERE)
                continue
            ngram = tuple(tokens[place - NGRAM : place])
            earlier.append(last.get(ngram, NOWHERE))
            last[ngram] = place


def count_equal(tokens: Sequence[int], place: int) -> int:
    """How many tokens before `place` equal those at the end, up to MAX_MATCH.

    >>> count_equal([1, 2, 3, 9, 1, 2, 3], 3)
    3
    """
    num_equal, end = 0, len(tokens)
    while num_equal < min(place, MAX_MATCH) and tokens[place - 1 - num_equal] == tokens[end - 1 - num_equal]:
        num_equal += 1
    return num_equal


class NgramDrafter:
    """Guesses for the requests of an engine, each from its own prompt and output."""

    def __init__(self) -> None:
        self._indices: dict[int, NgramIndex] = {}

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        """Up to the wanted number of drafts for each request."""
        return {request: self._index(request).guess(request.tokens, num) for request, num in wanted.items()}

    def go_on(self) -> None:
        """To look it up when the tokens are known costs less."""

    def forget(self, request: Request) -> None:
        """The request ended."""
        self._indices.pop(request.number, None)

    def _index(self, request: Request) -> NgramIndex:
        return self._indices.setdefault(request.number, NgramIndex())

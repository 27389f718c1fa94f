"""Prompt lookup: what followed the last few tokens when they last appeared is a guess at what follows now.

(Saxena, "Prompt Lookup Decoding", 2023.) A guess is one pass over the context, a few microseconds for a thousand
tokens, and keeps nothing: a request that drafts only now and then pays for no more. It knows no model, no device and no
rule by which guesses are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from minillm.core.request import Request

__all__ = ["NgramDrafter", "guess"]

NGRAM = 2
"""Tokens that must be equal for a place in the context to be looked at."""
MAX_PLACES = 8
"""Places that are compared, the last one first."""
MAX_MATCH = 16
"""Of two places the one with more equal tokens before it is better, up to so many."""


def guess(tokens: array[int], num_drafts: int) -> list[int]:
    """`num_drafts` tokens that may follow `tokens`; none if their last NGRAM tokens never came before.

    >>> guess(array("i", [1, 2, 3, 4, 9, 1, 2]), 3)
    [3, 4, 9]
    """
    place, best_match = 0, 0
    for candidate in places(tokens):
        num_equal = count_equal(tokens, candidate)
        if num_equal > best_match:
            place, best_match = candidate, num_equal
        if best_match == MAX_MATCH:
            break
    if not best_match:
        return []
    # A place less than `num_drafts` before the end is a loop: it goes round again.
    period = len(tokens) - place
    return [tokens[place + i % period] for i in range(num_drafts)]


def places(tokens: array[int]) -> list[int]:
    """Where the tokens lie that followed the last n-gram before, the last one first, at most MAX_PLACES.

    >>> places(array("i", [1, 2, 3, 1, 2, 4, 1, 2]))
    [5, 2]
    """
    num_places = len(tokens) - NGRAM
    if num_places <= 0:
        return []
    context = np.frombuffer(tokens, np.int32)
    is_equal = context[:num_places] == tokens[-NGRAM]
    for i in range(1, NGRAM):
        is_equal &= context[i : num_places + i] == tokens[i - NGRAM]
    found: list[int] = (is_equal.nonzero()[0][-MAX_PLACES:] + NGRAM).tolist()
    return found[::-1]


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

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        """The wanted number of drafts for each request whose last tokens came before."""
        return {request: guess(request.tokens, num) for request, num in wanted.items()}

    def has_guess(self, request: Request) -> bool:
        """Whether its last tokens came before."""
        return bool(places(request.tokens))

    def go_on(self) -> None:
        """To look it up when the tokens are known costs less."""

    def forget(self, request: Request) -> None:
        """Nothing was kept."""

"""Prompt lookup: what followed the last few tokens when they last appeared is a guess at what follows now.

(Saxena, "Prompt Lookup Decoding", 2023.) A guess is one pass over the context, a few microseconds for a thousand
tokens, and keeps nothing: a request that drafts only now and then pays for no more. It knows no model, no device and no
rule by which guesses are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

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


def places(tokens: array[int]) -> Iterator[int]:
    """Where the tokens lie that followed the last n-gram before, the last one first, at most MAX_PLACES.

    >>> list(places(array("i", [1, 2, 3, 1, 2, 4, 1, 2])))
    [5, 2]
    """
    if len(tokens) <= NGRAM:
        return
    text, size = tokens.tobytes(), tokens.itemsize
    ngram = text[-NGRAM * size :]
    end, num_found = len(text) - size, 0
    while num_found < MAX_PLACES and (at := text.rfind(ngram, 0, end)) >= 0:
        end = at + len(ngram) - 1
        if at % size == 0:  # or the bytes are parts of other tokens
            num_found += 1
            yield at // size + NGRAM


def count_equal(tokens: Sequence[int], place: int) -> int:
    """How many tokens before `place` equal those at the end, up to MAX_MATCH.

    >>> count_equal([1, 2, 3, 9, 1, 2, 3], 3)
    3
    """
    num_equal = 0
    for before, last in zip(tokens[max(0, place - MAX_MATCH) : place][::-1], tokens[-MAX_MATCH:][::-1], strict=False):
        if before != last:
            break
        num_equal += 1
    return num_equal


class NgramDrafter:
    """Guesses for the requests of an engine, each from its own prompt and output."""

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        """The wanted number of drafts for each request whose last tokens came before."""
        return {request: guess(request.tokens, num) for request, num in wanted.items()}

    def has_guess(self, request: Request) -> bool:
        """Whether its last tokens came before."""
        return any(places(request.tokens))

    def go_on(self) -> None:
        """To look it up when the tokens are known costs less."""

    def forget(self, request: Request) -> None:
        """Nothing was kept."""

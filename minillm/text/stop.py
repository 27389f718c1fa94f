"""Finds stop strings in a stream of text, holding back no more than may become one. It knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Feed text, take back what is certainly before any stop string.

    Each stop string is followed by its own automaton (Knuth, Morris and Pratt 1977), so that a character costs
    amortised constant time per stop string. The first one to be complete wins; of several, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: non-empty strings; none at all lets everything through."""
        self._stops = [(stop, fallbacks(stop)) for stop in stops]
        self._lengths = [0] * len(stops)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    @property
    def is_matched(self) -> bool:
        """Whether the text has ended at a stop string."""
        return self.matched is not None

    def feed(self, text: str) -> str:
        """Text that is now certain: before a stop string, or unable to become one. Nothing after a match."""
        if self.is_matched:
            return ""
        if not self._stops:
            return text
        num_held = len(self._held)
        self._held += text
        for at, letter in enumerate(text, start=num_held + 1):
            self._advance(letter)
            if self.matched is not None:
                certain = self._held[: at - len(self.matched)]
                self._held = ""
                return certain
        num_certain = len(self._held) - max(self._lengths)
        certain, self._held = self._held[:num_certain], self._held[num_certain:]
        return certain

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        rest, self._held = self._held, ""
        return rest

    def _advance(self, letter: str) -> None:
        for i, (stop, fallback) in enumerate(self._stops):
            length = self._lengths[i]
            while length and stop[length] != letter:
                length = fallback[length - 1]
            length += stop[length] == letter
            self._lengths[i] = length
            if length == len(stop) and len(stop) > len(self.matched or ""):
                self.matched = stop


def fallbacks(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of its longest proper prefix that is also its suffix.

    >>> fallbacks("abab")
    [0, 0, 1, 2]
    """
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[length] != pattern[i]:
            length = table[length - 1]
        length += pattern[length] == pattern[i]
        table[i] = length
    return table

"""Prompt lookup: it finds what a scan of the whole context, token by token, finds."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from minillm.decoding.ngram_drafter import MAX_MATCH, MAX_PLACES, NGRAM, NgramDrafter, count_equal, guess
from tests.core.builders import request_of


def scanned(tokens: list[int], num_drafts: int) -> list[int]:
    """The slow twin: of the last places that the last two tokens stood before, the one with the longest match."""
    places = [p for p in range(NGRAM, len(tokens)) if tokens[p - NGRAM : p] == tokens[-NGRAM:]][::-1][:MAX_PLACES]
    if not places:
        return []
    place = max(places, key=lambda p: (count_equal(tokens, p), p))
    period = len(tokens) - place
    return [tokens[place + i % period] for i in range(num_drafts)]


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 9))
def test_the_last_places_are_compared(tokens: list[int], num_drafts: int) -> None:
    assert guess(array("i", tokens), num_drafts) == scanned(tokens, num_drafts)


def test_the_longer_match_wins_over_the_later() -> None:
    tokens = [1, 2, 3, 4, 5, 9, 3, 4, 6, 1, 2, 3, 4]
    assert guess(array("i", tokens), 3) == [5, 9, 3]


def test_a_loop_goes_round() -> None:
    assert guess(array("i", [7, 1, 2, 3, 1, 2, 3, 1, 2]), 7) == [3, 1, 2, 3, 1, 2, 3]


def test_what_never_stood_before_has_no_guess() -> None:
    assert [guess(array("i", range(n)), 4) for n in (0, 1, 2, 50)] == [[], [], [], []]


def test_bytes_that_are_parts_of_other_tokens_are_no_match() -> None:
    shifted = [1 << 16] * 3 + [1 << 8] * 2  # the last two's bytes come before, one byte off
    assert guess(array("i", shifted), 1) == []
    assert guess(array("i", [1 << 8, 1 << 8, 7, *shifted]), 1) == [7]


def test_matches_are_compared_up_to_a_bound() -> None:
    assert count_equal([1] * 100, 50) == MAX_MATCH
    assert count_equal([1] * 10, 3) == 3


def test_each_request_is_drafted_for_from_its_own_tokens() -> None:
    drafter = NgramDrafter()
    first, second = request_of(1, [1, 2, 3, 1, 2]), request_of(2, [1, 2, 4, 1, 2])
    assert drafter.propose({first: 2, second: 1}) == {first: [3, 1], second: [4]}
    first.tokens.extend([3, 1, 2])
    assert drafter.propose({first: 2}) == {first: [3, 1]}
    assert drafter.has_guess(first) and not drafter.has_guess(request_of(3, [1, 2, 3]))

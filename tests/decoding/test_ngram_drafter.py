"""Prompt lookup: it finds what a scan of the whole context finds, and reads each token once."""

from __future__ import annotations

import random
from array import array

from hypothesis import given
from hypothesis import strategies as st

from minillm.decoding.ngram_drafter import MAX_MATCH, MAX_PLACES, NGRAM, NgramDrafter, NgramIndex, count_equal
from tests.core.builders import request_of


def scanned(tokens: list[int], num_drafts: int) -> list[int]:
    """The slow twin: of the last places that the last two tokens stood before, the one with the longest match."""
    places = [p for p in range(NGRAM, len(tokens)) if tokens[p - NGRAM : p] == tokens[-NGRAM:]][::-1][:MAX_PLACES]
    if not places:
        return []
    place = max(places, key=lambda p: (count_equal(tokens, p), p))
    period = len(tokens) - place
    return [tokens[place + i % period] for i in range(num_drafts)]


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 9), st.randoms())
def test_a_growing_index_finds_what_a_scan_finds(tokens: list[int], num_drafts: int, rng: random.Random) -> None:
    index, end = NgramIndex(), 0
    while end < len(tokens):
        end = rng.randint(end + 1, len(tokens))
        assert index.guess(tokens[:end], num_drafts) == scanned(tokens[:end], num_drafts)


def test_the_longer_match_wins_over_the_later() -> None:
    tokens = [1, 2, 3, 4, 5, 9, 3, 4, 6, 1, 2, 3, 4]
    assert NgramIndex().guess(tokens, 3) == [5, 9, 3]


def test_a_loop_goes_round() -> None:
    assert NgramIndex().guess([7, 1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]


def test_what_never_stood_before_has_no_guess() -> None:
    assert [NgramIndex().guess(list(range(n)), 4) for n in (0, 1, 2, 50)] == [[], [], [], []]


def test_matches_are_compared_up_to_a_bound() -> None:
    assert count_equal([1] * 100, 50) == MAX_MATCH
    assert count_equal([1] * 10, 3) == 3


class Counted(list[int]):
    """A list that counts how often it is read."""

    num_reads = 0

    def __getitem__(self, at: object) -> object:  # type: ignore[override]
        self.num_reads += 1
        return super().__getitem__(at)  # type: ignore[call-overload]


def test_a_step_does_not_scan_the_context() -> None:
    rng = random.Random(0)
    tokens = Counted(rng.randrange(50) for _ in range(20_000))
    index = NgramIndex()
    index.guess(tokens, 4)
    tokens.num_reads = 0
    for _ in range(10):
        tokens.append(rng.randrange(50))
        index.guess(tokens, 4)
    assert 0 < tokens.num_reads < 10 * (2 * MAX_PLACES * (MAX_MATCH + 1) + 10)


def test_each_request_has_its_own_index_until_it_ends() -> None:
    drafter = NgramDrafter()
    first, second = request_of(1, [1, 2, 3, 1, 2]), request_of(2, [1, 2, 4, 1, 2])
    assert drafter.propose({first: 2, second: 1}) == {first: [3, 1], second: [4]}
    first.tokens.extend([3, 1, 2])
    assert drafter.propose({first: 2}) == {first: [3, 1]}
    drafter.forget(first)
    first.tokens = array("i", [1, 2, 5, 1, 2])  # another request under the same number
    assert drafter.propose({first: 1}) == {first: [5]}

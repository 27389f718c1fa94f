"""Stop strings over a stream, against a search in the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minillm.text.stop import StopMatcher

WORDS = st.text("ab", min_size=1, max_size=5)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Text before the stop string that is complete first, the longest of several; and that string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(WORDS, max_size=4))
def test_any_cut_of_a_text_stops_where_the_whole_does(pieces: list[str], stops: list[str]) -> None:
    text, (before, stop) = "".join(pieces), expected("".join(pieces), stops)
    matcher, out, fed = StopMatcher(stops), "", ""
    for piece in pieces:
        out += matcher.feed(piece)
        fed += piece
        assert before.startswith(out)
        held = fed[len(out) :]
        if not matcher.is_matched:  # held back: the start of a stop string, and no more than needed
            assert held == "" or any(s.startswith(held) and s != held for s in stops)
    assert matcher.matched == stop
    assert out + matcher.finish() == before
    assert stop is not None or out + text[len(out) :] == text


def test_text_after_a_match_is_dropped() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.feed("one EN") == "one "
    assert matcher.feed("D two") == ""
    assert matcher.matched == "END"
    assert matcher.feed("three") == "" and matcher.finish() == ""


def test_false_starts_are_released() -> None:
    matcher = StopMatcher(["aab"])
    assert matcher.feed("aaa") == "a"
    assert matcher.feed("b") == ""
    assert matcher.is_matched


def test_without_stop_strings_everything_passes() -> None:
    matcher = StopMatcher(())
    assert matcher.feed("anything") == "anything"
    assert not matcher.is_matched and matcher.finish() == ""

"""The order of service: shorter prompts first, within bounds that hold for any prompts in any order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minillm.core.queue import RequestQueue
from minillm.core.request import Request
from tests.core.builders import request_of

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def queued(lengths: list[int]) -> list[Request]:
    """Requests of these lengths, numbered from 0 as they come, in the order in which they are served."""
    queue = RequestQueue(max_overtakes=0)
    for number, length in enumerate(lengths):
        request = request_of(number, length)
        request.rank = (request.priority, queue.next_place(length), number)
        queue.push(request)
    return list(queue)


def test_the_drawing_is_true() -> None:
    assert [request.num_prompt for request in queued([100, 30, 40, 10])] == [30, 10, 100, 40]


def test_a_prompt_half_as_long_stays_behind_and_a_shorter_one_goes_ahead() -> None:
    assert [request.number for request in queued([10, 5])] == [0, 1]
    assert [request.number for request in queued([10, 4])] == [1, 0]
    assert [request.number for request in queued([10, 4, 3])] == [1, 0, 2], "what came in between counts"


def test_a_long_prompt_is_overtaken_by_fewer_tokens_than_its_own_and_by_almost_as_many() -> None:
    order = [request.number for request in queued([1000, *[1] * 2000])]
    assert order.index(0) == 998 and order == [*range(1, 999), 0, *range(999, 2001)]


@given(LENGTHS)
def test_whoever_goes_ahead_of_an_earlier_one_is_less_than_half_and_all_together_less_than_it(
    lengths: list[int],
) -> None:
    order = [request.number for request in queued(lengths)]
    assert sorted(order) == list(range(len(lengths)))
    for at, number in enumerate(order):
        overtaking = [lengths[other] for other in order[:at] if other > number]
        assert all(2 * length < lengths[number] for length in overtaking)
        assert sum(overtaking) < lengths[number]


@given(st.integers(1, 40), st.integers(2, 60))
def test_prompts_of_one_length_are_served_as_they_came(length: int, num: int) -> None:
    assert [request.number for request in queued([length] * num)] == list(range(num))

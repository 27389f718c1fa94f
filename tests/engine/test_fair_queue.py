"""Who is served next: priorities, shares of users, the order of one user's requests."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from minillm.engine.fair_queue import QUANTUM, FairQueue


def popped(queue: FairQueue[tuple[str, int]]) -> list[tuple[str, int]]:
    return [queue.pop() for _ in range(len(queue))]


def test_one_user_is_served_in_order_of_arrival() -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for i, cost in enumerate((5000, 1, 300)):
        queue.push(("a", i), priority=0, user="a", cost=cost)
    assert [i for _, i in popped(queue)] == [0, 1, 2]


def test_a_lower_priority_is_served_first() -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for i, priority in enumerate((0, 3, -2, 0)):
        queue.push(("a", i), priority=priority, user=f"user {i}", cost=10)
    assert [i for _, i in popped(queue)] == [2, 0, 3, 1]


def test_a_flood_of_one_user_does_not_hold_up_another() -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for i in range(100):
        queue.push(("flood", i), priority=0, user="flood", cost=QUANTUM)
    queue.push(("late", 0), priority=0, user="late", cost=QUANTUM)
    assert ("late", 0) in [queue.pop() for _ in range(3)]


def test_users_share_tokens_not_requests() -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for _ in range(400):
        queue.push(("short", 100), priority=0, user="short", cost=100)
        queue.push(("long", 2000), priority=0, user="long", cost=2000)
    spent: Counter[str] = Counter()
    for _ in range(300):
        user, cost = queue.pop()
        spent[user] += cost
    assert abs(spent["short"] - spent["long"]) <= 2000 + QUANTUM


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1), st.integers(1, 9 * QUANTUM)), max_size=30),
    st.data(),
)
def test_every_item_comes_out_once_whatever_is_removed(items: list[tuple[str, int, int]], data: st.DataObject) -> None:
    queue: FairQueue[tuple[int, str, int]] = FairQueue()
    left = []
    for i, (user, priority, cost) in enumerate(items):
        item = (i, user, priority)
        queue.push(item, priority=priority, user=user, cost=cost)
        left.append(item)
        if data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(left))
            queue.remove(gone, priority=gone[2], user=gone[1])
            left.remove(gone)
    assert len(queue) == len(left)
    out = [queue.pop() for _ in left]
    assert sorted(out) == left and not len(queue)
    assert [item[2] for item in out] == sorted(item[2] for item in left)
    for user in "abc":
        for priority in (-1, 0, 1):
            mine = [item[0] for item in out if item[1:] == (user, priority)]
            assert mine == sorted(mine)

"""Blocks, keys, holds: counts are exact, and nothing is shared that was not computed and read."""

from __future__ import annotations

from array import array

import pytest

from minillm.core.block_pool import BlockPool
from minillm.core.kv_manager import KVManager
from minillm.core.plan import ints
from minillm.core.request import Request
from tests.core.builders import planned, request_of, result_of, scheduler_of, step


def manager(num_blocks: int = 9, block_size: int = 4) -> KVManager:
    return KVManager(num_blocks, block_size, enable_prefix_caching=True)


def computed(kv: KVManager, request: Request) -> None:
    """Admit `request`, compute all its tokens and publish them."""
    kv.extend_keys(request, len(request.tokens) // kv.block_size)
    assert kv.try_admit(request, kv.match(request, 1), len(request.tokens), 0)
    request.row, request.num_computed = request.number, len(request.tokens)
    kv.publish(request)


def test_empty_blocks_are_taken_before_cached_ones_and_those_by_age() -> None:
    pool = BlockPool(5)
    blocks = pool.take(3)
    assert blocks.tolist() == [1, 2, 3]
    pool.publish(1, b"one")
    pool.publish(2, b"two")
    pool.release([2, 3, 1])
    assert pool.take(4).tolist() == [3, 4, 2, 1]
    assert not pool.block_of and not pool.key_of


def test_a_shared_block_is_not_reused() -> None:
    pool = BlockPool(3)
    (block, _) = pool.take(2)
    pool.publish(block, b"key")
    pool.release([block])
    pool.share([block])
    assert pool.num_free == 0
    pool.check_invariants(array("i", [0, 1, 1]))


def test_keys_stand_for_the_whole_prefix_and_the_salt() -> None:
    kv = manager()
    a, same, other, salted = (
        request_of(1, [1, 2, 3, 4, 5, 6, 7, 8]),
        request_of(2, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        request_of(3, [9, 2, 3, 4, 5, 6, 7, 8]),
        request_of(4, [1, 2, 3, 4, 5, 6, 7, 8], salt=b"s"),
    )
    for request in (a, same, other, salted):
        kv.extend_keys(request, 2)
    assert a.keys == same.keys and len({*a.keys, *other.keys, *salted.keys}) == 6
    assert min(len(key) for key in a.keys) >= 16


def test_a_hit_leaves_a_token_to_compute() -> None:
    kv = manager()
    computed(kv, request_of(1, range(8)))
    again = request_of(2, range(8))
    kv.extend_keys(again, 2)
    assert kv.match(again, 1).num_tokens == 4
    longer = request_of(3, range(9))
    kv.extend_keys(longer, 2)
    assert kv.match(longer, 1).num_tokens == 8


def test_admission_that_fails_changes_nothing() -> None:
    kv = manager(num_blocks=5)
    first = request_of(1, range(8))
    computed(kv, first)
    second = request_of(2, [*range(8), *range(20, 36)])
    kv.extend_keys(second, 6)
    before = kv.pool.ref_counts[:]
    assert not kv.try_admit(second, kv.match(second, 1), 4, 0)
    assert kv.pool.ref_counts == before and not second.blocks and kv.num_promised == 0
    kv.check_invariants([first, second])


def test_admission_counts_what_is_promised_to_others() -> None:
    kv = manager(num_blocks=9)
    first, second = request_of(1, 20), request_of(2, 16)
    assert kv.try_admit(first, kv.match(first, 1), 4, 0)
    assert (len(first.blocks), kv.num_promised, kv.pool.num_free) == (1, 4, 7)
    assert not kv.try_admit(second, kv.match(second, 1), 4, 0)
    changes = ints()
    first.row = 3
    assert kv.try_grow(first, 12, changes)
    assert changes.tolist() == [3, 1, first.blocks[1], 3, 2, first.blocks[2]]
    assert kv.num_promised == 2
    kv.release(first)
    assert kv.num_promised == 0 and kv.pool.num_free == 8
    assert kv.try_admit(second, kv.match(second, 1), 4, 0)


def test_revived_blocks_count_as_taken() -> None:
    kv = manager(num_blocks=4)
    first = request_of(1, range(12))
    computed(kv, first)
    kv.release(first)
    second = request_of(2, range(13))
    kv.extend_keys(second, 3)
    assert kv.match(second, 1).num_tokens == 12
    assert not kv.try_admit(second, kv.match(second, 1), 1, 0)
    kv.check_invariants([second])


def test_the_tail_of_a_chain_is_reused_before_its_head() -> None:
    kv = manager(num_blocks=4)
    first = request_of(1, range(12))
    computed(kv, first)
    kv.release(first)
    kv.pool.take(1)
    again = request_of(2, range(12))
    kv.extend_keys(again, 3)
    assert kv.match(again, 1).num_tokens == 8


def test_a_held_block_outlives_its_request() -> None:
    kv = manager(num_blocks=4)
    first = request_of(1, range(12))
    computed(kv, first)
    held = list(first.blocks[:2])
    kv.hold(held)
    kv.hold(held[:1])
    kv.release(first)
    kv.check_invariants([])
    assert kv.pool.num_free == 1
    kv.drop(held)
    assert kv.pool.num_free == 2
    kv.drop(held[:1])
    assert kv.pool.num_free == 3
    kv.check_invariants([])
    with pytest.raises(AssertionError, match="not held"):
        kv.drop(held[:1])


def test_a_cached_block_can_be_held() -> None:
    kv = manager()
    first = request_of(1, range(4))
    computed(kv, first)
    block = first.blocks[0]
    kv.release(first)
    kv.hold([block])
    assert block not in kv.pool.take(kv.pool.num_free)


def test_keys_appear_when_results_are_applied_and_not_before() -> None:
    scheduler = scheduler_of(block_size=4, max_num_batched_tokens=8)
    scheduler.add(request_of(1, 8, max_tokens=20))
    first = planned(scheduler)
    second = planned(scheduler)
    assert second.num_tokens.tolist() == [0]
    assert not scheduler.kv.pool.block_of
    scheduler.update(first, result_of(first))
    assert len(scheduler.kv.pool.block_of) == 2
    scheduler.update(second, result_of(second))
    for _ in range(3):
        assert len(scheduler.kv.pool.block_of) == 2
        step(scheduler)
    assert len(scheduler.kv.pool.block_of) == 3


def test_tokens_after_the_end_are_neither_kept_nor_published() -> None:
    scheduler = scheduler_of(block_size=2)
    request = request_of(1, 5, max_tokens=20)
    scheduler.add(request)
    plans = [planned(scheduler) for _ in range(3)]
    assert scheduler.update(plans[0], result_of(plans[0], token=0)) == [request]
    for plan in plans[1:]:
        assert scheduler.update(plan, result_of(plan)) == []
    assert request.tokens.tolist()[5:] == [0]
    assert len(scheduler.kv.pool.block_of) == 2
    assert scheduler.num_free_blocks == 1024


def test_many_blocks_that_fill_at_once_are_published_over_some_steps() -> None:
    num = 200
    scheduler = scheduler_of(block_size=4, max_num_seqs=num, max_num_batched_tokens=4 * num)
    for number in range(1, num + 1):
        scheduler.add(request_of(number, 4, max_tokens=8))
    sizes = []
    for _ in range(4):
        step(scheduler)
        sizes.append(len(scheduler.kv.pool.block_of))
    assert sizes == [64, 128, 192, 200]


def test_what_was_not_published_yet_is_when_it_is_released() -> None:
    num = 200
    scheduler = scheduler_of(block_size=4, max_num_seqs=num, max_num_batched_tokens=4 * num)
    for number in range(1, num + 1):
        scheduler.add(request_of(number, 4, max_tokens=1))
    step(scheduler)
    assert not scheduler.has_work and len(scheduler.kv.pool.block_of) == num


def test_without_prefix_caching_nothing_is_published() -> None:
    scheduler = scheduler_of(block_size=4, enable_prefix_caching=False)
    for number in (1, 2):
        scheduler.add(request_of(number, range(1, 40), max_tokens=9))
        while scheduler.has_work:
            step(scheduler)
    assert not scheduler.kv.pool.block_of

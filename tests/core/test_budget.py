"""Caps on a step, and how a prompt is cut."""

from __future__ import annotations

import math
import random

import pytest

from minillm.core.budget import Budget, SchedulerLimits
from minillm.errors import ConfigError
from tests.core.builders import limits_of


def chunks(limits: SchedulerLimits, num_owed: int, num_decodes: int = 0) -> list[int]:
    """The parts in which a prompt is computed, one a step, beside `num_decodes` decodes."""
    sizes, start = [], 0
    while start < num_owed:
        sizes.append(Budget(limits, num_decodes).chunk_size(start, num_owed - start))
        assert sizes[-1] > 0
        start += sizes[-1]
    return sizes


@pytest.mark.parametrize(
    ("num_owed", "cap", "expected"),
    [(1000, 256, [250] * 4), (1000, 512, [500, 500]), (1000, 1000, [1000]), (513, 512, [257, 256]), (5, 512, [5])],
)
def test_chunks_are_few_and_equal(num_owed: int, cap: int, expected: list[int]) -> None:
    assert chunks(limits_of(max_num_batched_tokens=cap), num_owed) == expected
    assert chunks(limits_of(max_num_batched_tokens=4096, max_chunk_size=cap), num_owed) == expected


def test_a_chunk_is_no_smaller_than_the_least_unless_it_is_the_rest() -> None:
    limits = limits_of(max_num_batched_tokens=64, min_chunk_size=16)
    assert Budget(limits, 49).chunk_size(0, 100) == 0
    assert Budget(limits, 48).chunk_size(0, 100) == 16
    assert Budget(limits, 48).chunk_size(0, 17) == 16  # rather than 9 + 8
    assert Budget(limits, 60).chunk_size(0, 4) == 4
    assert Budget(limits, 64).chunk_size(0, 1) == 0


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"max_num_batched_tokens": 64}, 16),
        ({"max_num_batched_tokens": 8}, 4),
        ({"max_num_batched_tokens": 1}, 1),
        ({"soft_cap": 20}, 10),
        ({"min_chunk_size": 300}, 128),
        ({"min_chunk_size": 300, "max_chunk_size": 40}, 40),
    ],
)
def test_the_least_chunk_fits_beside_decodes(changes: dict[str, int], least: int) -> None:
    limits = limits_of(**changes)
    assert limits.least_chunk == least
    hard_cap = limits.max_num_batched_tokens
    cap = min(limits.soft_cap or hard_cap, hard_cap)
    assert Budget(limits, cap // 2).chunk_size(0, 10**6) >= least
    assert hard_cap == 1 or Budget(limits, 1).chunk_size(0, 10**6) >= least


def test_a_least_chunk_above_the_cap_does_not_stop_a_prompt() -> None:
    assert chunks(limits_of(max_num_batched_tokens=8, min_chunk_size=16), 20) == [7, 7, 6]


def test_the_soft_cap_holds_only_while_rows_decode() -> None:
    limits = limits_of(max_num_batched_tokens=1024, soft_cap=256)
    assert Budget(limits, 0).chunk_size(0, 1000) == 1000
    assert Budget(limits, 56).chunk_size(0, 1000) == 200
    assert not Budget(limits, 0).is_spent


def test_few_decodes_have_a_smaller_soft_cap() -> None:
    limits = limits_of(max_num_batched_tokens=1024, soft_cap=400, soft_cap_few=208)
    assert [limits.soft_cap_of(num, 10**6) for num in (0, 4, 64, 128, 256, 300)] == [208, 211, 256, 304, 400, 400]
    assert [Budget(limits, num).chunk_size(0, 10**6) for num in (4, 64, 128, 256)] == [207, 192, 176, 144]
    assert limits_of(soft_cap=100, soft_cap_few=208).soft_cap_of(1, 1) == 100


def test_few_decodes_that_read_many_keys_have_a_larger_one() -> None:
    limits = limits_of(max_num_batched_tokens=1024, soft_cap=400, soft_cap_few=208, many_keys=960)
    assert [limits.soft_cap_of(4, keys) for keys in (0, 10, 240, 480, 960, 2000)] == [211, 211, 232, 256, 304, 304]
    assert limits.soft_cap_of(128, 240) == 304
    assert Budget(limits, 4, 960).chunk_size(0, 10**6) == 300


def test_the_soft_cap_is_for_readers() -> None:
    limits = limits_of(max_num_batched_tokens=1024, soft_cap=256)
    assert Budget(limits, 56, has_readers=False).chunk_size(0, 2000) == 667  # three equal parts of at most 968
    assert not Budget(limits, 1000, has_readers=False).is_spent


@pytest.mark.parametrize(("num_decodes", "start"), [(250, 0), (256, 0), (300, 0), (1000, 0), (1, 10**6)])
def test_the_first_chunk_may_pass_the_soft_cap_and_no_other(num_decodes: int, start: int) -> None:
    limits = limits_of(max_num_batched_tokens=1024, soft_cap=256, attention_equivalence=1000.0)
    budget = Budget(limits, num_decodes)
    assert budget.chunk_size(start, 10**6) == limits.least_chunk == 16 and not budget.is_spent
    assert budget.chunk_size(start, 3) == 3
    budget.spend(start, 16)
    assert budget.chunk_size(0, 10**6) == budget.chunk_size(0, 1) == 0 and budget.is_spent


def test_the_first_chunk_does_not_pass_the_hard_cap() -> None:
    limits = limits_of(max_num_batched_tokens=64, soft_cap=32)
    assert [Budget(limits, num).chunk_size(0, 100) for num in (48, 49, 64)] == [16, 0, 0]
    assert [Budget(limits, num).is_spent for num in (48, 63, 64)] == [False, False, True]


def test_a_long_context_takes_more_of_the_soft_cap() -> None:
    limits = limits_of(max_num_batched_tokens=4096, soft_cap=512, attention_equivalence=5000.0)
    sizes = [Budget(limits, 12).chunk_size(start, 10**6) for start in (0, 5000, 20_000)]
    assert sizes == [477, 246, 99]  # times 1 + mean context / 5000: just under 500


def test_the_soft_chunk_is_the_largest_that_costs_no_more() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        kappa, start, num_decodes = rng.uniform(10, 1e5), rng.randrange(100_000), rng.randrange(1, 500)
        limits = limits_of(max_num_batched_tokens=10**6, soft_cap=512, attention_equivalence=kappa, min_chunk_size=1)
        size = Budget(limits, num_decodes)._max_soft_chunk(start)
        costs = [n * (1 + (start + n / 2) / kappa) for n in (size, size + 1)]
        assert costs[0] <= 512 - num_decodes + 1e-6 and costs[1] > 512 - num_decodes - 1e-6


def test_a_chunk_ends_the_step_at_a_tile_step() -> None:
    limits = limits_of(max_num_batched_tokens=1024, soft_cap=600, tile_steps=(128, 256, 384, 512))
    assert Budget(limits, 40).chunk_size(0, 10_000) == 512 - 40
    assert Budget(limits, 40).chunk_size(0, 1000) == 384 - 40  # three chunks either way: 384 is cheaper than 512
    assert Budget(limits, 40).chunk_size(0, 300) == 300  # the rest, though it ends between steps
    assert Budget(limits, 590).chunk_size(0, 10_000) == 16
    assert Budget(limits, 520).chunk_size(0, 10_000) == 80  # no tile step left: the soft cap alone


def test_chunks_of_several_prompts_share_a_step() -> None:
    limits = limits_of(max_num_batched_tokens=512, soft_cap=256, attention_equivalence=1000.0)
    budget = Budget(limits, 6)
    assert budget.chunk_size(0, 100) == 100
    budget.spend(0, 100)
    size = budget.chunk_size(900, 10_000)
    assert size * (1 + (900 + size / 2) / 1000) <= 250 - 100 * 1.05 < (size + 1) * (1 + (901 + size / 2) / 1000)


def test_without_chunked_prefill_a_prompt_is_whole_or_waits() -> None:
    limits = limits_of(max_num_batched_tokens=512, max_model_len=512, soft_cap=64, enable_chunked_prefill=False)
    assert Budget(limits, 12).chunk_size(0, 500) == 500
    assert Budget(limits, 13).chunk_size(0, 500) == 0


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "says"),
    [
        (0, 5, "empty"),
        (5, 0, "max_tokens"),
        (100, 5, "max_model_len"),
        (65, 5, "KV cache"),
        (64, 5, None),
        (64, 10**6, None),  # it ends where the cache does
    ],
)
def test_what_can_never_be_served_is_said(num_prompt: int, max_tokens: int, says: str | None) -> None:
    limits = limits_of(max_num_batched_tokens=32, max_model_len=100, num_kv_blocks=5, block_size=16)
    fault = limits.find_fault(num_prompt, max_tokens)
    assert fault is None if says is None else fault is not None and says in fault


def test_a_prompt_longer_than_a_step_is_a_fault_only_if_it_may_not_be_cut() -> None:
    whole = limits_of(max_num_batched_tokens=100, max_model_len=100, enable_chunked_prefill=False)
    fault = whole.find_fault(101, 5)
    assert fault is not None and "raise max_model_len" in fault
    assert whole.find_fault(99, 5) is None
    assert limits_of(max_num_batched_tokens=32, max_model_len=200).find_fault(101, 5) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_blocks": 1},
        {"max_num_seqs": 0},
        {"soft_cap": 0},
        {"soft_cap_few": 0},
        {"many_keys": 0},
        {"attention_equivalence": math.nan},
        {"attention_equivalence": 0.0},
        {"tile_steps": (8, 4)},
        {"max_chunk_size": 16, "max_num_batched_tokens": 4096, "enable_chunked_prefill": False},
        {"max_num_batched_tokens": 4095, "enable_chunked_prefill": False},
    ],
)
def test_limits_that_cannot_work_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        limits_of(**changes)

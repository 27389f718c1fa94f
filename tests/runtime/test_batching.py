"""A plan becomes one flat buffer, and samples of the batch go back to the plan's rows."""

from __future__ import annotations

from array import array

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.core.plan import RowParams, Seat, StepPlan
from minillm.runtime.batching import NUM_ROW_COLUMNS, PaddedShapes, StepWords
from minillm.runtime.batching import step_words as padded_step_words
from minillm.runtime.rows import Rows, param_words
from minillm.runtime.runner import NOT_FINITE, step_result
from minillm.runtime.verify import verified

PLAIN = RowParams(0.0, 0, 1.0, 0.0, 1)
CPU = torch.device("cpu")
SHAPES = PaddedShapes(decode_sizes=(1, 2, 4), mixed_sizes=(8, 16), num_rows=5)


def step_words(plan: StepPlan, rows: Rows) -> StepWords:
    """Without padding."""
    return padded_step_words(plan, rows, PaddedShapes())


def make_plan(*works: tuple[int, int, int, list[int]], samples: list[int]) -> StepPlan:
    """Rows as (row, start, count, tokens)."""
    plan = StepPlan(step=1)
    for (row, start, count, tokens), num_samples in zip(works, samples, strict=True):
        plan.requests.append(100 + row)
        plan.rows.append(row)
        plan.starts.append(start)
        plan.counts.append(count)
        plan.num_logits.append(num_samples)
        plan.num_samples.append(num_samples)
        plan.num_tokens.append(len(tokens))
        plan.tokens.extend(tokens)
    return plan


def test_single_tokens_come_first_and_offsets_follow() -> None:
    plan = make_plan((3, 0, 3, [7, 8, 9]), (1, 40, 1, []), (2, 16, 2, [5, 6]), (4, 9, 1, [2]), samples=[0, 1, 1, 1])
    words = step_words(plan, Rows(8, 4, CPU))
    columns = words.columns
    assert words.order.tolist() == [1, 3, 0, 2]
    assert words.num_decodes == 2
    assert columns.tolist() == [[1, 4, 3, 2], [40, 9, 0, 16], [1, 1, 3, 2], [0, 1, 2, 5], [-1, 5, 0, 3]]
    assert words.samples.tolist() == [[0, 1, 6], [1, 4, 2], [41, 10, 18]]
    assert (words.num_tokens, words.max_query_len, words.max_context_len) == (7, 3, 41)


def test_flags_follow_the_sampled_rows_only() -> None:
    rows = Rows(4, 4, CPU)
    plan = make_plan((1, 0, 2, [1, 2]), (2, 0, 1, [3]), samples=[0, 1])
    plan.seats = (
        Seat(1, 101, array("i", [1]), RowParams(1.0, 5, 1.0, 0.0, 3)),
        Seat(2, 102, array("i", [2]), PLAIN),
    )
    words = step_words(plan, rows)
    assert not words.is_random
    assert not words.is_filtered
    later = make_plan((1, 2, 1, [3]), samples=[1])
    words = step_words(later, rows)
    assert words.is_random
    assert words.is_filtered


def test_seats_and_blocks_reach_the_tables() -> None:
    rows = Rows(4, 4, CPU)
    plan = make_plan((2, 0, 1, [3]), samples=[1])
    params_of_seat = RowParams(0.7, 50, 0.9, 0.05, 2**63 - 5)
    plan.seats = (Seat(2, 9, array("i", [11, 12]), params_of_seat),)
    plan.blocks = array("i", [1, 3, 13])
    words = step_words(plan, rows)
    places, blocks, seated, params = (torch.from_numpy(s.copy()) for s in words.deltas[:4])
    rows.scatter(places, blocks, seated, params.view(1, -1))
    assert rows.block_tables_SM[2, :2].tolist() == [11, 12]
    assert rows.block_tables_SM[1, 3] == 13
    kept = np.append(rows.params_4S[:, 2].numpy(), rows.seeds_S[2:3].view(torch.int32).numpy())
    assert np.array_equal(kept, param_words(params_of_seat))


def test_parameter_words_keep_their_bits() -> None:
    words = param_words(RowParams(0.7, 50, 0.9, 0.05, 2**63 - 5))
    assert words[[0, 2, 3]].view(np.float32).tolist() == [np.float32(x) for x in (0.7, 0.9, 0.05)]
    assert words[4:].view(np.int64)[0] == 2**63 - 5


def test_results_return_to_plan_order() -> None:
    plan = make_plan((3, 0, 3, [7, 8, 9]), (1, 40, 1, []), (2, 16, 2, [5, 6]), samples=[1, 1, 0])
    words = step_words(plan, Rows(8, 4, CPU))
    result = step_result(plan, words, np.array([50, 60], np.int32), 0.5)
    assert result.counts.tolist() == [1, 1, 0]
    assert result.tokens.tolist() == [60, 50], "the single token ran first, the chunk second"
    assert (result.step, result.seconds) == (1, 0.5)


def test_drafts_are_kept_while_they_equal_the_samples() -> None:
    plan = make_plan((1, 9, 3, [4, 20, 21]), (2, 3, 1, [8]), (3, 5, 2, [6, 30]), samples=[3, 1, 2])
    words = step_words(plan, Rows(8, 4, CPU))
    samples = np.array([70, 20, 99, 88, 31, 90], np.int32)  # batch order: row 2, row 1 (three), row 3 (two)
    result = step_result(plan, words, samples, 0.0)
    assert result.counts.tolist() == [2, 1, 1]
    assert result.tokens.tolist() == [20, 99, 70, 31]


def test_rows_that_are_not_finite_are_named() -> None:
    plan = make_plan((1, 9, 1, [4]), (2, 3, 2, [8, 9]), (3, 5, 1, [6]), samples=[1, 0, 1])
    words = step_words(plan, Rows(8, 4, CPU))
    result = step_result(plan, words, np.array([12, NOT_FINITE], np.int32), 0.0)
    assert result.failed.tolist() == [2]


def test_verified() -> None:
    assert verified([5], []) == [5]
    assert verified([5, 6, 7], [5, 6]) == [5, 6, 7]
    assert verified([5, 6, 7], [4, 6]) == [5]


def test_a_decode_step_is_padded_by_rows_of_the_dummy_seat() -> None:
    plan = make_plan((3, 7, 1, [9]), (1, 40, 1, []), (2, 16, 1, []), samples=[1, 1, 1])
    words = padded_step_words(plan, Rows(8, 4, CPU), SHAPES)
    columns = words.columns
    assert columns.tolist() == [[3, 1, 2, 0], [7, 40, 16, 0], [1, 1, 1, 1], [0, 1, 2, 3], [0, -1, -1, -1]]
    assert words.tokens.tolist() == [9, 0, 0, 0]
    assert words.samples.tolist() == [[0, 1, 2, 0], [3, 1, 2, 0], [8, 41, 17, 0]]
    assert (len(words.order), words.num_tokens, words.num_decodes, words.num_samples) == (3, 4, 4, 4)
    result = step_result(plan, words, np.array([70, 71, 72, 99], np.int32), 0.0)
    assert result.tokens.tolist() == [70, 71, 72]


def test_a_mixed_step_is_padded_by_empty_rows_and_tokens_of_no_row() -> None:
    plan = make_plan((3, 0, 8, list(range(8))), (1, 40, 1, []), samples=[0, 1])
    words = padded_step_words(plan, Rows(8, 4, CPU), SHAPES)
    columns = words.columns
    assert columns.tolist() == [
        [1, 3, 0, 0, 0],
        [40, 0, 0, 0, 0],
        [1, 8, 0, 0, 0],
        [0, 1, 9, 9, 9],
        [-1, 0, -1, -1, -1],
    ]
    assert len(words.tokens) == words.num_tokens == 16
    assert words.samples.tolist() == [[0], [1], [41]]
    assert (len(words.order), words.num_decodes, words.num_samples) == (2, 5, 1)


def test_a_step_beyond_the_shapes_keeps_its_tokens() -> None:
    """Its rows are padded all the same: no number of them is to want a kernel of its own."""
    plan = make_plan((3, 0, 17, list(range(17))), samples=[1])
    words = padded_step_words(plan, Rows(8, 4, CPU), SHAPES)
    assert (words.num_tokens, words.num_decodes, words.columns.shape) == (17, 5, (NUM_ROW_COLUMNS, 5))


DRAFT_SHAPES = PaddedShapes(decode_sizes=(1, 2, 4, 8), draft_sizes=(4, 8), mixed_sizes=(16,), num_rows=9)


def test_drafts_become_rows_of_one_token() -> None:
    plan = make_plan((1, 9, 3, [4, 20, 21]), (2, 3, 1, []), (3, 5, 2, [6, 30]), samples=[3, 1, 2])
    words = padded_step_words(plan, Rows(8, 4, CPU), DRAFT_SHAPES)
    columns = words.columns
    assert columns.tolist() == [
        [1, 1, 1, 2, 3, 3, 0, 0],
        [9, 10, 11, 3, 5, 6, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, -1, 3, 4, -1, -1],
    ]
    assert words.samples[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert words.samples[1].tolist() == [1, 1, 1, 2, 3, 3, 0, 0]
    assert words.samples[2].tolist() == [10, 11, 12, 4, 6, 7, 0, 0]
    assert (len(words.order), words.num_tokens, words.num_decodes, words.num_samples) == (3, 8, 8, 8)
    assert (words.has_drafts, words.max_query_len, words.max_context_len) == (True, 1, 12)
    result = step_result(plan, words, np.array([20, 99, 88, 70, 31, 90, 0, 0], np.int32), 0.0)
    assert (result.counts.tolist(), result.tokens.tolist()) == ([2, 1, 1], [20, 99, 70, 31])


def test_drafts_are_split_beside_chunks_and_stay_whole_when_they_are_too_many() -> None:
    plan = make_plan((4, 0, 5, list(range(5))), (1, 9, 3, [4, 20, 21]), samples=[0, 3])
    words = padded_step_words(plan, Rows(8, 4, CPU), DRAFT_SHAPES)
    columns = words.columns
    assert words.order.tolist() == [1, 0]
    assert columns[:, :4].tolist() == [[1, 1, 1, 4], [9, 10, 11, 0], [1, 1, 1, 5], [0, 1, 2, 3], [5, 6, 7, 0]]
    assert (words.num_tokens, words.num_decodes, words.max_query_len) == (16, 9, 5)
    assert words.samples[0].tolist()[:3] == [0, 1, 2]
    many = make_plan(*((row, 9, 4, [4, 20, 21, 22]) for row in (1, 2, 3)), samples=[4] * 3)
    words = padded_step_words(many, Rows(8, 4, CPU), DRAFT_SHAPES)
    assert (words.has_drafts, words.max_query_len, words.num_decodes) == (False, 4, 9)


WORKS = st.one_of(
    st.tuples(st.just(1), st.just(1), st.booleans()),  # a decode
    st.integers(2, 4).map(lambda count: (count, count, True)),  # a decode with drafts
    st.tuples(st.integers(1, 6), st.integers(0, 1), st.just(True)),  # a chunk
)


@given(st.lists(WORKS, min_size=1, max_size=5), st.sampled_from([PaddedShapes(), SHAPES, DRAFT_SHAPES]))
def test_any_plan_is_laid_out_token_by_token(kinds: list[tuple[int, int, bool]], shapes: PaddedShapes) -> None:
    works = [
        (i + 1, 10 * i, count, [100 * i + j for j in range(count)] * has) for i, (count, _, has) in enumerate(kinds)
    ]
    words = padded_step_words(make_plan(*works, samples=[num for _, num, _ in kinds]), Rows(8, 4, CPU), shapes)
    batch: dict[int, tuple[int, int, int | None]] = {}  # seat, position and id, if the host has it, of each token
    for seat, start, count, first, offset in words.columns.T.tolist():
        for j in range(count if seat else 0):
            batch[first + j] = seat, start + j, None if offset < 0 else int(words.tokens[offset + j])
    planned = [(row, start + j, ids[j] if ids else None) for row, start, count, ids in works for j in range(count)]
    assert sorted(batch) == list(range(len(planned))) and sorted(map(str, batch.values())) == sorted(map(str, planned))
    sampled = [(token, seat, position) for token, seat, position in words.samples.T.tolist() if seat]
    assert all(batch[token][:2] == (seat, position - 1) for token, seat, position in sampled)
    expected = [
        (row, start + count - j)
        for (row, start, count, _), (_, num, _) in zip(works, kinds, strict=True)
        for j in range(num)
    ]
    assert sorted((seat, position) for _, seat, position in sampled) == sorted(expected)
    assert [token for token, _, _ in sampled] == sorted(token for token, _, _ in sampled)

"""A step's inputs lie where L, R and T alone say, so that a graph may hold their addresses."""

from __future__ import annotations

from array import array

import torch

from minillm.core.plan import StepPlan
from minillm.runtime.batching import PaddedShapes, StepWords, step_words
from minillm.runtime.rows import Rows
from minillm.runtime.step_buffer import StepBuffer, to_device

CPU = torch.device("cpu")
SHAPES = PaddedShapes(decode_sizes=(1, 2, 4), mixed_sizes=(8,), num_rows=5)


def words_of(counts: list[int], *, num_samples: list[int], shapes: PaddedShapes = SHAPES) -> StepWords:
    """A step of rows of so many tokens each, numbered through."""
    tokens = array("i", range(100, 100 + sum(counts)))
    columns = [array("i", values) for values in (range(1, len(counts) + 1), [20] * len(counts), counts, num_samples)]
    plan = StepPlan(step=1, requests=columns[0], rows=columns[0], starts=columns[1], counts=columns[2])
    plan.num_samples, plan.num_logits, plan.num_tokens, plan.tokens = columns[3], columns[3], columns[2], tokens
    return step_words(plan, Rows(8, 8, CPU), shapes)


def test_what_is_sent_lies_in_the_place_of_its_shape() -> None:
    buffer = StepBuffer(SHAPES, CPU)
    for counts, num_samples in (([1, 1, 1], [1, 1, 1]), ([5], [1]), ([6, 1], [3, 1]), ([7], [0]), ([1], [1])):
        words = words_of(counts, num_samples=num_samples)
        sent = buffer.send(words)
        for part, expected in zip(sent, (words.samples, words.columns, words.tokens), strict=True):
            assert part.tolist() == expected.tolist()
        places = buffer.inputs(words.num_samples, words.columns.shape[1], len(words.tokens))
        assert [part.data_ptr() for part in places] == [part.data_ptr() for part in sent]


def test_columns_lie_in_one_place_however_many_samples_there_are() -> None:
    buffer = StepBuffer(SHAPES, CPU)
    sent = [buffer.send(words_of([4, 1], num_samples=[samples, 1])) for samples in (0, 1, 3)]
    assert len({words.columns_5R.data_ptr() for words in sent}) == 1
    assert len({words.tokens_T.data_ptr() for words in sent}) == 1
    assert sent[0].columns_5R.data_ptr() % 16 == 0, "as kernels are compiled for"


def test_samples_lie_in_one_place_however_many_tokens_there_are() -> None:
    buffer = StepBuffer(SHAPES, CPU)
    sent = [buffer.send(words_of([count], num_samples=[1])) for count in (1, 5, 8)]
    assert len({words.samples_3L.data_ptr() for words in sent}) == 1


def test_shapes_that_differ_in_tokens_alone_have_places_of_their_own() -> None:
    shapes = PaddedShapes(decode_sizes=(1,), mixed_sizes=(8, 16), num_rows=2)
    buffer = StepBuffer(shapes, CPU)
    for count in (5, 12, 5):
        words = words_of([count], num_samples=[1], shapes=shapes)
        assert buffer.send(words).tokens_T.tolist() == words.tokens.tolist()


def test_a_step_beyond_the_shapes_has_memory_of_its_own() -> None:
    buffer = StepBuffer(SHAPES, CPU)
    kept = buffer.send(words_of([8], num_samples=[1]))
    before = kept.tokens_T.tolist()
    words = words_of([9], num_samples=[1])
    sent = buffer.send(words)
    assert sent.tokens_T.tolist() == words.tokens.tolist() and kept.tokens_T.tolist() == before


def test_sections_of_any_shape_come_out_flat() -> None:
    first, second = to_device((words_of([1], num_samples=[1]).columns, words_of([2], num_samples=[1]).tokens), CPU)
    assert first.tolist() == [1, 20, 1, 0, 0] and second[:2].tolist() == [100, 101]
